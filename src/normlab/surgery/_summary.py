"""A model in a table: what each module is given, puts out and learns, and how each norm is set."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from io import StringIO
from typing import Any

import torch
from torch import nn

from ..errors import check, check_no_class, is_real
from .effect import looking
from .modules import OTHERS, called, known_by
from .outputs import tensors
from .probe import channels, check_made, statistics_kind
from .trace import input_of

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Line:
    """One module. A figure is None where it has no meaning.

    Attributes:
        name: where it is in the model.
        kind: its class, torch's marked as such.
        input: the shape of the first tensor that it was given; None if it was not run.
        output: the shape of the first tensor that it put out.
        parameters: numbers that it owns; those of modules within it are theirs.
        learned: how many of them learn.
        calls: how often it was run.
        norm: whether it is one.
        eps: of a norm.
        momentum: of a norm.
        values: how many a channel of a norm has in this batch.
        statistics: of a norm, "running" where training moves them, "constant" where nothing does; None without any.
    """

    name: str
    kind: str
    input: Shape | None
    output: Shape | None
    parameters: int
    learned: int
    calls: int
    norm: bool
    eps: float | None = None
    momentum: float | None = None
    values: int | None = None
    statistics: str | None = None

    @property
    def frozen(self) -> str:
        """What of it training does not change: "all", "parameters", "statistics" or ""."""
        still = {"parameters": self.learned == 0} if self.parameters else {}
        still |= {"statistics": self.statistics == "constant"} if self.statistics else {}
        return "all" if still and all(still.values()) else "".join(name for name, one in still.items() if one)


@dataclass(frozen=True)
class Summary:
    """Every module of a model that computes something; printed as a table.

    Attributes:
        rows: in the order of the model.
        parameters: numbers that the model has, each counted once.
        learned: how many of them learn.
    """

    rows: list[Line]
    parameters: int
    learned: int

    @property
    def norms(self) -> list[Line]:
        """Those that are norms."""
        return [row for row in self.rows if row.norm]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        rows = [{**asdict(row), "frozen": row.frozen} for row in self.rows]
        return {"rows": rows, "parameters": self.parameters, "learned": self.learned}

    def __iter__(self) -> Iterator[Line]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for heading in ("module", "class", "input", "output"):
            table.add_column(heading, overflow="fold")
        for heading in ("parameters", "eps", "momentum", "values a channel"):
            table.add_column(heading, justify="right")
        table.add_column("frozen")
        for row in self.rows:
            shapes = [_shown(row.input), _shown(row.output)] if row.calls else ["not run", ""]
            figures = map(_shown, (row.parameters, row.eps, row.momentum, row.values))
            table.add_row(*map(Text, [row.name or "(the model)", row.kind, *shapes, *figures, row.frozen]))  # no markup
        return Group(table, f"{self.parameters:,} parameters, {self.learned:,} learn; {len(self.norms)} norms")

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=160).print(self)
        return text.getvalue().rstrip()


def summary(model: nn.Module, input: Any) -> Summary:
    """Run a model once and say of each module what it is given, puts out and learns, and how each norm is set.

    It runs in evaluation mode; modes, buffers and random numbers are as before.

    Example:
        >>> import normlab, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> normlab.summary(model, torch.randn(2, 3, 6, 6)).norms[0].values
        32

    Args:
        model: any module.
        input: what it is given: a tensor, a tuple of several arguments, or a dict of arguments by keyword.

    Returns:
        Rows of the modules that hold no others, of norms, and of those with parameters of their own.

    Raises:
        InputError: `model` is no module, or not made yet.
    """
    check_no_class("model", model)
    check(isinstance(model, nn.Module), "model", type(model).__name__, "a torch.nn.Module")
    check_made(model)
    shown = {name: module for name, module in model.named_modules() if _is_shown(module)}
    calls: dict[nn.Module, list[tuple[Shape | None, Shape | None]]] = {module: [] for module in shown.values()}

    def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[module].append((_shape_of((input_of(args, kwargs), args, kwargs)), _shape_of(output)))

    handles = [module.register_forward_hook(see, with_kwargs=True) for module in calls if _can_be_seen(module)]
    try:
        with looking(model):
            if isinstance(input, Mapping):
                model(**input)
            else:
                model(*(input if isinstance(input, tuple) else (input,)))
    finally:
        for handle in handles:
            handle.remove()
    rows = [_line(name, module, calls[module]) for name, module in shown.items()]
    return Summary(rows, *_counted(model.parameters()))


def _is_shown(module: nn.Module) -> bool:
    return not list(module.children()) or bool(module._parameters) or known_by(module) is not None


def _can_be_seen(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


def _shape_of(value: Any) -> Shape | None:
    """Of the first tensor in it."""
    return next((tuple(part.shape) for part in tensors(value)), None)


def _counted(parameters: Iterable[nn.Parameter]) -> tuple[int, int]:
    """How many numbers, and how many of them learn."""
    parts = list(parameters)
    return sum(part.numel() for part in parts), sum(part.numel() for part in parts if part.requires_grad)


def _line(name: str, module: nn.Module, calls: list[tuple[Shape | None, Shape | None]]) -> Line:
    given, put_out = calls[0] if calls else (None, None)
    parameters, learned = _counted(module.parameters(recurse=False))
    line = Line(name, called(module), given, put_out, parameters, learned, len(calls), known_by(module) is not None)
    if not line.norm:
        return line
    kept = any(name.startswith("running_") and part is not None for name, part in module._buffers.items())
    statistics = ("constant" if statistics_kind(module) == "constant" else "running") if kept else None
    momentum = _number(module, "momentum") if kept else None
    values = None if isinstance(module, OTHERS) else _values(module, given)
    return replace(line, eps=_number(module, "eps"), momentum=momentum, values=values, statistics=statistics)


def _number(module: nn.Module, name: str) -> float | None:
    value = getattr(module, name, None)
    return value if is_real(value) else None


def _values(norm: nn.Module, given: Shape | None) -> int | None:
    count = channels(norm)
    return math.prod(given) // count if given and count else None


def _shown(value: Any) -> str:
    """A cell of the table."""
    return "" if value is None else "×".join(map(str, value)) if isinstance(value, tuple) else f"{value:,}"

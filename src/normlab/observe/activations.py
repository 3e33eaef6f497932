"""What each module puts out as training goes on: mean, deviation, share near zero, histogram."""

import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..choice import Choice, is_meant
from ..errors import check
from .figures import Figures, figures, pooled, values
from .hooks import Hook

# Batches looked at until their figures are fetched: each fetch makes a GPU wait.
FETCH_EVERY = 64

Series = dict[str, list[float]]
OfModules = dict[str, list[Figures]]  # at one batch, a call each


class ActivationStats:
    """Records what modules put out at every `every`-th training batch while it is open, in any loop.

        stats = ActivationStats(model)
        with stats:
            ...  # any loop that calls the model
        learner = Learner(model, ..., callbacks=[stats])  # or as a callback; for Lightning see observe.lightning
        plot_activations(stats)
        plot_histograms(stats)

    In a `with` block a training batch is a call of the model in training mode. If modules are given by name, it is a
    call of the first of them. As a callback it is a batch of the loop, however often the loop calls the model.
    Several calls of a module in one batch are taken together. If a module puts out a tuple, list, dict or dataclass,
    its first tensor of floating point counts. The second forward pass of an activation checkpoint is not counted.
    Statistics that are opened again go on.

    Cost: hooks are on only at the batches it looks at. Such a batch takes 1.6 times as long with the lesson's net, and
    1.8 times with a residual net (one CPU thread, every module watched). At the default of `every` training takes 2 to
    3 % longer (`python benchmarks/activations.py`; figures in benchmarks/results/activations.jsonl). It keeps 8 bytes
    for each bin, module and batch looked at. It waits for a GPU at every 64th of these batches, and where figures are
    read.

    Compiled code calls no hooks, so everything runs uncompiled at the batches it looks at. A `with` block can do that
    for what `torch.compile(model)` returns, and for compiled parts of a model. The block hears nothing of a model that
    compiled code calls (`model.compile()`, `Learner(..., compile=True)`). Use the callback there.

    Args:
        model: any module, or modules by the name they shall have.
        only: which of its modules: a pattern of names (`"layer4.*"`), a class, a function of name and module that says
            whether, or several of these. By default each that has parameters of its own or no modules inside; not
            `Identity`, `Flatten` and `Unflatten`, which put out what they are given, nor parametrizations of weights.
        every: it looks at the first training batch, and then at each `every`-th.
        limit: histograms reach from −limit to limit. The outer bins count what is beyond.
        bins: of a histogram, an odd number. The one in the middle is "near zero": |x| < limit/bins, 0.05 by default.

    Attributes:
        modules: by name.
        steps: the numbers, from 1, of the training batches looked at; each is there when the batch is over.

    Raises:
        InputError: an argument cannot be used, or no module is meant.
    """

    order: ClassVar[int] = 0
    learner: Any  # whose callback this is

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        only: Choice | Iterable[Choice] | None = None,
        *,
        every: int = 50,
        limit: float = 5.0,
        bins: int = 101,
    ):
        check(every >= 1, "every", every, "a whole number from 1")
        check(limit > 0, "limit", limit, "a number above 0")
        check(3 <= bins <= 9999 and bins % 2 == 1, "bins", bins, "an odd number from 3 to 9999")
        self.every, self.limit, self.bins = every, limit, bins
        self.modules = _meant(model, only)
        self._model = model if isinstance(model, nn.Module) else next(iter(self.modules.values()))
        self._whole = isinstance(model, nn.Module)
        self.steps: list[int] = []
        self._batches = 0
        self._fresh: list[OfModules] = []
        self._rows: list[np.ndarray] = []  # (modules, 3 + bins): number of values, mean, deviation, counts
        self._unread: dict[str, str] = {}
        self._open = False
        self._listening = ExitStack()
        self._batch = ExitStack()  # what ends with a batch that is looked at

    @property
    def means(self) -> Series:
        """By name, of all values at each of `steps`; nan, here and below, where there were none."""
        return self._by_name(self._table()[..., 1])

    @property
    def deviations(self) -> Series:
        """By name, the population standard deviation of all values at each of `steps`."""
        return self._by_name(self._table()[..., 2])

    @property
    def near_zero(self) -> Series:
        """By name, the share of values nearer to zero than limit/bins at each of `steps`."""
        return self._shares(self._table()[..., 3 + self.bins // 2])

    @property
    def not_finite(self) -> Series:
        """By name, the share of values that are infinite or nan at each of `steps`."""
        table = self._table()
        return self._shares(table[..., 0] - table[..., 3:].sum(-1))

    @property
    def histograms(self) -> dict[str, np.ndarray]:
        """By name, (steps, bins): how many finite values are in each bin."""
        counts = self._table()[..., 3:].astype(np.int64)
        return {name: counts[:, index] for index, name in enumerate(self.modules)}

    @property
    def skipped(self) -> dict[str, str]:
        """By name, why a module has no figures at any of `steps`."""
        nothing = (self._table()[..., 0] == 0).all(0) & bool(self.steps)
        names = [name for name, none in zip(self.modules, nothing, strict=True) if none]
        return {name: self._unread.get(name, "was not called") for name in names}

    def __repr__(self) -> str:
        return f"ActivationStats({len(self.modules)} modules, {len(self.steps)} batches)"

    def __enter__(self) -> "ActivationStats":
        def before(module: nn.Module, inputs: Any) -> None:
            # A copy of the model, such as an average of its weights, has this hook too.
            if module is not self._model or _elsewhere():
                return
            self._end_batch()
            if module.training and self._begin_batch() and self._whole:
                self._batch.callback(module.register_forward_hook(after).remove)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            self._end_batch()

        self.begin_fit()
        self._before = self._batches
        self._listening.callback(self._model.register_forward_pre_hook(before).remove)
        return self

    def __exit__(self, kind: Any, *exception: object) -> None:
        self.after_fit()
        if self._batches == self._before and kind is None:
            text = "no training batch was seen: the model was not called in training mode, or only by compiled code"
            warnings.warn(text, stacklevel=2)

    def begin_fit(self) -> None:
        """As a callback: open."""
        if self._open:
            raise RuntimeError("These activation statistics are open already: use them as a callback or by `with`.")
        self._open = True

    def begin_batch(self) -> None:
        """As a callback: a batch begins."""
        if self.learner.training:
            self._begin_batch()

    def after_batch(self) -> None:
        """As a callback: it is over."""
        self._end_batch()

    def after_fit(self) -> None:
        """As a callback: close."""
        self._end_batch()
        self._listening.close()
        self._open = False

    def _begin_batch(self) -> bool:
        """Whether the batch is looked at."""
        self._batches += 1
        if (self._batches - 1) % self.every:
            return False
        outputs: OfModules = {name: [] for name in self.modules}
        self._batch.callback(self._keep, self._batches, outputs)
        for name, module in self.modules.items():
            self._batch.callback(Hook(module, self._recorder(name, outputs[name])).remove)
        if "torch._dynamo" in sys.modules:  # which takes long to import; without it nothing is compiled
            self._batch.enter_context(torch.compiler.set_stance("force_eager"))
        return True

    def _end_batch(self) -> None:
        self._batch.close()

    def _keep(self, step: int, outputs: OfModules) -> None:
        self.steps.append(step)
        self._fresh.append(outputs)
        if len(self._fresh) == FETCH_EVERY:
            self._table()

    def _recorder(self, name: str, outputs: list[Figures]):
        def record(hook: Hook, module: nn.Module, inputs: Any, output: Any) -> None:
            if _elsewhere():
                return
            x = values(output)
            if x is None:
                self._unread[name] = f"puts out no plain tensor of floating point, but {type(output).__name__}"
            elif x.numel() == 0:
                self._unread[name] = "puts out no values"
            else:
                outputs.append(figures(x, self.limit, self.bins))

        return record

    def _table(self) -> np.ndarray:
        """(steps, modules, 3 + bins)."""
        for outputs in self._fresh:
            self._rows.append(np.stack([pooled(calls, self.bins) for calls in outputs.values()]))
        self._fresh.clear()
        return np.stack(self._rows) if self._rows else np.empty((0, len(self.modules), 3 + self.bins))

    def _by_name(self, columns: np.ndarray) -> Series:
        return dict(zip(self.modules, columns.T.tolist(), strict=True))

    def _shares(self, counts: np.ndarray) -> Series:
        with np.errstate(invalid="ignore"):
            return self._by_name(counts / self._table()[..., 0])


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The direct children of `model` that have parameters, named by place and kind: `0 Sequential`."""
    children = model.named_children()
    return {
        f"{name} {type(child).__name__}": child for name, child in children if any(True for _ in child.parameters())
    }


def _meant(model: nn.Module | Mapping[str, nn.Module], only: Choice | Iterable[Choice] | None) -> dict[str, nn.Module]:
    """Each module once, by its first name."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    if not isinstance(model, nn.Module):
        check(only is None and bool(model), "model", model, "a module, or a dict of modules without `only`")
        return dict(model)
    for name, module in model.named_modules(remove_duplicate=False):
        name = ".".join(part for part in name.split(".") if part != "_orig_mod")  # torch.compile's
        found.setdefault(id(module), (module, []))[1].append(name)
    choice = _is_layer if only is None else only
    meant = {names[0]: module for module, names in found.values() if is_meant(module, names, choice)}
    check(bool(meant), "only", only, f"what is met by a module of the model, such as {[*found.values()][-1][1][0]!r}")
    return meant


def _is_layer(name: str, module: nn.Module) -> bool:
    """Whether it is one of those recorded by default."""
    if isinstance(module, nn.Identity | nn.Flatten | nn.Unflatten) or "parametrizations" in name.split("."):
        return False
    inside = [part for part, _ in module.named_children() if part != "parametrizations"]
    return not inside or (name != "" and any(True for _ in module.parameters(recurse=False)))


def _elsewhere() -> bool:
    """Whether this is no forward pass of the loop: compiled code is being made, or a checkpoint runs one again."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1

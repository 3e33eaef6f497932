"""What a verb of surgery gives back: the model, the report, and the way back."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from ..errors import InputError
from .modules import Found, put
from .probe import Typed, follow, typed, version
from .report import Report

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass
class Operation:
    """A model after surgery; prints its report, and unpacks as `model, report`.

    Attributes:
        model: the model, or its copy.
        report: every norm, touched or left.
        replaced: the norms that were there, and those in their place.
    """

    model: nn.Module
    report: Report
    replaced: list[tuple[Found, nn.Module]] = field(default_factory=list, repr=False)
    _restore: list[Callable[[], Any]] = field(default_factory=list, repr=False)
    _left: "dict[nn.Module, dict[str, Tensor]]" = field(default_factory=dict, repr=False)
    _typed: "dict[nn.Module, Typed]" = field(default_factory=dict, repr=False)
    _versions: int = field(default=0, repr=False)

    def undo(self) -> nn.Module:
        """Put the norms that were there back, in `model`, and the optimizer's parameters too; returns the model.

        If nothing moved since, all is bit by bit as before. If the model was trained, γ and β stay as they are now, and
        statistics go over to the norm that was there, as converting back does.

        Raises:
            InputError: the model was trained with norms that have no statistics, so that those of before fit no more;
                or other modules were put in the place of the new norms. The model is as it was then.
        """
        trained = _versions(self.model) != self._versions
        for found, new in self.replaced:
            self._check_way_back(found, new, trained)
        for found, new in self.replaced:
            self._hand_back(found.module, new)
        self._revert()
        return self.model

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Inside, the model is changed; a failure there, Ctrl-C too, leaves it as it was."""
        try:
            yield
        except BaseException:
            self._revert()
            raise
        self._left = {
            new: {name: part.detach().clone() for name, part in (_statistics(new) | _affine(new)).items()}
            for _, new in self.replaced
        }
        self._typed = {new: typed(new) for _, new in self.replaced}
        self._versions = _versions(self.model)

    def on_undo(self, restore: Callable[[], Any]) -> None:
        """What puts a change back that is made next."""
        self._restore.append(restore)

    def put(self, found: Found, new: nn.Module) -> None:
        """Replace a norm."""
        self.replaced.append((found, new))
        self.model = put(self.model, found, new)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.report))

    def __getitem__(self, index: int) -> Any:
        return (self.model, self.report)[index]

    def __repr__(self) -> str:
        return str(self.report)

    def __rich__(self) -> Any:
        return self.report.__rich__()

    def _revert(self) -> None:
        for restore in reversed(self._restore):  # modes too, which the norms that come back take over
            restore()
        for found, new in self.replaced:
            found.module.training = new.training
            self.model = put(self.model, found, found.module)
        self.replaced, self._restore = [], []

    def _check_way_back(self, found: Found, new: nn.Module, trained: bool) -> None:
        there = [self.model if place.holder is None else place.read() for place in found.places]
        if any(one is not new for one in there):
            raise InputError(
                f"undo: expected {type(new).__name__} at {found.name}, where this operation put it, got "
                f"{', '.join(sorted({type(one).__name__ for one in there}))}. Undo the later operation first."
            )
        has, had = _statistics(new), _statistics(found.module)
        lost = [name for name in self._learned(new) if getattr(found.module, name, None) is None]
        if lost:
            raise InputError(
                f"undo: the model was trained since, and {type(new).__name__} at {found.name} has a {lost[0]} that "
                f"{type(found.module).__name__} had not: what it learned would be lost. Convert to 'batch' instead."
            )
        if trained and "running_mean" in had and "running_mean" not in has:
            raise InputError(
                f"undo: the model was trained since, and {type(new).__name__} at {found.name} has no statistics: those "
                f"of {type(found.module).__name__} are of before. Convert to 'batch', then recalibrate."
            )

    def _learned(self, new: nn.Module) -> dict[str, Tensor]:
        """γ and β of a norm that have changed since it was put in."""
        left = self._left.get(new, {})
        return {
            name: part
            for name, part in _affine(new).items()
            if name in left and not torch.equal(part, left[name].to(part))
        }

    def _hand_back(self, old: nn.Module, new: nn.Module) -> None:
        """Device and type of now, the statistics that moved since, and what was learned in the place of constants."""
        follow(old, self._typed.get(new), new)
        before, now, own = self._left.get(new, {}), _statistics(new), _statistics(old)
        with torch.no_grad():
            for name, value in self._learned(new).items():
                if (part := old._buffers.get(name)) is not None:
                    part.copy_(value.reshape(part.shape))
            if any(name not in before or not torch.equal(part, before[name]) for name, part in now.items()):
                moved = {name: part.reshape(own[name].shape) for name, part in now.items() if name in own}
                old.load_state_dict(moved, strict=False)


def _affine(norm: nn.Module) -> dict[str, Tensor]:
    found = {name: norm._parameters.get(name) for name in ("weight", "bias")}
    return {name: part for name, part in found.items() if part is not None and not part.is_meta}


def _statistics(norm: nn.Module) -> dict[str, Tensor]:
    found = {name: norm._buffers.get(name) for name in STATISTICS}
    return {name: part for name, part in found.items() if part is not None and not part.is_meta}


def _versions(model: nn.Module) -> int:
    """Grows whenever a parameter is written."""
    made = [part for part in model.parameters() if not isinstance(part, UninitializedParameter)]
    return sum(map(version, made))


class Groups:
    """An optimizer's parameters, to exchange and to restore."""

    def __init__(self, optimizer: Optimizer):
        self.optimizer = optimizer
        self._before = [list(group["params"]) for group in optimizer.param_groups]
        self._state = dict(optimizer.state)

    def exchange(self, old: nn.Module, new: nn.Module) -> None:
        """Takes out what `new` has not, and puts in what it has beyond `old`, beside what they share."""
        before, after = list(old.parameters()), list(new.parameters())
        ids = {id(parameter) for parameter in before}
        groups = self.optimizer.param_groups
        home = next((g for g in groups if any(id(p) in ids for p in g["params"])), groups[0])
        gone = ids - {id(parameter) for parameter in after}
        for group in groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
        for parameter in before:
            if id(parameter) in gone:
                self.optimizer.state.pop(parameter, None)
        home["params"] += [parameter for parameter in after if id(parameter) not in ids]

    def restore(self) -> None:
        """As it was before the first exchange, with what it has learned since of the parameters that stayed."""
        stayed = {id(parameter) for group in self.optimizer.param_groups for parameter in group["params"]}
        for group, parameters in zip(self.optimizer.param_groups, self._before, strict=True):
            group["params"] = parameters
        known = {id(parameter) for parameters in self._before for parameter in parameters}
        for parameter in list(self.optimizer.state):
            if id(parameter) not in known:
                del self.optimizer.state[parameter]
        for parameter, state in self._state.items():
            if id(parameter) not in stayed:
                self.optimizer.state[parameter] = state

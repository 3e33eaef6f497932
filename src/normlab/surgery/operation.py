"""What a verb of surgery gives back: the model, the report, and the way back."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .modules import Found, put
from .report import Report


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
    _optimizer: "Groups | None" = field(default=None, repr=False)
    _learned: list[tuple[nn.Parameter, bool]] = field(default_factory=list, repr=False)

    def undo(self) -> nn.Module:
        """Put the norms that were there back, in `model`, and the optimizer's parameters too; returns the model.

        γ and β that both norms have stay as they are now; statistics are as they were.
        """
        for found, new in self.replaced:
            found.module.train(new.training)
            self.model = put(self.model, found, found.module)
        self.replaced = []
        for parameter, learns in self._learned:
            parameter.requires_grad_(learns)
        if self._optimizer is not None:
            self._optimizer.restore()
        return self.model

    def __iter__(self) -> Iterator[Any]:
        return iter((self.model, self.report))

    def __getitem__(self, index: int) -> Any:
        return (self.model, self.report)[index]

    def __repr__(self) -> str:
        return str(self.report)

    def __rich__(self) -> Any:
        return self.report.__rich__()


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

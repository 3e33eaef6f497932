"""Short fits that leave everything as it was."""

import copy
import math
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..errors import check, is_real, is_whole
from .events import Callback, CancelTrain


class FindLearningRate(Callback):
    """Raises the learning rate from `min_lr` to `max_lr`, geometrically, to see from which one on the loss rises.

    Ends the fit at `max_steps` steps, or when the loss passes ten times its best or is not finite. Plot a `Recorder`'s
    losses over its rates afterwards. After the fit, and after one that failed, parameters, buffers, the optimizer's
    state and its rates are as they were before; a copy of them is kept as long.

    Raises:
        InputError: an argument cannot be used, or a parameter of the model is not made yet.
    """

    order = 1
    _before: "_Snapshot | None" = None

    def __init__(self, max_steps: int = 100, min_lr: float = 1e-6, max_lr: float = 10.0):
        check(is_whole(max_steps, 1), "max_steps", max_steps, "a whole number from 1")
        check(is_real(max_lr), "max_lr", max_lr, "a number above min_lr")
        check(is_real(min_lr) and 0 < min_lr < max_lr, "min_lr", min_lr, f"a number above 0 and below max_lr={max_lr}")
        self.max_steps, self.min_lr, self.max_lr = max_steps, min_lr, max_lr

    def begin_fit(self) -> None:
        self._best = float("inf")
        self._before = _Snapshot(self.learner.model, self.learner.optimizer)

    def begin_batch(self) -> None:
        if self.learner.training:
            share = self.learner.step / self.max_steps
            for group in self.learner.optimizer.param_groups:
                group["lr"] = self.min_lr * (self.max_lr / self.min_lr) ** share

    def after_step(self) -> None:
        loss = float(self.learner.loss)
        if self.learner.step >= self.max_steps or not math.isfinite(loss) or loss > 10 * self._best:
            raise CancelTrain
        self._best = min(self._best, loss)

    def after_fit(self) -> None:
        if self._before is not None:  # it is None where the fit failed before this callback began
            self._before.restore()
        self._before = None


class _Snapshot:
    """Parameters and buffers of a model, state and settings of its optimizer."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        lazy = [name for name, part in model.named_parameters() if isinstance(part, UninitializedParameter)]
        check(not lazy, "model", ", ".join(lazy), "one whose parameters are all there: run a batch through it first")
        places = [(place, name, part) for place in _places(model) for name, part in place.items() if part is not None]
        self._tensors = [(place, name, part, part.detach().clone()) for place, name, part in places]
        self._optimizer = optimizer
        self._state = {parameter: copy.deepcopy(state) for parameter, state in optimizer.state.items()}
        self._groups = [copy.deepcopy(_settings(group)) for group in optimizer.param_groups]

    def restore(self) -> None:
        with torch.no_grad():
            for place, name, part, value in self._tensors:
                part.copy_(value)
                place[name] = part
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        for group, settings in zip(self._optimizer.param_groups, self._groups, strict=True):
            group.update(settings)


def _places(model: nn.Module) -> list[dict[str, Any]]:
    return [place for module in model.modules() for place in (module._parameters, module._buffers)]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}

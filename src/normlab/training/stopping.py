"""Callbacks that end a fit early."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import check, is_real, is_whole
from .events import Callback, CancelTrain
from .history import check_metric, figures

# Steps between two looks at the losses: each look makes a GPU wait.
LOOK_EVERY = 32


class StopWhenDiverged(Callback):
    """Ends the fit when a training loss is not finite; it looks every 32 steps, and at the end of the epoch.

    Attributes:
        step: the first training step, from 1, whose loss was not finite; None while all were.
    """

    def begin_fit(self) -> None:
        self.step: int | None = None
        self._seen = 0
        self._losses: list[Tensor] = []

    def after_backward(self) -> None:
        self._losses.append(self.learner.loss)
        if len(self._losses) == LOOK_EVERY:
            self._look()

    def begin_validate(self) -> None:
        self._look()

    def after_epoch(self) -> None:
        self._look()

    def state_dict(self) -> dict[str, Any]:
        """The losses that were not looked at yet."""
        return {"seen": self._seen, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._seen, self._losses = state["seen"], state["losses"]

    def _look(self) -> None:
        if self._losses:
            finite = torch.stack(self._losses).isfinite().tolist()
            if not all(finite):
                self.step = self._seen + finite.index(False) + 1
                raise CancelTrain
            self._seen += len(finite)
            self._losses = []


class EarlyStopping(Callback):
    """Ends the fit when a figure of the history has not become better for `patience` epochs.

    It looks at the history alone, so it decides the same after a crash. It comes with `Metrics`.

        callbacks=[Metrics(dice=dice), EarlyStopping("valid.dice", "max", patience=5)]

    Args:
        metric: of the history: the part and the figure's name, as `valid.loss`.
        mode: "min" where less is better, "max" where more is.
        patience: epochs in a row that are no better.
        min_delta: what a figure has to differ by from the best before, to be better.

    Attributes:
        best_epoch: from 1, the last that was better than all before it; 0 if none was, as with NaN.

    Raises:
        InputError: an argument cannot be used; in `fit`, the history has no such figure.
    """

    order = -10  # before others hear that an epoch begins, which then does not

    def __init__(self, metric: str = "valid.loss", mode: str = "min", patience: int = 3, min_delta: float = 0.0):
        check_metric(metric, mode)
        check(is_whole(patience, 1), "patience", patience, "a whole number from 1")
        check(is_real(min_delta) and min_delta >= 0, "min_delta", min_delta, "a number from 0")
        self.metric, self.mode, self.patience, self.min_delta = metric, mode, patience, min_delta
        self.best_epoch = 0

    def begin_epoch(self) -> None:
        if self.learner.epoch == 0:
            return
        self._look()
        if self.learner.epoch - self.best_epoch >= self.patience:
            raise CancelTrain

    def after_fit(self) -> None:
        if self.learner.history:
            self._look()

    def _look(self) -> None:
        sign = 1 if self.mode == "min" else -1
        best, self.best_epoch = float("inf"), 0
        for epoch, figure in enumerate(figures(self.learner.history, self.metric, "EarlyStopping"), 1):
            if sign * figure < best - self.min_delta:
                best, self.best_epoch = sign * figure, epoch


class StopAtNonFinite(Callback):
    """Ends the fit at the first training loss that is not finite, before its step, and says where that began.

    It runs the batch once more, with hooks on every module, and warns with the name of the first whose output is
    infinite or NaN. While all is well it costs a look at each loss: nothing on a CPU, a wait for it on a GPU.

    Attributes:
        step: the training step, from 1; None while all losses were finite.
        where: what it said; None as long.
    """

    def begin_fit(self) -> None:
        self.step: int | None = None
        self.where: str | None = None

    def after_loss(self) -> None:
        learner = self.learner
        if not learner.training:
            return
        finite = learner.ranks.weight == 0 or bool(torch.isfinite(learner.loss.detach()).all())
        if learner.ranks.sum(not finite) != [0]:
            self.step = learner.step + 1
            self.where = self._where()
            warnings.warn(f"The loss is not finite at step {self.step}. {self.where}", stacklevel=2)
            raise CancelTrain

    def _where(self) -> str:
        learner = self.learner
        for name, part in learner.model.named_parameters():
            if not _is_finite(part):
                return f"The parameter {name} is not finite: an earlier step made it so. Lower the learning rate."
        for part in _tensors(learner.inputs):
            if not _is_finite(part):
                return "The inputs of the batch are not finite. Look at the data."
        if not learner._stepped:  # step_func makes steps of its own: once more would be one too many
            return "All parameters are finite. With a step_func that makes steps no module is looked at."
        if learner.ranks.count > 1:  # each would have to run the same modules
            return "All parameters are finite. In several processes no module is looked at."
        found = _first_not_finite(learner.model, self._run)
        return found or "The outputs of all modules are finite: it is the loss function, or what it is given."

    def _run(self) -> None:
        learner = self.learner
        if learner.step_func is None:
            learner.model(learner.inputs)
        else:
            learner.step_func(learner.inputs, learner.model)


class _Found(Exception):
    pass


def _first_not_finite(model: nn.Module, run: Any) -> str | None:
    """Which module's output is the first that is not finite, in words; buffers are as before."""
    names = {module: name for name, module in model.named_modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        if not all(map(_is_finite, _tensors(output))):
            sizes = [float(part.detach().abs().max()) for part in _tensors(inputs) if part.numel() and _is_finite(part)]
            given = f"of inputs up to {max(sizes):.3g}" if sizes else "of inputs that are not finite"
            name = names[module] or "the model"
            raise _Found(f"{name} ({type(module).__name__}) is the first module with such an output, {given}.")

    handles = [module.register_forward_hook(look) for module in names]
    try:
        run()
    except _Found as found:
        return str(found)
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    return (part for part in tree_leaves(value) if isinstance(part, Tensor))


def _is_finite(part: Tensor) -> bool:
    return bool(part.isfinite().all())

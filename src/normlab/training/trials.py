"""Short fits that leave everything as it was."""

import copy
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..errors import InputError, check, is_real, is_whole
from .callbacks import PREPARING, ClipGradients
from .events import Callback, CancelTrain
from .state import PARTS, data_state, load_data_state, random_state, set_random_state

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .learner import Learner

# What a trial keeps of a learner's callbacks: those that make of batches and gradients what training makes of them.
KEPT = (*PREPARING, ClipGradients)


class FindLearningRate(Callback):
    """Raises the learning rate from `min_lr` to `max_lr`, geometrically, to see from which one on the loss rises.

    Ends the fit at `max_steps` steps, or when the loss passes ten times its best or is not finite.

        finder = FindLearningRate()
        Learner(model, train, optimizer=optimizer, callbacks=[finder]).fit(100)  # it ends by itself
        finder.plot().savefig("rates.png")
        finder.suggestion

    After the fit, and after one that failed, all is as it was before: parameters, buffers and modes of the model, the
    optimizer's state and rates, the loss scale, random states, the place in the data. A copy is kept as long.

    Attributes:
        lrs: the learning rate of each step.
        losses: the loss of each step.

    Args:
        max_steps: of the optimizer.
        min_lr: to begin with.
        max_lr: to end with.

    Raises:
        InputError: an argument cannot be used, or a parameter of the model is not made yet.
    """

    order = 1
    _before: "Snapshot | None" = None

    def __init__(self, max_steps: int = 100, min_lr: float = 1e-6, max_lr: float = 10.0):
        check(is_whole(max_steps, 1), "max_steps", max_steps, "a whole number from 1")
        check(is_real(max_lr), "max_lr", max_lr, "a number above min_lr")
        check(is_real(min_lr) and 0 < min_lr < max_lr, "min_lr", min_lr, f"a number above 0 and below max_lr={max_lr}")
        self.max_steps, self.min_lr, self.max_lr = max_steps, min_lr, max_lr
        self.lrs: list[float] = []
        self.losses: list[float] = []

    @property
    def suggestion(self) -> float:
        """The learning rate at which the loss, smoothed over a tenth of the steps, falls fastest.

        Raises:
            InputError: the loss did not fall.
        """
        losses = _smoothed([loss for loss in self.losses if math.isfinite(loss)])
        lowest = int(np.argmin(losses)) if len(losses) else 0
        if lowest == 0:
            raise InputError(
                f"FindLearningRate: the loss did not fall in {len(self.losses)} steps from {self.min_lr:g} to "
                f"{self.max_lr:g}. Fit with it first, with other rates or more steps; see plot()."
            )
        return self.lrs[int(np.argmin(np.gradient(losses[: lowest + 1])))]

    def plot(self) -> "Figure":
        """Loss over learning rate, with the suggestion if there is one."""
        from matplotlib.figure import Figure  # most trainings draw nothing

        figure = Figure(figsize=(7, 4), layout="constrained")
        axis = figure.subplots()
        axis.semilogx(self.lrs, self.losses, color="0.7", label="loss")
        finite = [(lr, loss) for lr, loss in zip(self.lrs, self.losses, strict=True) if math.isfinite(loss)]
        axis.semilogx([lr for lr, _ in finite], _smoothed([loss for _, loss in finite]), label="smoothed")
        try:
            axis.axvline(self.suggestion, color="C1", label=f"suggestion {self.suggestion:.2g}")
        except InputError:  # there is none to draw
            axis.set_title("the loss did not fall")
        axis.set(xlabel="learning rate", ylabel="loss")
        axis.legend()
        return figure

    def begin_fit(self) -> None:
        self._best = float("inf")
        self.lrs, self.losses = [], []
        self._before = Snapshot(self.learner)

    def begin_batch(self) -> None:
        if self.learner.training:
            share = self.learner.step / self.max_steps
            self._lr = self.min_lr * (self.max_lr / self.min_lr) ** share
            for optimizer in self.learner.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = self._lr

    def after_step(self) -> None:
        loss = float(self.learner.loss)
        self.lrs.append(self._lr)
        self.losses.append(loss)
        if self.learner.step >= self.max_steps or not math.isfinite(loss) or loss > 10 * self._best:
            raise CancelTrain
        self._best = min(self._best, loss)

    def after_fit(self) -> None:
        if self._before is not None:  # it is None where the fit failed before this callback began
            self._before.restore()
        self._before = None


def _smoothed(losses: list[float]) -> np.ndarray:
    """Each with its neighbours: the mean of about a tenth of all."""
    if not losses:
        return np.zeros(0)
    beside = max(1, len(losses) // 20)
    window = np.full(2 * beside + 1, 1 / (2 * beside + 1))
    return np.convolve(np.pad(np.asarray(losses), beside, mode="edge"), window, mode="valid")


class Overfit(NamedTuple):
    """How training on one batch went.

    Attributes:
        losses: one a batch.
        falls: whether the mean of the last tenth is below the first by more than a tenth of it.
    """

    losses: list[float]
    falls: bool

    def __str__(self) -> str:
        first, last, verb = self.losses[0], self.losses[-1], "falls" if self.falls else "does not fall"
        advice = "" if self.falls else " Look at the learning rate, at the targets, and at what is frozen."
        return f"The loss of one batch {verb}: {first:.4g} at first, {last:.4g} after {len(self.losses)} steps.{advice}"


def overfit_one_batch(learner: "Learner", steps: int = 100) -> Overfit:
    """Train on the first batch alone, to see whether the loss falls: where it does not, something is wrong.

    Loss, optimizer, precision and accumulation are the learner's. So are those of its callbacks that make batches and
    gradients what they are: `ToDevice`, `ChannelsLast`, `TransformInputs`, `ClipGradients`. Afterwards all is as it was
    before; see `FindLearningRate`.

        print(overfit_one_batch(learner))

    Args:
        learner: with its model, before or after a fit.
        steps: of the optimizer.

    Raises:
        InputError: an argument cannot be used, or there are no batches.
    """
    check(is_whole(steps, 2), "steps", steps, "a whole number from 2")
    snapshot, attributes, losses = Snapshot(learner), dict(vars(learner)), _Losses()
    try:
        batch = next(iter(learner.train), None)
        check(batch is not None, "train", "no batches", "one batch or more")
        learner.train, learner.valid = [batch] * (steps * learner.accumulate), None
        learner.callbacks = [*(one for one in learner.callbacks if isinstance(one, KEPT)), losses]
        learner.fit(1)
    finally:
        vars(learner).update(attributes)
        snapshot.restore()
    first, last = losses.values[0], float(np.mean(losses.values[-max(1, len(losses.values) // 10) :]))
    return Overfit(losses.values, first - last > 0.1 * abs(first))


class _Losses(Callback):
    def begin_fit(self) -> None:
        self.values: list[float] = []

    def after_backward(self) -> None:
        self.values.append(float(self.learner.loss))


class Snapshot:
    """All of a learner that a fit changes, to go back to: its model, optimizers, loss scale, random states, data.

    Raises:
        InputError: a parameter of the model is not made yet.
    """

    def __init__(self, learner: "Learner"):
        model = learner.model
        lazy = [name for name, part in model.named_parameters() if isinstance(part, UninitializedParameter)]
        check(not lazy, "model", ", ".join(lazy), "one whose parameters are all there: run a batch through it first")
        places = [(place, name, part) for place in _places(model) for name, part in place.items() if part is not None]
        self._learner = learner
        self._tensors = [(place, name, part, part.detach().clone()) for place, name, part in places]
        self._modes = [(module, module.training) for module in model.modules()]
        self._optimizers = [
            (
                one,
                {parameter: copy.deepcopy(state) for parameter, state in one.state.items()},
                [copy.deepcopy(_settings(group)) for group in one.param_groups],
            )
            for one in learner.optimizers
        ]
        self._precision = copy.deepcopy(learner.precision)
        self._data = [(getattr(learner, part), copy.deepcopy(data_state(getattr(learner, part)))) for part in PARTS]
        self._random = random_state(learner)

    def restore(self) -> None:
        """Everything as it was."""
        with torch.no_grad():
            for place, name, part, value in self._tensors:
                part.copy_(value)
                place[name] = part
        for module, training in self._modes:
            module.training = training
        for optimizer, state, groups in self._optimizers:
            optimizer.state.clear()
            optimizer.state.update(state)
            for group, settings in zip(optimizer.param_groups, groups, strict=True):
                group.update(settings)
        self._learner.precision = self._precision
        for batches, state in self._data:
            load_data_state(batches, state)
        set_random_state(self._learner, self._random)


def _places(model: nn.Module) -> list[dict[str, Any]]:
    return [place for module in model.modules() for place in (module._parameters, module._buffers)]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}

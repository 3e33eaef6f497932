"""A moving average of the weights, to evaluate and to keep."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..errors import InputError, check, is_real
from .events import Callback


class EMA(Callback):
    """Keeps an exponential moving average of the model's weights, and validates with it.

        w̄ ← decay · w̄ + (1 − decay) · w          after each step of the optimizer; at first w̄ is w

    A step that is left out, as float16 does at an overflow, is not counted. With accumulation a step is counted once.

        ema = EMA(0.999)
        Learner(model, train, valid, optimizer=optimizer, callbacks=[ema, Metrics()]).fit(10)
        ema.model  # the average; the model itself is as it was trained

    Statistics of norms: with "average" all buffers that are numbers with a fraction are averaged as the weights are,
    and the others, such as `num_batches_tracked`, are those of the model. What was averaged are the statistics of other
    weights, which is close when weights move slowly. A function measures them anew, of the average itself, before each
    validation and at the end:

        EMA(0.999, statistics=lambda model: normlab.recalibrate(model, batches))

    `model` is in evaluation mode. It is what `Metrics` sees of a validation, and what `SaveBest` saves.

    Args:
        decay: the weight of the past, from 0 to below 1; 0.999 looks back on about 1,000 steps.
        statistics: "average", or a function of the model that sets its buffers.
        validate: with the average; else with the model itself.

    Raises:
        InputError: an argument cannot be used; in `fit`, a parameter of the model is not made yet.

    Source: torch.optim.swa_utils.
    """

    # In after_epoch after what saves the model that was validated, before what saves the one that is trained.
    order = 20

    def __init__(
        self,
        decay: float = 0.999,
        statistics: str | Callable[[nn.Module], Any] = "average",
        validate: bool = True,
    ):
        check(is_real(decay) and 0 <= decay < 1, "decay", decay, "a number from 0, below 1")
        fits = statistics == "average" or (callable(statistics) and not isinstance(statistics, type))
        check(fits, "statistics", statistics, "'average', or a function of the model that measures them")
        self.decay, self.statistics, self.validate = decay, statistics, validate
        self.average: AveragedModel | None = None

    @property
    def model(self) -> nn.Module:
        """The averaged model.

        Raises:
            InputError: there was no fit yet.
        """
        if self.average is None:
            raise InputError("EMA: there is no average before a fit. Call it after learner.fit().")
        return self.average.module

    def begin_fit(self) -> None:
        model = self.learner.model
        lazy = [name for name, part in model.named_parameters() if is_lazy(part)]
        check(not lazy, "model", ", ".join(lazy), "one whose parameters are all there: run a batch through it first")
        averaged = self.statistics == "average"
        self.average = AveragedModel(model, multi_avg_fn=_averaging(self.decay), use_buffers=averaged)
        self.average.requires_grad_(False).eval()
        self._trained: nn.Module | None = None
        self._ended = False

    def after_step(self) -> None:
        self._average().update_parameters(self.learner.model)

    def begin_validate(self) -> None:
        if self.validate:
            self._measure()
            self.learner.ranks.average(self.model)
            self._trained, self.learner.model = self.learner.model, self.model

    def after_epoch(self) -> None:
        self._put_back()
        self.learner.ranks.average(self.model)
        self._ended = self.learner.epoch + 1 == self.learner.num_epochs

    def after_cancel_train(self) -> None:
        self._ended = True

    def after_fit(self) -> None:
        if self.average is not None:
            self._put_back()
            self._measure()
            if self._ended:  # else one process may have failed, and the others are not here
                self.learner.ranks.average(self.model)

    def state_dict(self) -> dict[str, Any]:
        """The average, with buffers that no state has, too."""
        return {"average": self._tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        with torch.no_grad():
            for own, part in zip(self._tensors(), state["average"], strict=True):
                own.copy_(part)

    def _average(self) -> AveragedModel:
        assert self.average is not None, "after begin_fit"
        return self.average

    def _tensors(self) -> list[Tensor]:
        average = self._average()
        return [*average.parameters(), *average.buffers()]

    def _measure(self) -> None:
        if callable(self.statistics):
            self.statistics(self.model)

    def _put_back(self) -> None:
        if self._trained is not None:
            self.learner.model, self._trained = self._trained, None


def _averaging(decay: float) -> Callable[..., None]:
    """What moves averages towards tensors of the same type; counters, whose mean is that of nothing, are copied."""
    move = get_ema_multi_avg_fn(decay)

    def average(averages: Any, parts: Any, count: Any) -> None:
        if parts[0].is_floating_point() or parts[0].is_complex():
            move(averages, parts, count)
        else:
            for own, part in zip(averages, parts, strict=True):
                own.copy_(part)

    return average

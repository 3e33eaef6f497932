"""The callbacks that training usually wants: metrics, records, schedules, devices."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map_only

from ..errors import InputError, check, check_no_class, is_real, unknown
from .batches import call_each, count_samples
from .events import Callback
from .metrics import SampleMean, mean_of
from .schedules import Schedule, check_schedule


class Metrics(Callback):
    """Adds a dict an epoch to `learner.history`: its number (from 1), seconds, and the figures of both parts.

    `{"epoch": 1, "train": {"loss": …, "accuracy": …}, "valid": {…}, "seconds": …}`, every figure a mean over samples.

    Args:
        **metrics: by name. A function of output and targets gives a figure of the batch, or one of each sample, where
            NaN is left out; see `mean_over_samples` for fast ones. An object as those of torchmetrics (`update`,
            `compute`, `reset`) or MONAI (called, `aggregate`, `reset`) adds up the batches itself.

    Raises:
        InputError: a metric is no function, cannot take the model's output, or gives no single figure.
    """

    def __init__(self, **metrics: Any):
        for name, metric in metrics.items():
            fits = callable(metric) and not isinstance(metric, type)
            check(fits, f"Metrics({name}=…): metric", metric, "a function of output and targets")
        check("loss" not in metrics, "Metrics: name", "loss", "any other; the loss is always there")
        self.metrics = metrics

    def begin_fit(self) -> None:
        self._row: dict[str, Any] = {}

    def begin_epoch(self) -> None:
        self._begin_row()

    def begin_validate(self) -> None:
        self._begin_row()
        self._end_part()
        self._begin_part("valid")

    def _begin_row(self) -> None:
        """The row of this epoch; another callback may have ended the epoch before this one heard that it began."""
        if self._row.get("epoch") != self.learner.epoch + 1:
            self._start = time.perf_counter()
            self._row = {"epoch": self.learner.epoch + 1}
            self._begin_part("train")

    def after_loss(self) -> None:
        if not self.learner.training:
            self._count_batch()

    def after_backward(self) -> None:
        self._count_batch()  # not before: now loss and output hold no graph

    def _count_batch(self) -> None:
        learner = self.learner
        samples = count_samples(learner.inputs, learner.targets)
        self._loss.add(learner.loss, samples)
        for mean in self._means:
            mean.add(learner.output, learner.targets, samples)

    def after_epoch(self) -> None:
        self._begin_row()
        self._end_part()
        seconds, processes = self.learner.ranks.sum(time.perf_counter() - self._start, 1)
        self.learner.history.append({**self._row, "seconds": seconds / processes})
        self._row = {}

    def state_dict(self) -> dict[str, Any]:
        """The figures of an epoch that is not over."""
        if not self._row:
            return {}
        return {
            "row": self._row,
            "part": self._part,
            "seconds": time.perf_counter() - self._start,
            "loss": self._loss.state_dict(),
            "means": [mean.state_dict() for mean in self._means],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if state:
            self._begin_part(state["part"])
            self._row, self._start = state["row"], time.perf_counter() - state["seconds"]
            self._loss.load_state_dict(state["loss"])
            for mean, saved in zip(self._means, state["means"], strict=True):
                mean.load_state_dict(saved)

    def _begin_part(self, part: str) -> None:
        self._part, self._loss = part, SampleMean()
        self._means = [mean_of(metric, name) for name, metric in self.metrics.items()]

    def _end_part(self) -> None:
        total = self.learner.ranks.sum
        figures = {name: mean.value(total) for name, mean in zip(self.metrics, self._means, strict=True)}
        self._row[self._part] = {"loss": self._loss.value(total), **figures}


class Recorder(Callback):
    """Keeps the loss of every training batch and every group's learning rate at it.

    Attributes:
        lrs: a list for each parameter group.
    """

    def begin_fit(self) -> None:
        self.lrs: list[list[float]] = [[] for _ in self.learner.optimizer.param_groups]
        self._losses: list[float] = []
        self._fresh: list[Tensor] = []

    def after_backward(self) -> None:
        for lrs, group in zip(self.lrs, self.learner.optimizer.param_groups, strict=True):
            lrs.append(group["lr"])
        self._fresh.append(self.learner.loss)
        if len(self._fresh) == 256:
            self._losses += torch.stack(self._fresh).tolist()
            self._fresh = []

    def state_dict(self) -> dict[str, Any]:
        """What was recorded."""
        return {"lrs": self.lrs, "losses": self._losses, "fresh": self._fresh}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.lrs, self._losses, self._fresh = state["lrs"], state["losses"], state["fresh"]

    @property
    def losses(self) -> list[float]:
        """One a training batch."""
        return self._losses + [loss.item() for loss in self._fresh]


class ScheduleParameter(Callback):
    """Sets a hyper-parameter of the optimizer before each training batch, from the position in the whole fit.

    Args:
        name: of the hyper-parameter, as in the optimizer's groups: `lr`, `momentum`, `weight_decay`.
        schedule: a function of the position 0..1, or one for each parameter group.

    Raises:
        InputError: a schedule is no function of one position; in `fit`, the optimizer has no such hyper-parameter, or
            other groups than schedules.
    """

    order = 1

    def __init__(self, name: str, schedule: Schedule | Sequence[Schedule]):
        check(isinstance(name, str), "ScheduleParameter: name", name, "a name such as 'lr'")
        where = f"ScheduleParameter({name!r}): schedule"
        for one in schedule if isinstance(schedule, list | tuple) else [schedule]:
            check_schedule(where, one)
        self.parameter, self.schedule = name, schedule

    def begin_fit(self) -> None:
        groups = self.learner.optimizer.param_groups
        schedules = [self.schedule] * len(groups) if callable(self.schedule) else list(self.schedule)
        check(len(schedules) == len(groups), "schedule", f"{len(schedules)} schedules", f"one, or {len(groups)}")
        if self.parameter not in groups[0]:
            raise unknown("name", self.parameter, [name for name in groups[0] if name != "params"])
        self._scheduled = list(zip(groups, schedules, strict=True))

    def begin_batch(self) -> None:
        learner = self.learner
        if not learner.training:
            return
        if learner.num_batches is None:
            raise InputError(
                "train has no length, so a schedule cannot know its position. Accepted: batches with len()."
            )
        position = learner.position / learner.num_epochs
        for group, schedule in self._scheduled:
            value = schedule(position)
            if value is None or callable(value):
                where = f"ScheduleParameter({self.parameter!r}): schedule's result"
                check(False, where, value, "a value, as schedules.constant(0.1) gives at each position")
            group[self.parameter] = value


class ToDevice(Callback):
    """Moves the model at the beginning, and each batch, to a device; also what is in tuples, lists and dicts."""

    def __init__(self, device: torch.device | str):
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            check(device != "gpu", "device", device, "'cuda', 'cuda:1', 'mps', 'cpu'", "Write 'cuda'.")
            raise InputError(f"device={device!r} is not usable. Accepted: 'cpu', 'cuda', 'cuda:1', 'mps'.") from error

    def begin_fit(self) -> None:
        self.learner.model.to(self.device)

    def begin_batch(self) -> None:
        learner = self.learner
        learner.inputs = call_each(learner.inputs, "to", self.device, non_blocking=True)
        learner.targets = call_each(learner.targets, "to", self.device, non_blocking=True)


class ChannelsLast(Callback):
    """Lays images out with the channels last, in the model at the beginning and in the inputs of each batch.

    Convolutions are then faster on many devices. It concerns tensors (N, C, H, W) and (N, C, D, H, W); their values
    and shapes stay.
    """

    order = 3  # after what changes the inputs

    def begin_fit(self) -> None:
        for part in self.learner.model.parameters():
            if not is_lazy(part):
                part.data = _channels_last(part.data)

    def begin_batch(self) -> None:
        self.learner.inputs = tree_map_only(Tensor, _channels_last, self.learner.inputs)


def _channels_last(part: Tensor) -> Tensor:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(part.dim())
    return part if layout is None else part.contiguous(memory_format=layout)


class TransformInputs(Callback):
    """Replaces the inputs of each batch by a function of them."""

    order = 2

    def __init__(self, transform: Callable[[Any], Any]):
        check_no_class("TransformInputs: transform", transform)
        check(callable(transform), "TransformInputs: transform", transform, "a function of the inputs")
        self.transform = transform

    def begin_batch(self) -> None:
        self.learner.inputs = self.transform(self.learner.inputs)


class ClipGradients(Callback):
    """Scales the whole gradient down to the norm `max_norm` where it is larger."""

    def __init__(self, max_norm: float):
        check(is_real(max_norm) and max_norm > 0, "max_norm", max_norm, "a number above 0")
        self.max_norm = max_norm

    def begin_step(self) -> None:
        nn.utils.clip_grad_norm_(self.learner.model.parameters(), self.max_norm)


# What makes of a batch that which the model is given.
PREPARING = (ToDevice, ChannelsLast, TransformInputs)

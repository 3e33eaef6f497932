"""Several processes that train one model: each takes its part of every batch, and all make the same steps."""

import atexit
import os
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import check, is_real
from .batches import call_each, count_samples
from .checks import needs_closure
from .events import Callback
from .shards import Shard

if TYPE_CHECKING:
    from .learner import Learner

# What of a learner's state is of one process alone.
OWN = ("buffers", "gradients", "precision", "callbacks", "data", "random", "random_before")
# These refuse an empty batch in training.
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Ranks:
    """The processes that train one model together: here one alone.

    Attributes:
        rank: the number of this process.
        count: of processes.
        weight: of this process's gradient in the mean of all.
    """

    rank, count = 0, 1
    weight: float = 1

    def part(self, batches: Iterable[Any]) -> Any:
        """The batches, of each the part of this process."""
        return batches

    def called(self, learner: "Learner") -> nn.Module:
        """The learner's model, as it is called for a batch."""
        return learner.model

    def count_samples(self, inputs: Any, targets: Any) -> int:
        """How many samples the batch of all processes has."""
        return count_samples(inputs, targets)

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over the processes."""
        return list(values)

    def state_of(self, learner: "Learner") -> dict[str, Any]:
        """The learner's state, of all processes; it is whole on the first one."""
        return learner.state_dict()

    def average(self, model: nn.Module) -> None:
        """Makes the model's buffers the means over the processes; of whole numbers the largest."""

    def end(self) -> None:
        """After a fit: nothing is left at the model."""

    def own_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """What of a saved state this process goes on from.

        Raises:
            InputError: it is from within an epoch, of another number of processes.
        """
        ranks = state.get("ranks", [{}])
        if len(ranks) == self.count:
            return {**state, **ranks[self.rank]}
        cure = "The state at the end of an epoch goes on with any number."
        check(not state["batches"], "processes", self.count, f"{len(ranks)}, as in the saved state", cure)
        return state


class _Several(Ranks):
    def __init__(self, find_unused: bool):
        self.rank, self.count, self.find_unused = dist.get_rank(), dist.get_world_size(), find_unused
        self._shards: dict[int, tuple[Any, Shard]] = {}  # with what is cut, so that no other can have its id
        self._trained: list[int] = []
        self._parallel: Any = None
        self._resting: list[nn.Module] = []

    def part(self, batches: Iterable[Any]) -> Shard:
        if id(batches) not in self._shards:
            self._shards[id(batches)] = batches, Shard(batches, self.rank, self.count)
        self.now = self._shards[id(batches)][1]
        return self.now

    @property
    def weight(self) -> float:
        """Gradients are averaged over processes, while each sample shall count the same."""
        return self.count * self.now.own / self.now.total

    def count_samples(self, inputs: Any, targets: Any) -> int:
        return self.now.total

    def called(self, learner: "Learner") -> nn.Module:
        if not learner.training:
            return learner.model
        trained = [id(part) for part in learner.model.parameters() if part.requires_grad]
        if trained != self._trained:  # at first, and when others are frozen
            self._trained = trained
            with warnings.catch_warnings():  # newer versions have another name for `broadcast_buffers`
                warnings.simplefilter("ignore", FutureWarning)
                # Not from the first process at each batch: what the others' norms saw would be lost.
                self._parallel = DistributedDataParallel(
                    learner.model, broadcast_buffers=False, find_unused_parameters=self.find_unused
                )
        self._parallel.require_backward_grad_sync = learner.gradients.are_due(learner) or learner.num_batches is None
        self._rest(learner.model)
        return self._parallel

    def _rest(self, model: nn.Module) -> None:
        for norm in self._resting:
            norm.train()
        empty = self.now.own == 0
        self._resting = [one for one in model.modules() if isinstance(one, NORMS) and one.training] if empty else []
        for norm in self._resting:
            norm.eval()

    def sum(self, *values: float) -> list[float]:
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def average(self, model: nn.Module) -> None:
        buffers = list(model.buffers())
        for buffer, average in zip(buffers, _averages(buffers), strict=True):
            buffer.copy_(average)

    def end(self) -> None:
        self._trained, self._parallel = [], None

    def mean_loss(self, loss: Tensor) -> Tensor:
        """The mean over the samples of all processes, of each one's mean."""
        part = self.now.own / self.now.total
        total = loss.detach().double() * part if part else torch.zeros_like(loss, dtype=torch.float64)
        dist.all_reduce(total)
        return total.to(loss.dtype)

    def state_of(self, learner: "Learner") -> dict[str, Any]:
        state = learner.state_dict()
        buffers = dict(learner.model.named_buffers())
        own = {**{name: state[name] for name in OWN}, "buffers": buffers}
        ranks = [None] * self.count if self.rank == 0 else None
        dist.gather_object(call_each(own, "cpu"), ranks)
        saved = {name: part for name, part in buffers.items() if name in state["model"]}
        averages = dict(zip(saved, _averages(list(saved.values())), strict=True))
        return {**state, "model": {**state["model"], **averages}, "ranks": ranks}

    def own_state(self, state: dict[str, Any]) -> dict[str, Any]:
        same = len(state.get("ranks", [{}])) == self.count
        state = super().own_state(state)
        return state if same or self.rank == 0 else {**state, "random": None}


ALONE = Ranks()


class Distributed(Callback):
    """Trains in all processes that `torchrun` started: `torchrun --nproc-per-node 4 script.py`.

    The script is the same for one process, where this callback does nothing. Each process has a GPU, or all share the
    CPU. A batch is that of all processes: each takes its part, the last batch too, and a part may be empty. So samples,
    loss, gradients and figures do not depend on the number of processes, if the loss is a mean over samples. Each
    process has random numbers of its own, but for the order of the samples.

    The learner's model stays as it is, while `DistributedDataParallel` calls it. Norms see the part of their process
    alone, unless they synchronise, see `surgery.sync`. Their statistics are averaged over the processes after the
    training batches of each epoch, and in checkpoints: then they are the same everywhere. Counts stay.

    `learner.loss` becomes that of the whole batch after `after_loss` in validation, and `after_backward` in training.
    Callbacks run in every process, and each has to do the same, such as to end the fit. What only one should do, it
    does where `learner.ranks.rank == 0`.

    Args:
        timeout: seconds that a process waits for another that is alive.
        find_unused: of `DistributedDataParallel`: parameters may have no gradient.

    Raises:
        InputError: the learner compiles, or `step_func` or the optimizer make the steps by themselves.
    """

    order = -200  # before others that speak to the other processes

    def __init__(self, timeout: float = 300, find_unused: bool = False):
        check(is_real(timeout) and timeout > 0, "timeout", timeout, "seconds above 0")
        self.timeout, self.find_unused = timeout, find_unused

    def begin_fit(self) -> None:
        learner = self.learner
        if "WORLD_SIZE" not in os.environ and not dist.is_initialized():
            return
        check(learner._compiled is None, "compile", True, "False in several processes")
        one = bool(learner._stepped) and not needs_closure(learner.optimizer)
        check(one, "optimizer", learner.optimizer, "one that needs no closure, in several processes")
        if not dist.is_initialized():
            _meet(self.timeout)
        learner.ranks = _Several(self.find_unused)
        for buffer in learner.model.buffers():
            dist.broadcast(buffer, 0)
        _draw_others(learner.ranks.rank)

    def begin_epoch(self) -> None:
        learner = self.learner
        total = learner.ranks.sum(learner.step)[0]
        same = total == learner.step * learner.ranks.count
        cure = "Each has to resume from the same checkpoint."
        check(same, "step", learner.step, "that of the other processes", cure)

    def begin_validate(self) -> None:
        self._average()

    def after_epoch(self) -> None:
        self._average()  # for those without validation

    def after_backward(self) -> None:
        self._reduce_loss()

    def after_loss(self) -> None:
        if not self.learner.training:
            self._reduce_loss()

    def after_fit(self) -> None:
        self.learner.ranks.end()

    def _average(self) -> None:
        self.learner.ranks.average(self.learner.model)

    def _reduce_loss(self) -> None:
        if isinstance(self.learner.ranks, _Several):
            self.learner.loss = self.learner.ranks.mean_loss(self.learner.loss)


def _averages(buffers: list[Tensor]) -> list[Tensor]:
    """The means over the processes, of whole numbers the largest; one message for all that are alike."""
    averages = list(buffers)
    alike: dict[Any, list[int]] = defaultdict(list)
    for place, buffer in enumerate(buffers):
        alike[buffer.is_floating_point(), buffer.device].append(place)
    for (real, _), places in alike.items():
        parts = [buffers[place].detach().to(torch.float64 if real else torch.int64).flatten() for place in places]
        together = torch.cat(parts)
        dist.all_reduce(together, dist.ReduceOp.SUM if real else dist.ReduceOp.MAX)
        together = together / dist.get_world_size() if real else together
        for place, part in zip(places, together.split([len(part) for part in parts]), strict=True):
            averages[place] = part.view_as(buffers[place]).to(buffers[place].dtype)
    return averages


def _meet(timeout: float) -> None:
    """With the processes that were started together, each with a GPU of its own if there are enough."""
    place, here = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_gpu = torch.cuda.device_count() >= here
    if on_gpu:
        torch.cuda.set_device(place)
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    atexit.register(_leave)


def _leave() -> None:
    failed = hasattr(sys, "last_value")  # then the others may wait for ever, and this shall end them
    if dist.is_initialized() and not failed:
        dist.destroy_process_group()


def _draw_others(rank: int) -> None:
    """Random numbers that are not those of the first process, from the same seeds."""
    if rank:
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
        random.seed(random.getrandbits(62) + rank)
        np.random.seed((np.random.randint(2**31) + rank) % 2**32)

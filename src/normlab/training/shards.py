"""The part of each batch that one of several processes takes; which samples are in a batch does not depend on it."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from ..errors import InputError, check
from .batches import count_samples, split_batch


class Shard:
    """Batches of which this process takes its part, of N samples those from ⌊rN/R⌋ to ⌊(r+1)N/R⌋; it may be empty.

    A DataLoader loads this part alone. Of other batches each process draws the whole, and cuts it.

    Args:
        batches: those of all processes together: the same on each.
        rank: r, the number of this process.
        count: R, the number of processes.

    Attributes:
        own: samples in this process's part of the newest batch.
        total: samples in that batch.

    Raises:
        InputError: the batches are those of one process already.
    """

    def __init__(self, batches: Iterable[Any], rank: int, count: int):
        cut = isinstance(getattr(batches, "sampler", None), DistributedSampler)
        check(not cut, "sampler", "DistributedSampler", "any other", "Distributed gives each process its part.")
        self.batches: Any = batches
        self.rank, self.count = rank, count
        self.own, self.total = 0, 0
        self._parts: _Parts | None = None
        if _can_load_parts(batches):
            self._parts = _Parts(self.batches.batch_sampler, rank, count)
            self.batches = _with_sampler(batches, self._parts)

    def __len__(self) -> int:
        return len(self.batches)

    def __getattr__(self, name: str) -> Any:  # state_dict, where the batches keep their place
        if name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __iter__(self) -> Iterator[Any]:
        return self._cut(iter(self.batches))

    def _cut(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            if self._parts is None:
                self.total = samples = _samples(batch)
                part = part_of(samples, self.rank, self.count)
                self.own = part.stop - part.start
            else:
                self.own, self.total = self._parts.sizes.popleft()
                part, samples = slice(0, self.own), max(self.own, 1)
            yield batch if self.own == samples else _take(batch, part, samples)


def part_of(samples: int, rank: int, count: int) -> slice:
    """The samples of a batch that a process takes."""
    return slice(samples * rank // count, samples * (rank + 1) // count)


class _Parts:
    """A batch sampler: of each batch of indices the part of one process, or a single one to be left out again."""

    def __init__(self, batches: Any, rank: int, count: int):
        self.batches, self.rank, self.count = batches, rank, count
        self.sizes: deque[tuple[int, int]] = deque()

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes.clear()
        for indices in self._drawn_by_the_first():
            part = part_of(len(indices), self.rank, self.count)
            self.sizes.append((part.stop - part.start, len(indices)))
            yield indices[part] or indices[:1]

    def _drawn_by_the_first(self) -> Iterator[list[int]]:
        """Every process draws the order from the random state of the first one, and goes on with its own."""
        own = torch.get_rng_state()
        state = own.clone()
        dist.broadcast(state, 0)
        torch.set_rng_state(state)
        batches = iter(self.batches)
        first = next(batches, None)  # samplers draw now
        if self.rank:
            torch.set_rng_state(own)
        if first is not None:
            yield list(first)
            yield from map(list, batches)


def _can_load_parts(batches: Any) -> bool:
    """Not those that keep their place in the data: they count their own batches."""
    known = isinstance(batches, DataLoader) and not isinstance(batches.dataset, IterableDataset)
    return known and batches.batch_sampler is not None and not hasattr(batches, "state_dict")


def _with_sampler(loader: Any, sampler: _Parts) -> Any:
    """A copy, whatever its class: it is not asked how it is made."""
    copied = object.__new__(type(loader))
    copied.__dict__.update(loader.__dict__, batch_sampler=sampler, _iterator=None)
    return copied


def _samples(batch: Any) -> int:
    try:
        return count_samples(*split_batch(batch))
    except InputError:  # of a step_func
        first = next(_tensors(batch), None)
        check(first is not None, "batches", type(batch).__name__, "one with a tensor (N, …), to be cut in parts")
        return len(first)  # pyright: ignore[reportArgumentType]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield from [value] if value.dim() else []
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


def _take(value: Any, part: slice, samples: int, whole: bool = True) -> Any:
    """Of everything in a batch that has so many samples, a part; `whole` says that a list is the batch itself."""
    if isinstance(value, Tensor):
        return value[part] if value.dim() and len(value) == samples else value
    if isinstance(value, tuple | list):
        holds_samples = any(len(tensor) == samples for tensor in _tensors(value))
        if len(value) == samples and not whole and not holds_samples:  # such as names of files
            return value[part]
        parts = [_take(one, part, samples, whole=False) for one in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        new: Any = copy.copy(value)
        for key in value:
            new[key] = _take(value[key], part, samples, whole=False)
        return new
    if is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in fields(value):
            object.__setattr__(new, field.name, _take(getattr(value, field.name), part, samples, whole=False))
        return new
    return value

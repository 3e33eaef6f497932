"""Batches of tensors held in memory: cheap at batch size 2, and resumed in the middle of an epoch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import check

# Shuffled samples gathered in one call: many small batches, and few enough to stay in the cache.
BLOCK = 512


@dataclass(frozen=True, eq=False)
class TensorPairs:
    """Samples and their targets, indexed together by a number, a slice, a list or a tensor.

    Raises:
        InputError: `x` and `y` differ in length.
    """

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        check(len(self.x) == len(self.y), "len(y)", len(self.y), f"{len(self.x)}, the length of x")

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class TensorBatches:
    """Batches `(x, y)` of samples in memory; each `for` over it is one epoch, and sees every sample once.

    The order of the samples depends on `seed` and on the number of epochs begun. It depends neither on the device nor
    on other uses of random numbers. Batches are views, and views of the data itself when not shuffled: do not change
    them in place.

    Args:
        x: samples, [N, ...].
        y: targets, [N, ...].
        batch_size: samples a batch; the last batch holds what is left.
        shuffle: a new order each epoch.
        drop_last: leave out a last batch that is not full. With `shuffle`, other samples are left out each epoch.
        seed: of the order.
        device: where the data is moved to and cut into batches; where `x` lies if None.

    Attributes:
        dataset: the `TensorPairs`.
        batch_size: as given.
        shuffle: as given.
        num_samples: samples in an epoch: N, less what `drop_last` leaves out.

    Raises:
        InputError: `x` and `y` differ in length, or `batch_size` is not between 1 and N.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        device = x.device if device is None else device
        self.dataset = TensorPairs(x.to(device), y.to(device))
        check(len(x) > 0, "len(x)", len(x), "1 or more samples")
        check(1 <= batch_size <= len(x), "batch_size", batch_size, f"1 to {len(x)}, the number of samples")
        self.batch_size = batch_size
        self.num_samples = len(x) // batch_size * batch_size if drop_last else len(x)
        self.shuffle = shuffle
        self._generator = torch.Generator().manual_seed(seed)
        self._epoch_start = self._generator.get_state()
        self._delivered = 0  # batches of the running epoch
        self._skip = 0  # batches of the next epoch that were delivered before its state was saved

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._epoch_start = self._generator.get_state()
        self._delivered, self._skip = self._skip, 0
        order = torch.randperm(len(self.dataset), generator=self._generator) if self.shuffle else None
        return self._rest_of_epoch(order)

    def state_dict(self) -> dict[str, Any]:
        """The place in the running epoch and the state that its order came from.

        Between two epochs this is the start of the next one.
        """
        return {
            "generator": self._epoch_start,
            "delivered": self._delivered,
            "batch_size": self.batch_size,
            "shuffle": self.shuffle,
            "num_samples": self.num_samples,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place: the next `for` delivers the batches that were left, those after it whole epochs.

        Raises:
            InputError: the state was saved with other data or other settings.
        """
        for name in ("batch_size", "shuffle", "num_samples"):
            saved, own = state[name], getattr(self, name)
            check(saved == own, name, own, f"{saved}, as in the saved state")
        self._generator.set_state(state["generator"].cpu())  # it may have been loaded to another device
        self._epoch_start = self._generator.get_state()
        self._delivered = self._skip = int(state["delivered"])

    def _rest_of_epoch(self, order: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.batch_size
        block = max(1, BLOCK // size) * size
        for start in range(self._delivered * size, self.num_samples, block):
            x, y = self._gather(order, slice(start, min(start + block, self.num_samples)))
            for batch in zip(x.split(size), y.split(size), strict=True):
                self._delivered += 1
                yield batch
        self._epoch_start = self._generator.get_state()
        self._delivered = 0

    def _gather(self, order: Tensor | None, block: slice) -> tuple[Tensor, Tensor]:
        x, y = self.dataset.x, self.dataset.y
        if order is None:
            return x[block], y[block]
        index = order[block].to(x.device)
        return x.index_select(0, index), y.index_select(0, index)  # half the time of x[index]

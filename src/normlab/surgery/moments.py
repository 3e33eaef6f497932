"""Mean and variance of each channel over many batches, without keeping them."""

import torch
from torch import Tensor


class Moments:
    """Of each channel of the (N, C, *space) that were added, in float64.

    Args:
        kind: what a norm keeps of them, see `probe.statistics_kind`.

    Attributes:
        count: values; of `kind` "images", images.
        mean: (C,).
        squares: (C,), the sum of squared distances from the mean.
        batches: that had values.
    """

    def __init__(self, kind: str = "pooled") -> None:
        self.kind = kind
        self.count, self.mean, self.squares, self.batches = 0, torch.zeros(()), torch.zeros(()), 0
        self._own = torch.zeros(())  # the sum of the images' own variances

    @property
    def var(self) -> Tensor:
        """(C,), the biased variance."""
        return self.squares / max(self.count, 1)

    @property
    def deviation(self) -> Tensor:
        """Of all values of all channels together, 0-d, biased."""
        between = (self.mean - self.mean.mean()).square() * self.count
        return ((self.squares + between).sum() / max(self.count * self.mean.numel(), 1)).sqrt()

    def as_kept(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, (C,) each, as a norm of this kind keeps them."""
        if self.kind == "images":
            return self.mean, self._own / max(self.count, 1)
        if self.kind == "squares":
            return torch.zeros_like(self.mean), self.var + self.mean**2
        return self.mean, self.squares / max(self.count - 1, 1)

    def add(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor] | None:
        """Adds a batch; returns its own means and biased variances, or None if it is empty.

        Args:
            x: (N, C, *space).
            mask: (N, *space), true where a value counts.
        """
        values = x.detach().double()
        if self.kind == "images":
            return self._add_images(values, mask)
        values = values.transpose(0, 1)
        return self._add(values.flatten(1) if mask is None else values[:, mask])

    def _add(self, values: Tensor) -> tuple[Tensor, Tensor] | None:
        count = values.shape[1]
        if count == 0:
            return None
        var, mean = torch.var_mean(values, 1, correction=0)
        total = self.count + count
        distance = mean - self.mean.to(mean)
        self.squares = self.squares.to(mean) + var * count + distance**2 * (self.count * count / total)
        self.mean = self.mean.to(mean) + distance * (count / total)
        self.count, self.batches = total, self.batches + 1
        return mean, var

    def _add_images(self, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The means of the images are the values, and their own variances are added up."""
        images = [image.flatten(1) if mask is None else image[:, mask[n]] for n, image in enumerate(values)]
        images = [image for image in images if image.shape[1] > 0]
        if not images:
            return None
        for image in images:
            own = image.var(1, correction=min(1, image.shape[1] - 1))
            self._own = self._own.to(own) + own
        return self._add(torch.stack([image.mean(1) for image in images], 1))

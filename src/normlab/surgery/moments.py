"""Mean and variance of each channel over many batches, without keeping them."""

import torch
from torch import Tensor


class Moments:
    """Of each channel of the (N, C, *space) that were added, in float64.

    Attributes:
        count: values.
        mean: (C,).
        squares: (C,), the sum of squared distances from the mean.
        batches: that had values.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.squares, self.batches = 0, torch.zeros(()), torch.zeros(()), 0

    @property
    def var(self) -> Tensor:
        """(C,), the biased variance."""
        return self.squares / max(self.count, 1)

    def add(self, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Adds a batch; returns its own means and biased variances, or None if it is empty."""
        values = x.detach().double().transpose(0, 1).flatten(1)
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

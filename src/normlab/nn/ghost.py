"""Ghost batch norm: batch norm of a large batch as if it came in several small ones."""

import torch
from torch import Tensor

from ..errors import check
from . import functional as F
from .base import RunningStatistics, averaged
from .registry import register


class GhostBatchNorm(RunningStatistics):
    """Ghost batch norm of (N, C, *space); see `GhostBatchNorm2d`."""

    averages, needs_statistics = True, False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        virtual_batch_size: int = 32,
        *,
        bias: bool = True,
    ):
        check(virtual_batch_size >= 1, "virtual_batch_size", virtual_batch_size, "a whole number from 1")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.virtual_batch_size = virtual_batch_size

    def in_training(self, x: Tensor, mask: Tensor | None) -> Tensor:
        kept = self.running_mean, self.running_var
        y, statistics = ghost_batch_norm(x, self.virtual_batch_size, self.weight, self.bias, self.eps, mask, kept)
        if self.running_mean is not None:
            self._remember(statistics)
        return y

    @torch.no_grad()
    def _remember(self, statistics: list[tuple[Tensor, Tensor, int | Tensor]]) -> None:
        kept, batches = (self.running_mean, self.running_var), self.num_batches_tracked
        entered = False
        for part, (mean, var, n) in enumerate(statistics):
            share = self.momentum
            if share is None:  # as if each part had been a batch
                share = (batches * len(statistics) + part + 1).reciprocal()
            kept = averaged(kept, (mean, var), n, share)
            entered = entered | (n > 0)
        self._keep((self.running_mean, kept[0]), (self.running_var, kept[1]), (batches, batches + entered))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class GhostBatchNorm1d(GhostBatchNorm):
    """Ghost batch norm of (N, C) or (N, C, L); see `GhostBatchNorm2d`.

    Example:
        >>> GhostBatchNorm1d(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class GhostBatchNorm2d(GhostBatchNorm):
    """Ghost batch norm of (N, C, H, W): y = γ (x − μ_B) / √(σ_B² + eps) + β, per channel and virtual batch B.

    In training the batch is cut, in order, into virtual batches of `virtual_batch_size` images; the last one holds
    what is left. μ_B and σ_B² are the mean and the biased variance of the image's own virtual batch, and the gradient
    flows through them. The running statistics take in the virtual batches one after another, each with the weight
    `momentum` and its unbiased variance:

        μ ← (1 − momentum) μ + momentum μ_B        σ² ← (1 − momentum) σ² + momentum σ_B² n_B/(n_B − 1)

    In evaluation μ and σ² take the place of μ_B and σ_B². A batch no larger than `virtual_batch_size` is batch norm.
    A virtual batch of one value a channel gives y = β and moves μ alone.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new virtual batch in the running statistics, above 0, to 1.
        affine: learn γ and β.
        track_running_stats: keep statistics; without, evaluation is as training.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        virtual_batch_size: images in a virtual batch.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> norm = GhostBatchNorm2d(4, virtual_batch_size=8)
        >>> x = torch.randn(16, 4, 5, 5)
        >>> torch.equal(norm(x)[:8], norm(x[:8]))  # as if each eight images came by themselves
        True

    Source: Hoffer, Hubara and Soudry 2017, "Train longer, generalize better", algorithm 1. Its running statistics
    too take in the virtual batches one after another, but σ_B in the place of σ_B².
    """

    accepted_dims = (4,)


class GhostBatchNorm3d(GhostBatchNorm):
    """Ghost batch norm of (N, C, D, H, W); see `GhostBatchNorm2d`.

    Example:
        >>> GhostBatchNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


def ghost_batch_norm(
    x: Tensor,
    virtual_batch_size: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mask: Tensor | None = None,
    kept: tuple[Tensor | None, Tensor | None] = (None, None),
) -> tuple[Tensor, list[tuple[Tensor, Tensor, int | Tensor]]]:
    """Batch norm of each virtual batch: `virtual_batch_size` images of `x` in order, the last one what is left.

    Args:
        x: (N, C, *space).
        virtual_batch_size: images.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        eps: added to the variance.
        mask: (N, 1, *space), True where a value counts; None for all.
        kept: mean and variance for a virtual batch in which none counts; None for 0 and 1.

    Returns:
        y and, per virtual batch, the mean and the biased variance, (C,) each, and the values a channel.
    """
    parts = x.split(virtual_batch_size)
    masks = [None] * len(parts) if mask is None else mask.split(virtual_batch_size)
    statistics = [F.batch_moments(part, over) for part, over in zip(parts, masks, strict=True)]
    normalized = []
    for part, (mean, var, count) in zip(parts, statistics, strict=True):
        mean, var = (mean, var) if mask is None else F.unless_empty(count, (mean, var), kept)
        normalized.append(F.normalize(part, mean, var, weight, bias, eps))
    return torch.cat(normalized), [(mean.flatten(), var.flatten(), count) for mean, var, count in statistics]


register(
    "ghost",
    GhostBatchNorm1d,
    GhostBatchNorm2d,
    GhostBatchNorm3d,
    summary="ghost batch norm: batch norm of each virtual batch of 32 images",
    over="this batch",
    about="batch norm of each virtual batch of 32 images",
    source="Hoffer et al. 2017",
    cost=3.0,
)

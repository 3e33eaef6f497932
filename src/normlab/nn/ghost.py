"""Ghost batch norm: batch norm of a large batch as if it came in several small ones."""

import torch
from torch import Tensor

from ..errors import check
from .base import RunningStatistics, remember
from .functional import moments, normalize, per_channel


class GhostBatchNorm2d(RunningStatistics):
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
        device: of parameters and statistics.
        dtype: of the parameters.
        virtual_batch_size: images in a virtual batch.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Source: Hoffer, Hubara and Soudry 2017, "Train longer, generalize better", algorithm 1. Its running statistics
    too take in the virtual batches one after another, but σ_B in the place of σ_B².
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        virtual_batch_size: int = 32,
    ):
        check(virtual_batch_size >= 1, "virtual_batch_size", virtual_batch_size, "a whole number from 1")
        super().__init__(num_features, eps, momentum, affine, device, dtype)
        self.virtual_batch_size = virtual_batch_size

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training or x.numel() == 0:
            mean, var = per_channel(self.running_mean, x), per_channel(self.running_var, x)
            return normalize(x, mean, var, self.weight, self.bias, self.eps)
        y, statistics = ghost_batch_norm(x, self.virtual_batch_size, self.weight, self.bias, self.eps)
        self._remember(statistics, x)
        return y

    @torch.no_grad()
    def _remember(self, statistics: list[tuple[Tensor, Tensor]], x: Tensor) -> None:
        mean, var, momentum = self.running_mean, self.running_var, self.momentum
        for part, (part_mean, part_var) in zip(x.split(self.virtual_batch_size), statistics, strict=True):
            mean = (1 - momentum) * mean + momentum * part_mean
            n = part.numel() // self.num_features
            if n > 1:  # one value says nothing of the variance
                var = (1 - momentum) * var + momentum * n / (n - 1) * part_var
        batches = self.num_batches_tracked
        remember((self.running_mean, mean), (self.running_var, var), (batches, batches + 1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, virtual_batch_size={self.virtual_batch_size}"


class GhostBatchNorm1d(GhostBatchNorm2d):
    """Ghost batch norm of (N, C) or (N, C, L); see `GhostBatchNorm2d`."""

    accepted_dims = (2, 3)


class GhostBatchNorm3d(GhostBatchNorm2d):
    """Ghost batch norm of (N, C, D, H, W); see `GhostBatchNorm2d`."""

    accepted_dims = (5,)


def ghost_batch_norm(
    x: Tensor,
    virtual_batch_size: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Batch norm of each virtual batch: `virtual_batch_size` images of `x` in order, the last one what is left.

    Returns:
        y and, per virtual batch, the mean and the biased variance, (C,) each.
    """
    parts, dims = x.split(virtual_batch_size), (0, *range(2, x.dim()))
    statistics = [moments(part, dims) for part in parts]
    normalized = [normalize(part, *stat, weight, bias, eps) for part, stat in zip(parts, statistics, strict=True)]
    return torch.cat(normalized), [(mean.flatten(), var.flatten()) for mean, var in statistics]

"""Sync batch norm: batch norm over the batches of every rank of a process group, as if they were one batch."""

import copy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels import autograd, launch, policy
from . import functional as F
from .base import RunningStatistics
from .registry import register


class SyncBatchNorm(RunningStatistics):
    """Sync batch norm of (N, C, *space); see `SyncBatchNorm2d`."""

    averages, needs_statistics = True, False
    _scripted = RunningStatistics._scripted

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.process_group = process_group

    def _by_running_ones(self, x: Tensor) -> bool:
        return not self.training  # each rank takes part in training, with an empty batch too

    def in_training(self, x: Tensor, mask: Tensor | None) -> Tensor:
        parts = self._parts_for_kernels(x, policy.unless_compiled) if mask is None else None
        if parts is not None:
            moments = _gathered(*launch.channel_moments(x), x.numel() // x.shape[1], self.process_group)
            self._average(*moments)
            if not _are_several(self.process_group):
                return autograd.batch_norm_of(x, *moments[:2], parts.weight, parts.bias, eps=self.eps)
            total = partial(_summed, group=self.process_group)
            return autograd.batch_norm_over_ranks(x, moments, parts.weight, parts.bias, eps=self.eps, total=total)
        mean, var, count = moments_over_ranks(x, self.process_group, mask)
        self._average(mean.detach(), var.detach(), count)
        if mask is not None:
            mean, var = F.unless_empty(count, (mean, var), (self.running_mean, self.running_var))
        return self._normalized(x, mean, var)

    def in_evaluation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mean, var = self.running_mean, self.running_var
        if mean is None:  # of this rank alone, as in torch
            mean, var, _ = _moments(x, mask)
            return self._normalized(x, mean, var)
        parts = self._parts_for_kernels(x, policy.unless_compiled) if mask is None else None
        if parts is not None:
            return autograd.frozen_norm(x, mean, var, parts.weight, parts.bias, eps=self.eps, slope=1.0)
        return self._normalized(x, mean, var)

    def _normalized(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.normalize(x, F.per_channel(mean, x), F.per_channel(var, x), self.weight, self.bias, self.eps)

    def __deepcopy__(self, memo: dict[int, Any]) -> "SyncBatchNorm":
        memo[id(self.process_group)] = self.process_group  # ranks are shared, and cannot be copied
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied


class SyncBatchNorm1d(SyncBatchNorm):
    """Sync batch norm of (N, C) or (N, C, L); see `SyncBatchNorm2d`.

    Example:
        >>> SyncBatchNorm1d(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class SyncBatchNorm2d(SyncBatchNorm):
    """Batch norm of (N, C, H, W) over all ranks: y = γ (x − μ) / √(σ² + eps) + β, per channel.

    In training μ and σ² are the mean and the biased variance over batch and space of every rank, and the gradient
    flows through them; the running statistics, the same on every rank, move by `momentum` towards μ and the unbiased
    variance. With n values a channel on rank r, of mean m and biased variance v:

        N = Σᵣ n        μ = Σᵣ (n/N) m        σ² = Σᵣ (n/N) (v + (m − μ)²)
        ∂ΣL/∂xᵢ = γ/√(σ²+eps) · [gᵢ − (1/N) Σᵣ (Σg + x̂ᵢ Σ g x̂)]

    One all-gather forward and one all-reduce backward, on CPU (gloo) and GPU. Each rank takes part in each of them, so
    each has to call the layer, and the backward pass of its loss, as often as the others: with an empty batch too, for
    which y is empty. The gradients of γ and β are this rank's share of those of ΣL: they add up over the ranks, while
    `DistributedDataParallel` takes their mean. In evaluation μ and σ² are the running statistics, and nothing is
    exchanged. One process, or no process group, is plain batch norm.

    One value a channel in all gives y = β and leaves the running variance as it is. An inf or NaN on any rank leaves
    the statistics of all as they are, and so does a batch that is empty on all.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics, above 0, to 1.
        affine: learn γ and β.
        track_running_stats: keep statistics; without, evaluation is as training.
        process_group: the ranks to share statistics with; None for all there are.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> norm, batch = SyncBatchNorm2d(4), BatchNorm2d(4)
        >>> x = torch.randn(2, 4, 5, 5)
        >>> torch.allclose(norm(x), batch(x), atol=1e-5)  # in one process
        True

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1; over devices Peng et al. 2018, "MegDet: A Large
    Mini-Batch Object Detector". The moments of parts are put together as by Chan, Golub and LeVeque 1979, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """

    accepted_dims = (4,)


class SyncBatchNorm3d(SyncBatchNorm):
    """Sync batch norm of (N, C, D, H, W); see `SyncBatchNorm2d`.

    Example:
        >>> SyncBatchNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


def moments_over_ranks(
    x: Tensor, group: dist.ProcessGroup | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance per channel over `x` of every rank, (C,) each, and the number of values, 0-d.

    The gradient of a rank's `x` is that of the sum of what all ranks compute from these moments. Every rank has to call
    it, and every rank its backward pass.

    An empty batch has the mean and the variance 0.

    Args:
        x: (N, C, *space), N may differ from rank to rank and be 0.
        group: the ranks; None for all. Without a process group, or of one rank, nothing is exchanged.
        mask: (N, 1, *space), True where a value counts; None for all.
    """
    return _MomentsOverRanks.apply(x, group, mask) if _are_several(group) else _moments(x, mask)


def _are_several(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _gathered(
    mean: Tensor, var: Tensor, count: int | Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and number of the values of every rank, from those of each."""
    count = mean.new_full((), count) if isinstance(count, int) else count
    if not _are_several(group):
        return mean, var, count
    row = torch.cat([mean, var, count.view(1)])
    rows = [torch.empty_like(row) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, row, group)
    means, variances, counts = torch.stack(rows).split([len(mean), len(mean), 1], dim=1)
    count = counts.sum()
    share = counts / count.clamp(min=1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean) ** 2)).sum(0), count


def _summed(gradients: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over every rank, in place."""
    if _are_several(group):
        dist.all_reduce(gradients, group=group)
    return gradients


class _MomentsOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, group: dist.ProcessGroup | None, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return _gathered(*_moments(x, mask), group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, ctx.group, mask = inputs
        mean, _, count = output
        ctx.save_for_backward(x, mean, count, mask)
        ctx.mark_non_differentiable(count)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, count, mask = ctx.saved_tensors
        both = _summed(torch.stack([grads[0], grads[1]]), ctx.group)
        grad_mean, grad_var = (F.per_channel(grad / count.clamp(min=1), x) for grad in both)
        grad = grad_mean + 2 * grad_var * (x - F.per_channel(mean, x))
        return (grad if mask is None else torch.where(mask, grad, 0)).to(x.dtype), None, None


def _moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    if mask is not None:
        mean, var, count = F.masked_moments(x, mask)
        return mean.flatten(), var.flatten(), count
    mean, var = (part.flatten() for part in F.moments(x, (0, *range(2, x.dim()))))
    if x.numel() == 0:  # 0/0 so far
        mean, var = torch.zeros_like(mean), torch.zeros_like(var)
    return mean, var, mean.new_full((), x.numel() // x.shape[1])


register(
    "sync",
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
    summary="sync batch norm: each channel over this batch of every process",
    over="this batch",
    about="batch norm over the batches of all processes",
    source="Peng et al. 2018",
)

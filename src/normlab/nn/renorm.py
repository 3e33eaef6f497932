"""Batch renorm: batch norm, corrected towards the running statistics that evaluation will use."""

import torch
from torch import Tensor

from ..errors import check
from ..kernels import autograd, launch, policy
from . import functional as F
from .base import RunningStatistics, settle
from .per_image import in_float32
from .registry import register


class BatchRenorm(RunningStatistics):
    """Batch renorm of (N, C, *space); see `BatchRenorm2d`."""

    averages = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        r_max: float = 3.0,
        d_max: float = 5.0,
        r_ramp: tuple[int, int] = (5000, 40000),
        d_ramp: tuple[int, int] = (5000, 25000),
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        check(r_max >= 1, "r_max", r_max, "a number from 1")
        check(d_max >= 0, "d_max", d_max, "a number from 0")
        for name, ramp in (("r_ramp", r_ramp), ("d_ramp", d_ramp)):
            check(len(ramp) == 2 and 0 <= ramp[0] < ramp[1], name, ramp, "two numbers of batches, from 0, ascending")
        self.r_max, self.d_max, self.r_ramp, self.d_ramp = r_max, d_max, r_ramp, d_ramp

    def in_training(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None and self._parts_for_kernels(x, policy.unless_compiled) is not None:
            mean, var = launch.channel_moments(x)
            return autograd.batch_norm_of(
                x, mean, var, *self._corrected(mean, var, x.numel() // self.num_features), self.eps
            )
        values = in_float32(x)  # once, so that its gradients add up before rounding
        count: int | Tensor = x.numel() // self.num_features
        if mask is None:
            mean, var = F.moments(values, (0, *range(2, x.dim())))
        else:
            mean, var, count = F.masked_moments(values, mask)
            mean, var = F.unless_empty(count, (mean, var), (self.running_mean, self.running_var))
        weight, bias = self._corrected(mean.detach().flatten(), var.detach().flatten(), count)
        return F.normalize(values, mean, var, weight, bias, self.eps).to(x.dtype)

    def _corrected(self, mean: Tensor, var: Tensor, count: int | Tensor) -> tuple[Tensor, Tensor | None]:
        """What takes the place of γ and β for a batch of this mean and variance, which enters the running ones."""
        r, d = self.once(lambda: self._correct(mean, var, count))
        if self.weight is None:
            return r, d
        return r * self.weight, d * self.weight if self.bias is None else d * self.weight + self.bias

    def _correct(self, batch_mean: Tensor, batch_var: Tensor, n: int | Tensor) -> tuple[Tensor, ...]:
        """The r and d of a batch of `n` values a channel, which enters the running statistics."""
        std, batch_std = ((var + self.eps).sqrt() for var in (self.running_var, batch_var))
        distance = batch_mean - self.running_mean
        r_limit = 1 + (self.r_max - 1) * self._ramped(*self.r_ramp)
        d_limit = self.d_max * self._ramped(*self.d_ramp)
        r = (batch_std / std).clamp(1 / r_limit, r_limit)
        d = (distance / std).clamp(-d_limit, d_limit)
        share = self._share()
        new_std = torch.lerp(std, batch_std.to(std.dtype), share * (n > 1))
        self._keep(
            (self.running_mean, self.running_mean + share * distance),
            (self.running_var, (new_std.square() - self.eps).clamp(min=0)),
            (self.num_batches_tracked, self.num_batches_tracked + (n > 0)),
        )
        return settle(r, d)

    def _ramped(self, start: int, end: int) -> Tensor:
        passed = (self.num_batches_tracked - start).to(self.running_var.dtype)
        return (passed / (end - start)).clamp(0, 1)


class BatchRenorm1d(BatchRenorm):
    """Batch renorm of (N, C) or (N, C, L); see `BatchRenorm2d`.

    Example:
        >>> BatchRenorm1d(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class BatchRenorm2d(BatchRenorm):
    """Batch renorm of (N, C, H, W): y = γ (r (x − μ_B) / σ_B + d) + β, per channel.

    In training μ_B and σ_B = √(σ²_B + eps), σ²_B biased, are those of the batch, over batch and space, and the gradient
    flows through them. r and d tie them to the running μ and σ = √(σ² + eps) as they were before this batch, and are
    constants to the gradient; then the running ones move:

        r = clip(σ_B / σ, 1/r_max, r_max)        μ ← μ + momentum (μ_B − μ)
        d = clip((μ_B − μ) / σ, −d_max, d_max)   σ ← σ + momentum (σ_B − σ)

    What is not clipped comes out as in evaluation: y = γ (x − μ) / σ + β. The limits start at 1 and 0, which is batch
    norm, and widen linearly with the number of batches seen: from the first to the second number of `r_ramp` up to
    `r_max`, of `d_ramp` up to `d_max`. A run shorter than the ramps' first numbers trains as batch norm.

    A batch of one value a channel has y = γd + β. It moves μ; σ stays, since one value says nothing about it: there
    the paper would move σ towards √eps. `running_var` is σ² − eps, so that the state is that of a batch norm.

    Args:
        num_features: C.
        eps: added to the variances.
        momentum: weight of a new batch in the running statistics, above 0, to 1; the paper's is 0.01.
        affine: learn γ and β.
        track_running_stats: True; see `RunningStatistics`.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.
        r_max: the limit of r in the end, from 1.
        d_max: the limit of d in the end, from 0.
        r_ramp: the batches at which the limit of r starts to widen and is wide; the paper's by default.
        d_ramp: the same for d.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> norm, batch = BatchRenorm2d(4), BatchNorm2d(4)
        >>> x = torch.randn(2, 4, 5, 5)
        >>> torch.allclose(norm(x), batch(x), atol=1e-5)  # at first it is batch norm
        True

    Source: Ioffe 2017, "Batch Renormalization", algorithm 1 and section 4.
    """

    accepted_dims = (4,)


class BatchRenorm3d(BatchRenorm):
    """Batch renorm of (N, C, D, H, W); see `BatchRenorm2d`.

    Example:
        >>> BatchRenorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


register(
    "renorm",
    BatchRenorm1d,
    BatchRenorm2d,
    BatchRenorm3d,
    summary="batch renorm: batch norm, corrected towards its running statistics",
    over="the last batches",
    about="batch norm, corrected towards its running statistics",
    source="Ioffe 2017",
    cost=3.0,
)

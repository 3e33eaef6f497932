"""Moving-average batch norm: what batch norm computes from a batch, averaged over many, in both directions."""

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..kernels.plain import write
from . import functional as F
from .base import RunningStatistics, settle
from .convolution import CenteredConv1d, CenteredConv2d, CenteredConv3d
from .per_image import in_float32, scale_shift
from .registry import register


class MovingAverageBatchNorm(RunningStatistics):
    """Moving-average batch norm of (N, C, *space); see `MovingAverageBatchNorm2d`."""

    momentum: float
    recent_moments: Tensor
    recent_products: Tensor
    num_gradients_tracked: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.02,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        buffer_size: int = 16,
        warmup_iters: int = 100,
        correction_iters: int = 1000,
        max_correction: float = 5.0,
    ):
        check(buffer_size >= 1, "buffer_size", buffer_size, "a whole number from 1")
        check(warmup_iters >= buffer_size, "warmup_iters", warmup_iters, f"a whole number from {buffer_size=}")
        check(correction_iters >= 0, "correction_iters", correction_iters, "a whole number from 0")
        check(max_correction >= 1, "max_correction", max_correction, "a number from 1")
        self.buffer_size, self.warmup_iters = buffer_size, warmup_iters
        self.correction_iters, self.max_correction = correction_iters, max_correction
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)

    of_gradients = ("recent_products",)

    def first_state(self) -> dict[str, Tensor]:
        moments, products = (torch.zeros(self.buffer_size, self.num_features) for _ in range(2))
        counted = torch.zeros((), dtype=torch.long)
        return {"recent_moments": moments, "recent_products": products, "num_gradients_tracked": counted}

    def in_training(self, x: Tensor, mask: Tensor | None) -> Tensor:
        scales = (F.per_channel(scale, x) for scale in self.once(lambda: self._track(x.detach(), mask)))
        averages = self._own(self.recent_products, self.num_gradients_tracked)
        y = _Divide.apply(x, *scales, mask, *averages, self.warmup_iters)
        return scale_shift(y, self.weight, self.bias).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        mean, var = (state_dict.get(prefix + name) for name in ("running_mean", "running_var"))
        if mean is not None and var is not None and prefix + "recent_moments" not in state_dict:  # a batch norm's state
            state_dict[prefix + "running_mean"] = torch.zeros_like(mean)
            state_dict[prefix + "running_var"] = torch.addcmul(var, mean, mean)
            # The simple averages have seen nothing: they are used after the warm-up only.
            state_dict[prefix + "num_batches_tracked"] = torch.tensor(0)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _track(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """1/χ and r of this batch, which enters the statistics."""
        moment = _mean(in_float32(x).square(), mask).to(self.running_var.dtype)
        counts: Any = True
        if mask is not None:
            counts = mask.any()
            moment = torch.where(counts, moment, self.running_var)
        recent = torch.cat([self.recent_moments[1:], moment[None]])
        batches = self.num_batches_tracked
        used = torch.where(batches < self.warmup_iters, moment, recent.mean(0))
        r = ((used + self.eps) / (self.running_var + self.eps)).sqrt()
        r = r.clamp(1 / self.max_correction, self.max_correction)
        r = torch.where(batches < self.correction_iters, torch.ones_like(r), r)
        if mask is not None:
            recent = torch.where(counts, recent, self.recent_moments)
        self._keep(
            (self.recent_moments, recent),
            (self.running_var, torch.lerp(self.running_var, used, self.momentum * counts)),
            (self.num_batches_tracked, batches + counts),
        )
        return settle((used + self.eps).rsqrt(), r)


class MovingAverageBatchNorm1d(MovingAverageBatchNorm):
    """Moving-average batch norm of (N, C) or (N, C, L); see `MovingAverageBatchNorm2d`.

    Example:
        >>> MovingAverageBatchNorm1d(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class MovingAverageBatchNorm2d(MovingAverageBatchNorm):
    """Moving-average batch norm (MABN) of (N, C, H, W): y = γ r x / χ + β, per channel, for centred convolutions.

    Nothing is subtracted: the convolution before it has weights of mean 0 (`CenteredConv2d`). With q_B the mean of x²
    over this batch and space, training divides by the root of its simple average over the last `buffer_size` batches,
    this one included; r leads from there to the exponential average q̂ of evaluation, as it was before this batch:

        q = average of the last q_B            r = clip(χ / √(q̂ + eps), 1/max_correction, max_correction)
        χ = √(q + eps)                         q̂ ← q̂ + momentum (q − q̂)

    The gradient's own statistic ψ_B is averaged in the same way, and r is a constant to it. With z = x / χ and g the
    gradient of r z:

        ψ_B = mean(r g z)                      ∂L/∂x = (r g − z · average of the last ψ_B) / χ

    The first `warmup_iters` batches use q_B and ψ_B alone, and r is 1 for the first `correction_iters`. Evaluation is
    y = γ x / √(q̂ + eps) + β: q̂ is `running_var`, and `running_mean` stays 0, so that what folds a batch norm folds
    this norm. The state of a batch norm loads with q̂ = σ² + μ², and the warm-up begins. Changed against the authors'
    code: batches that had a backward pass are counted by themselves, so that forward passes alone leave no gaps in the
    average of ψ_B.

    Args:
        num_features: C.
        eps: added to the second moments.
        momentum: weight of a new batch in the statistics of evaluation, above 0, to 1.
        affine: learn γ and β.
        track_running_stats: True; see `RunningStatistics`.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.
        buffer_size: batches in the simple averages; the authors take 32 images in all.
        warmup_iters: batches before the simple averages are used, at least `buffer_size`.
        correction_iters: batches before r may leave 1.
        max_correction: the limit of r, from 1.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> net = torch.nn.Sequential(CenteredConv2d(3, 4, 3), MovingAverageBatchNorm2d(4))
        >>> net(torch.randn(2, 3, 7, 7)).shape
        torch.Size([2, 4, 5, 5])

    Source: Yan et al. 2020, "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
    section 4; warm-up and constants from the authors' code, megvii-model/MABN.
    """

    accepted_dims = (4,)


class MovingAverageBatchNorm3d(MovingAverageBatchNorm):
    """Moving-average batch norm of (N, C, D, H, W); see `MovingAverageBatchNorm2d`.

    Example:
        >>> MovingAverageBatchNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


class _Divide(torch.autograd.Function):
    """r x / χ, with the gradient of `MovingAverageBatchNorm2d`, whose averages the backward pass keeps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, inverse, r, mask, recent_products, num_gradients_tracked, warmup_iters):
        return x * (inverse * r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, inverse, r, mask, *averages = inputs
        ctx.save_for_backward(x, inverse, r, mask)
        # Not saved for backward: another backward pass may write them before this one.
        ctx.averages = averages

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, inverse, r, mask = ctx.saved_tensors
        recent_products, num_gradients_tracked, warmup_iters = ctx.averages
        grad = grads[0] * r
        z = x * inverse
        product = _mean(grad * z, mask).to(recent_products.dtype)
        recent = torch.cat([recent_products[1:], product[None]])
        used = torch.where(num_gradients_tracked < warmup_iters, product, recent.mean(0))
        usable = product.isfinite().all() if mask is None else product.isfinite().all() & mask.any()
        values = [torch.where(usable, recent, recent_products), num_gradients_tracked + usable]
        write([recent_products, num_gradients_tracked], values)
        along = z * F.per_channel(used, x)
        grad_x = (grad - (along if mask is None else torch.where(mask, along, 0))) * inverse
        return grad_x.to(x.dtype), None, None, None, None, None, None


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of each channel, (C,), over the values where `mask` is True."""
    dims = _all_but_channel(values)
    return values.mean(dims) if mask is None else torch.where(mask, values, 0).sum(dims) / mask.sum().clamp(min=1)


def _all_but_channel(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


register(
    "mabn",
    MovingAverageBatchNorm1d,
    MovingAverageBatchNorm2d,
    MovingAverageBatchNorm3d,
    summary="moving-average batch norm: not centred, after centred convolutions",
    convs=(CenteredConv1d, CenteredConv2d, CenteredConv3d),
    over="the last batches",
    about="moving averages in both passes, after centred convolutions",
    source="Yan et al. 2020",
    cost=3.0,
)

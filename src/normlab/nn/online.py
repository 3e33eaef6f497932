"""Online norm: image by image, with the statistics of all images before; the gradient is kept in hand the same way."""

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..kernels.plain import write
from . import functional as F
from .base import RunningStatistics, settle
from .per_image import in_float32, scale_shift
from .registry import register

GUARDS = ("scale", "clamp", "none")
CLAMP = 5.0  # the authors'


class OnlineNorm(RunningStatistics):
    """Online norm of (N, C, *space); see `OnlineNorm2d`."""

    momentum: float
    error_product: Tensor
    error_mean: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.001,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        backward_momentum: float = 0.01,
        guard: str = "scale",
    ):
        check(0 < backward_momentum <= 1, "backward_momentum", backward_momentum, "a number above 0, to 1")
        check(guard in GUARDS, "guard", guard, ", ".join(GUARDS))
        self.backward_momentum, self.guard = backward_momentum, guard
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)

    of_gradients = ("error_product", "error_mean")

    def first_state(self) -> dict[str, Tensor]:
        return {name: torch.zeros(self.num_features) for name in ("error_product", "error_mean")}

    def in_training(self, x: Tensor, mask: Tensor | None) -> Tensor:
        flat = x.reshape(*x.shape[:2], -1)
        over = None if mask is None else mask.reshape(x.shape[0], 1, -1)
        statistics = self.once(lambda: self._track(flat.detach(), over))
        errors = self._own(self.error_product, self.error_mean)
        y = _NormalizeInTurn.apply(flat, *statistics, over, *errors, self.backward_momentum)
        y = scale_shift(y.reshape(x.shape), self.weight, self.bias)
        return self._guarded(y, mask).to(x.dtype)

    def in_evaluation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self._guarded(super().in_evaluation(in_float32(x), mask), mask).to(x.dtype)

    def _track(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        """μ and 1/σ before each image, (N, C, 1), of `x`, (N, C, L), whose images enter the statistics."""
        counts: Any = True
        if mask is None:
            moments = F.moments(x, (2,))
            share: float | Tensor = self.momentum
        else:
            *moments, count = F.masked_moments(x, mask, (2,))
            counts = mask.any()
            share = self.momentum * (count[..., 0] > 0)  # an image of which nothing counts changes nothing
        mean, var = (part[..., 0].to(self.running_mean.dtype) for part in moments)
        keep = 1 - share
        decay = torch.full_like(mean, 1) * keep
        means = _recur(decay, share * mean, self.running_mean)
        distance = mean - means[:-1]
        variances = _recur(decay, share * (var + keep * distance.square()), self.running_var)
        self._keep(
            (self.running_mean, means[-1]),
            (self.running_var, variances[-1]),
            (self.num_batches_tracked, self.num_batches_tracked + counts),
        )
        return settle(means[:-1, :, None], (variances[:-1, :, None] + self.eps).rsqrt())

    def _guarded(self, y: Tensor, mask: Tensor | None) -> Tensor:
        if self.guard == "scale":
            square, dims = y.square(), tuple(range(1, y.dim()))
            if mask is None:
                mean_square = square.mean(dims, keepdim=True)
            else:
                counts = mask.expand(y.shape).sum(dims, keepdim=True)
                mean_square = torch.where(mask, square, 0).sum(dims, keepdim=True) / counts.clamp(min=1) + (counts == 0)
            return y * (mean_square + self.eps).rsqrt()
        return y.clamp(-CLAMP, CLAMP) if self.guard == "clamp" else y


class OnlineNorm1d(OnlineNorm):
    """Online norm of (N, C) or (N, C, L); see `OnlineNorm2d`.

    Example:
        >>> OnlineNorm1d(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class OnlineNorm2d(OnlineNorm):
    """Online norm of (N, C, H, W): y = (x − μ) / σ with the statistics before each image, then γ y + β and a guard.

    In training the images of a batch pass one after the other, as if each were a batch of its own. With m and v the
    mean and biased variance of image t over space, α = 1 − momentum, σ = √(σ² + eps), per channel:

        y_t = (x_t − μ_{t−1}) / σ_{t−1}
        μ_t = α μ_{t−1} + (1−α) m          σ²_t = α σ²_{t−1} + (1−α) v + α(1−α)(m − μ_{t−1})²

    The gradient g_t of y_t is steered, image after image, towards what batch norm's obeys: no mean, no product with y.
    With α_b = 1 − backward_momentum and e, h the errors gathered so far, means over space:

        g'_t = g_t − (1−α_b) e_{t−1} y_t                 e_t = e_{t−1} + mean(g'_t y_t)
        ∂L/∂x_t = g'_t / σ_{t−1} − (1−α_b) h_{t−1}       h_t = h_{t−1} + mean(∂L/∂x_t)

    The guard keeps errors of the statistics from growing through the layers. "scale" divides γ y + β by its root mean
    square (plus eps) over channels and space of the image; "clamp" holds it between −5 and 5; "none" leaves it.
    Evaluation uses the μ and σ reached, and the guard: only "none" folds into a convolution.

    A batch of N images costs log₂ N rounds over arrays of (N, C) on top of the passes over x.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new image (not batch) in the running statistics, 1 − α, above 0, to 1.
        affine: learn γ and β.
        track_running_stats: True; see `RunningStatistics`.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.
        backward_momentum: the same in the backward pass, 1 − α_b.
        guard: "scale", "clamp" or "none".

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> norm = OnlineNorm2d(4, guard="none")
        >>> x = torch.randn(1, 4, 5, 5)
        >>> torch.allclose(norm(x), x, atol=1e-4)  # by the statistics before the first image: 0 and 1
        True

    Source: Chiley et al. 2019, "Online Normalization for Training Neural Networks", sections 3 and 4; the clamp is
    from the authors' code, Cerebras/online-normalization.
    """

    accepted_dims = (4,)


class OnlineNorm3d(OnlineNorm):
    """Online norm of (N, C, D, H, W); see `OnlineNorm2d`.

    Example:
        >>> OnlineNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


def _recur(decay: Tensor, values: Tensor, start: Tensor) -> Tensor:
    """`start`, (C,), and every state after it, (N + 1, C): s_t = decay_t s_{t−1} + values_t.

    In log₂ N rounds: after each, `decay` and `values` of t stand for twice as many steps up to t.
    """
    steps = 1
    while steps < len(values):
        values = torch.cat([values[:steps], torch.addcmul(values[steps:], decay[steps:], values[:-steps])])
        decay = torch.cat([decay[:steps], decay[steps:] * decay[:-steps]])
        steps *= 2
    return torch.cat([start[None], torch.addcmul(values, decay, start)])


class _NormalizeInTurn(torch.autograd.Function):
    """(x − μ) / σ of (N, C, L), with the gradient of `OnlineNorm2d`, whose errors the backward pass keeps."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, mean, inverse, mask, error_product, error_mean, rate):
        return (x - mean) * inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, mean, inverse, mask, *errors = inputs
        ctx.save_for_backward(x, mean, inverse, mask)
        # Not saved for backward: another backward pass may write them before this one.
        ctx.errors = errors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, inverse, mask = ctx.saved_tensors
        error_product, error_mean, rate = ctx.errors
        y = (x - mean) * inverse
        # e_t = (1 − (1−α_b) mean(y²)) e_{t−1} + mean(g y), which is the docstring's with g' written out
        products = _recur(1 - rate * _mean(y.square(), mask), _mean(grads[0] * y, mask), error_product)
        grad = (grads[0] - _counted(rate * products[:-1, :, None] * y, mask)) * inverse
        decay = torch.full_like(products[1:], 1 - rate)
        if mask is not None:
            decay = torch.where(mask.any(2), decay, 1)
        means = _recur(decay, _mean(grad, mask), error_mean)
        errors = torch.stack([error_product, error_mean])
        new = torch.stack([products[-1], means[-1]])
        new = torch.where(new.isfinite().all(), new, errors)
        write([error_product, error_mean], new.unbind())
        grad_x = grad - _counted((rate * means[:-1, :, None]).expand(x.shape), mask)
        return grad_x.to(x.dtype), None, None, None, None, None, None


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the last dimension of the values where `mask` is True; 0 where there is none."""
    return values.mean(2) if mask is None else _counted(values, mask).sum(2) / mask.sum(2).clamp(min=1)


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0)


register(
    "online",
    OnlineNorm1d,
    OnlineNorm2d,
    OnlineNorm3d,
    summary="online norm: image by image, with the statistics of all images before",
    over="the last batches",
    about="image by image, with the statistics of all images before",
    source="Chiley et al. 2019",
    cost=3.0,
)

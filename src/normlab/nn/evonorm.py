"""EvoNorm: two layers, found by search, that are norm and activation in one."""

import torch
from torch import Tensor, nn

from . import functional as F
from .base import RunningStatistics
from .functional import moments, per_channel
from .per_image import PerImageNorm, check_groups, in_float32, in_groups, instance_moments, scale_shift
from .registry import register


class EvoNormS0(PerImageNorm):
    """EvoNorm-S0 of (N, C, *space): y = γ x sigmoid(v x) / √(σ² + eps) + β, each image by itself.

    σ² is the biased variance over a group of C / num_groups channels and all of space, in training and in evaluation;
    no mean is taken off. γ, β and v are per channel, v at first 1. It stands in the place of a norm and the activation
    after it. A group of one value has variance 0: it is divided by √eps alone.

    Args:
        num_features: C.
        num_groups: a divisor of C; by default eight, or as many as divide C. The paper has 32.
        eps: added to the variance.
        affine: learn γ and β; v is learned in any case.
        device: the device of the parameters.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> EvoNormS0(8, num_groups=2)(torch.randn(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])

    Source: Liu, Brock, Simonyan and Le 2020, "Evolving Normalization-Activation Layers", EvoNorm-S0.
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = None,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, affine, device, dtype, bias=bias)
        self.num_groups, self.eps = check_groups(num_groups, num_features), eps
        self.v = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype))

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        return evonorm_s0(x, self.v, self.num_groups, self.weight, self.bias, self.eps, mask)

    def reset_parameters(self) -> None:
        """Set v and γ to 1, β to 0."""
        super().reset_parameters()
        nn.init.ones_(self.v)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_groups={self.num_groups}, eps={self.eps}"


class EvoNormB0(RunningStatistics):
    """EvoNorm-B0 of (N, C, *space); see `EvoNorm2dB0`."""

    averages, needs_statistics = True, False
    v: nn.Parameter

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
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.register_buffer("running_mean", None)

    def first_parameters(self) -> dict[str, tuple[int, float]]:
        return {"v": (self.num_features, 1.0)}

    def reset_running_stats(self) -> None:
        """Forget every batch: variance 1, count 0."""
        if self.running_var is not None:
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def in_training(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mean, var, count = F.batch_moments(x, mask)
        kept = self.running_var
        if self.training:
            self.remember_moments(mean, var, count)
        if mask is not None:
            var = F.unless_empty(count, (var, var), (None, kept))[1]
        return evonorm_b0(x, self.v, var.flatten(), self.weight, self.bias, self.eps, mask)

    def in_evaluation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        var = x.new_ones(()) if self.running_var is None else self.running_var
        return evonorm_b0(x, self.v, var, self.weight, self.bias, self.eps, mask)


class EvoNorm1dB0(EvoNormB0):
    """EvoNorm-B0 of (N, C) or (N, C, L); see `EvoNorm2dB0`. Without space σ_I² is 0.

    Example:
        >>> EvoNorm1dB0(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class EvoNorm2dB0(EvoNormB0):
    """EvoNorm-B0 of (N, C, H, W): y = γ x / max(√(σ_B² + eps), v x + √(σ_I² + eps)) + β.

    σ_I² is the biased variance over space, per channel of each image. σ_B² is per channel: in training the biased
    variance over batch and space, and the gradient flows through it; in evaluation the running variance, which moves
    by `momentum` towards the unbiased one, as batch norm's does. No mean is taken off and none is kept. γ, β and v are
    per channel, v at first 1. It stands in the place of a norm and the activation after it.

    A batch of one value a channel has both variances 0, which gives x / max(√eps, v x + √eps); the running variance,
    of which one value says nothing, stays.

    Args:
        num_features: C.
        eps: added to the variances.
        momentum: weight of a new batch in the running variance, above 0, to 1.
        affine: learn γ and β; v is learned in any case.
        track_running_stats: keep statistics; without, evaluation is as training.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), EvoNorm2dB0(4))  # and no ReLU after it
        >>> net(torch.randn(2, 3, 7, 7)).shape
        torch.Size([2, 4, 5, 5])

    Source: Liu, Brock, Simonyan and Le 2020, "Evolving Normalization-Activation Layers", EvoNorm-B0.
    """

    accepted_dims = (4,)


class EvoNorm3dB0(EvoNormB0):
    """EvoNorm-B0 of (N, C, D, H, W); see `EvoNorm2dB0`.

    Example:
        >>> EvoNorm3dB0(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


def evonorm_s0(
    x: Tensor,
    v: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """γ x sigmoid(v x) / √(σ² + eps) + β, σ² per image and group of channels, in the dtype of `x`.

    Args:
        x: (N, C, *space).
        v: (C,).
        num_groups: a divisor of C.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        eps: added to the variance.
        mask: (N, 1, *space), True where a value is in σ²; None for all.
    """
    grouped = x.unflatten(1, (num_groups, -1))
    dims = tuple(range(2, grouped.dim()))
    if mask is None:
        _, var = moments(grouped, dims)
    else:
        mean, var, count = F.masked_moments(grouped, mask.unsqueeze(1), dims)
        _, var = F.unless_empty(count, (mean, var))
    var = var.squeeze(2).repeat_interleave(x.shape[1] // num_groups, 1)
    wide = in_float32(x)
    return scale_shift(wide * (wide * per_channel(v, x)).sigmoid() * (var + eps).rsqrt(), weight, bias).to(x.dtype)


def evonorm_b0(
    x: Tensor,
    v: Tensor,
    batch_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """γ x / max(√(σ_B² + eps), v x + √(σ_I² + eps)) + β, σ_I² per channel of each image, in the dtype of `x`.

    Args:
        x: (N, C, *space).
        v: (C,).
        batch_var: σ_B², (C,).
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        eps: added to the variances.
        mask: (N, 1, *space), True where a value is in σ_I²; None for all.
    """
    _, instance_var = instance_moments(x, mask)
    wide = in_float32(x)
    of_image = wide * per_channel(v, x) + (instance_var + eps).sqrt()
    of_batch = per_channel((batch_var + eps).sqrt(), x)
    return scale_shift(wide / torch.maximum(of_batch, of_image), weight, bias).to(x.dtype)


register(
    "evonorm_b0",
    EvoNorm1dB0,
    EvoNorm2dB0,
    EvoNorm3dB0,
    summary="EvoNorm-B0: over the batch's or image's deviation; the activation too",
    activates=True,
    over="this batch",
    about="norm and activation in one, with batch statistics",
    source="Liu et al. 2020",
)
register(
    "evonorm_s0",
    *in_groups(EvoNormS0),
    summary="EvoNorm-S0: each image by itself, in 8 groups; the activation too",
    activates=True,
    over="each image",
    about="norm and activation in one, each image by itself",
    source="Liu et al. 2020",
)

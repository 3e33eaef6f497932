"""What the norms of each image by itself share: γ and β, the check of the input, statistics over space."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check
from .base import OnKernels, is_tracing
from .call import refuse_shape
from .functional import masked_moments, moments, per_channel, unless_empty


class PerImageNorm(OnKernels):
    """A norm of (N, C, *space) without running statistics: `weight` γ and `bias` β per channel, or None.

    Args:
        num_features: C.
        affine: learn γ and β.
        device: the device of the parameters.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.
    """

    def __init__(
        self,
        num_features: int,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__()
        check(num_features >= 1, "num_features", num_features, "a whole number from 1")
        self.num_features, self.affine = num_features, affine
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None
        learns = affine and bias
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if learns else None

    def reset_parameters(self) -> None:
        """Set γ to 1 and β to 0."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _check_input_dim(self, input: Tensor) -> None:
        check_channels(self, input)

    def extra_repr(self) -> str:
        return f"{self.num_features}, affine={self.affine}"


# Groups unless told otherwise: the largest power of two up to this that divides the channels.
GROUPS = 8


def check_groups(num_groups: int | None, num_features: int, fewest: int = 1) -> int:
    """`num_groups`, or an InputError with the numbers of groups that the channels can have.

    For None eight, or as many as divide the channels, of `fewest` channels each at least.
    """
    if num_groups is None:
        num_groups = math.gcd(num_features, GROUPS)
        while num_groups > 1 and num_features // num_groups < fewest:
            num_groups //= 2
    if num_groups < 1 or num_features % num_groups:
        divisors = ", ".join(str(n) for n in range(1, num_features + 1) if num_features % n == 0)
        check(False, "num_groups", num_groups, f"a divisor of num_features={num_features}: {divisors}")
    return num_groups


# The channels of a group, at least, where an input may have no space: of one value is left β, of two a sign.
FEWEST = 4


def in_groups(layer: Callable[..., nn.Module]) -> tuple[Callable[..., nn.Module], ...]:
    """Builders of a norm in groups, for 1, 2 and 3 space dimensions; without `num_groups` as many as usual."""
    usual = partial(_build_in_groups, layer)
    return partial(_build_in_groups, layer, fewest=FEWEST), usual, usual


def _build_in_groups(
    layer: Callable[..., nn.Module],
    num_features: int,
    num_groups: int | None = None,
    *options: Any,
    fewest: int = 1,
    **named: Any,
) -> nn.Module:
    return layer(num_features, check_groups(num_groups, num_features, fewest), *options, **named)


def check_channels(layer: Any, x: Tensor) -> None:
    """Raise an InputError unless `x` is (N, C, *space) with as many channels as the layer has."""
    if x.dim() < 2 or not (is_tracing() or x.shape[1] == layer.num_features):
        refuse_shape(layer, x, layer.num_features)


def in_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def scale_shift(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ x̂ + β, with γ and β of shape (C,) or None for 1 and 0."""
    if weight is not None:
        x_hat = x_hat * per_channel(weight, x_hat)
    return x_hat if bias is None else x_hat + per_channel(bias, x_hat)


def instance_moments(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over space of each channel of each image, (N, C, 1, …), in float32 or float64.

    They are those of the values where `mask`, (N, 1, *space), is True; 0 and 1 for an image in which none is. Without
    space, (N, C), the mean is the value itself and the variance 0.
    """
    if x.dim() == 2:
        mean = in_float32(x)
        return mean, torch.zeros_like(mean)
    space = tuple(range(2, x.dim()))
    if mask is None:
        return moments(x, space)
    mean, var, count = masked_moments(x, mask, space)
    return unless_empty(count, (mean, var))

"""What the norms of each image by itself share: γ and β, the check of the input, statistics over space."""

import torch
from torch import Tensor, nn

from ..errors import check
from .base import OnKernels
from .functional import moments, per_channel


class PerImageNorm(OnKernels):
    """A norm of (N, C, *space) without running statistics: `weight` γ and `bias` β per channel, or None.

    Args:
        num_features: C.
        affine: learn γ and β.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: an argument or the shape of an input is out of range.
    """

    def __init__(
        self,
        num_features: int,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check(num_features >= 1, "num_features", num_features, "a whole number from 1")
        self.num_features, self.affine = num_features, affine
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if affine else None

    def extra_repr(self) -> str:
        return f"{self.num_features}, affine={self.affine}"


def check_groups(num_groups: int, num_features: int) -> int:
    """`num_groups`, or an InputError with the numbers of groups that the channels can have."""
    if num_groups < 1 or num_features % num_groups:
        divisors = ", ".join(str(n) for n in range(1, num_features + 1) if num_features % n == 0)
        check(False, "num_groups", num_groups, f"a divisor of num_features={num_features}: {divisors}")
    return num_groups


def check_channels(x: Tensor, num_features: int) -> None:
    """Raise an InputError unless `x` is (N, C, *space) with C = `num_features`."""
    if x.dim() < 2 or x.shape[1] != num_features:
        check(False, "x.shape", tuple(x.shape), f"2 dimensions or more, the second of {num_features} channels")


def in_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


def scale_shift(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ x̂ + β, with γ and β of shape (C,) or None for 1 and 0."""
    if weight is not None:
        x_hat = x_hat * per_channel(weight, x_hat)
    return x_hat if bias is None else x_hat + per_channel(bias, x_hat)


def instance_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over space of each channel of each image, (N, C, 1, …), in float32 or float64.

    Without space, (N, C), the mean is the value itself and the variance 0.
    """
    if x.dim() == 2:
        mean = in_float32(x)
        return mean, torch.zeros_like(mean)
    return moments(x, tuple(range(2, x.dim())))

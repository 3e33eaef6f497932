"""Convolutions that go before a norm and prepare their weights for it; otherwise torch's, arguments, state and all."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import check
from ..kernels.launch import check_memory
from . import functional as F


def standardize_weight(weight: Tensor, eps: float = 1e-10) -> Tensor:
    """(W − μ) / √(σ² + eps), μ and σ² (biased) over the fan-in of each output channel, in float32 at least.

    Args:
        weight: (out_channels, …).
        eps: added to the variance.
    """
    mean, var = F.moments(weight, tuple(range(1, weight.dim())))
    return F.normalize(weight, mean, var, None, None, eps)


class _WeightStandardized(_ConvNd):
    def __init__(self, *args: Any, eps: float = 1e-10, **kwargs: Any):
        check(eps > 0, "eps", eps, "a number above 0")
        super().__init__(*args, **kwargs)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        check_memory((("weight", self.weight),))
        return self._conv_forward(x, standardize_weight(self.weight, self.eps), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


class WeightStandardizedConv2d(_WeightStandardized, nn.Conv2d):
    """A convolution with standardised weights: Ŵ = (W − μ) / √(σ² + eps), y = Ŵ ∗ x + b.

    μ and σ² (biased) are taken over the fan-in of each output channel, in training and in evaluation, and the gradient
    flows through them. A norm goes after it: Ŵ has no scale of its own, and y grows with √fan-in. A fan-in of one
    value gives Ŵ = 0.

    Changed: the paper divides by σ + 1e-5. With eps in the root the gradient is finite where σ is 0; the default
    √1e-10 = 1e-5 is as large there, and nothing elsewhere.

    Args:
        *args: as for `torch.nn.Conv2d`.
        eps: added to the variance.
        **kwargs: as for `torch.nn.Conv2d`.

    Raises:
        InputError: `eps` is not above 0.

    Example:
        >>> net = torch.nn.Sequential(WeightStandardizedConv2d(3, 4, 3), GroupNorm(4))
        >>> net(torch.randn(2, 3, 7, 7)).shape
        torch.Size([2, 4, 5, 5])

    Source: Qiao, Wang, Liu, Shen and Yuille 2019, "Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization", equation 10.
    """


class WeightStandardizedConv1d(_WeightStandardized, nn.Conv1d):
    """A convolution of (N, C, L) with standardised weights; see `WeightStandardizedConv2d`.

    Example:
        >>> WeightStandardizedConv1d(3, 4, 3)(torch.randn(2, 3, 7)).shape
        torch.Size([2, 4, 5])
    """


class WeightStandardizedConv3d(_WeightStandardized, nn.Conv3d):
    """A convolution of (N, C, D, H, W) with standardised weights; see `WeightStandardizedConv2d`.

    Example:
        >>> WeightStandardizedConv3d(3, 4, 3)(torch.randn(2, 3, 7, 7, 7)).shape
        torch.Size([2, 4, 5, 5, 5])
    """


class _Centered(_ConvNd):
    def forward(self, x: Tensor) -> Tensor:
        check_memory((("weight", self.weight),))
        mean = self.weight.mean(tuple(range(1, self.weight.dim())), keepdim=True)
        return self._conv_forward(x, self.weight - mean, self.bias)


class CenteredConv2d(_Centered, nn.Conv2d):
    """A convolution with centred weights: Ŵ = W − μ, y = Ŵ ∗ x + b, for norms that do not subtract a mean.

    μ is taken over the fan-in of each output channel, in training and in evaluation, and the gradient flows through
    it. What all values of x have in common does not reach y, but for zero padding. A fan-in of one value gives Ŵ = 0.
    The arguments are those of `torch.nn.Conv2d`.

    Example:
        >>> y = CenteredConv2d(3, 4, 3, bias=False)(torch.ones(2, 3, 7, 7))
        >>> torch.allclose(y, torch.zeros(2, 4, 5, 5), atol=1e-5)  # what all values share does not reach y
        True

    Source: Yan et al. 2020, "Towards Stabilizing Batch Statistics in Backward Propagation of Batch Normalization",
    section 4.
    """


class CenteredConv1d(_Centered, nn.Conv1d):
    """A convolution of (N, C, L) with centred weights; see `CenteredConv2d`.

    Example:
        >>> CenteredConv1d(3, 4, 3)(torch.randn(2, 3, 7)).shape
        torch.Size([2, 4, 5])
    """


class CenteredConv3d(_Centered, nn.Conv3d):
    """A convolution of (N, C, D, H, W) with centred weights; see `CenteredConv2d`.

    Example:
        >>> CenteredConv3d(3, 4, 3)(torch.randn(2, 3, 7, 7, 7)).shape
        torch.Size([2, 4, 5, 5, 5])
    """

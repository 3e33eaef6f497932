"""Norms of each image by itself: group norm with its two ends, layer and instance norm, and norms of each position."""

import torch
from torch import Tensor

from ..kernels import autograd, plain, policy
from .activation import SLOPES, activate, check_activation, described, scripted_activation
from .base import is_tracing
from .convolution import WeightStandardizedConv1d, WeightStandardizedConv2d, WeightStandardizedConv3d
from .functional import group_norm, moments, normalize
from .per_image import PerImageNorm, check_groups, in_float32, in_groups, scale_shift
from .registry import NORMS, register


class GroupNorm(PerImageNorm):
    """Group norm of (N, C, *space): y = γ (x − μ) / √(σ² + eps) + β, γ and β per channel.

    μ and σ² (biased) are taken per image over each group of C / num_groups channels and all of space, in training and
    in evaluation. A group of one value (a 1×1 map with a group a channel) gives y = β.

    It is a compiled kernel or torch's operator, in float32 at least: as in every float32 norm the error of the result
    grows with |μ|/σ, to about 0.001 at a mean of 1000 and a deviation of 0.1.

    Args:
        num_features: C.
        num_groups: a divisor of C; by default eight, or as many as divide C.
        eps: added to the variance.
        affine: learn γ and β.
        device: the device of the parameters.
        dtype: the type of the parameters.
        bias: learn β.
        activation: see `BatchNorm2d`.

    Raises:
        InputError: `num_groups` does not divide `num_features`, or the input is not (N, C, *space).

    Example:
        >>> GroupNorm(12)  # as many groups as divide 12, up to eight
        GroupNorm(12, num_groups=4, eps=1e-05, affine=True)
        >>> y = GroupNorm(12, 3)(5 + torch.randn(2, 12, 6, 6))
        >>> torch.allclose(y.reshape(2, 3, -1).mean(2), torch.zeros(2, 3), atol=1e-5)
        True

    Source: Wu and He 2018, "Group Normalization", equation 7.
    """

    _checks_memory = True

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
        activation: str | None = None,
    ):
        super().__init__(num_features, affine, device, dtype, bias=bias)
        self.num_groups, self.eps = check_groups(num_groups, num_features), eps
        self.activation = check_activation(activation)

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        alone = not is_tracing() and x.numel() == x.shape[0] * self.num_groups
        use = policy.for_groups if self.activation is None else policy.for_activated_groups
        parts = self._parts_for_kernels(x, use) if mask is None and not alone else None
        if parts is not None:
            slope = SLOPES[self.activation]
            return autograd.group_norm(x, self.num_groups, parts.weight, parts.bias, self.eps, slope)
        self._check_memory(x)
        if mask is not None:
            y = group_norm(x, self.num_groups, self.weight, self.bias, self.eps, mask)
            return activate(y, self.activation)
        if alone:
            x = x - x.detach()  # groups of one value: the operator would leave x − μ a rounding error, times 1/√eps
        return activate(plain.group_norm(x, self.num_groups, self.weight, self.bias, self.eps), self.activation)

    def _scripted(self, input: Tensor) -> Tensor:
        flat = input.flatten(2) if input.dim() > 2 else input  # see `plain.group_norm`
        y = torch.group_norm(flat, self.num_groups, self.weight, self.bias, self.eps).view(input.shape)
        return scripted_activation(y, self.activation)

    def extra_repr(self) -> str:
        options = f"num_groups={self.num_groups}, eps={self.eps}, affine={self.affine}"
        return f"{self.num_features}, {options}{described(self.activation)}"


class LayerNorm(GroupNorm):
    """Layer norm of (N, C, *space): per image over channels and space, γ and β per channel; group norm of one group.

    Example:
        >>> y = LayerNorm(4)(5 + torch.randn(2, 4, 6, 6))
        >>> torch.allclose(y.flatten(1).mean(1), torch.zeros(2), atol=1e-5)
        True

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ):
        super().__init__(num_features, 1, eps, affine, device, dtype, bias=bias, activation=activation)


class InstanceNorm(GroupNorm):
    """Instance norm of (N, C, *space): per image and channel over space, γ and β per channel; a group a channel.

    What follows a pool over all of space sees the same mean, β, for every image: not for the last layer of a
    classifier.

    Example:
        >>> y = InstanceNorm(4)(5 + torch.randn(2, 4, 6, 6))
        >>> torch.allclose(y.mean((2, 3)), torch.zeros(2, 4), atol=1e-5)
        True

    Source: Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization".
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ):
        super().__init__(num_features, num_features, eps, affine, device, dtype, bias=bias, activation=activation)


class ChannelLayerNorm(PerImageNorm):
    """Layer norm over the channels alone, of (N, C, *space): y = γ (x − μ) / √(σ² + eps) + β, γ and β per channel.

    μ and σ² (biased) are taken over the C values at each position of each image, as a transformer does for each token,
    in training and in evaluation. One channel gives y = β.

    Args:
        num_features: C.
        eps: added to the variance.
        affine: learn γ and β.
        device: the device of the parameters.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: `num_features` is less than 1, or the input is not (N, C, *space).

    Example:
        >>> y = ChannelLayerNorm(4)(5 + torch.randn(2, 4, 6, 6))
        >>> torch.allclose(y.mean(1), torch.zeros(2, 6, 6), atol=1e-5)
        True

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization", equation 3; on maps Liu et al. 2022, "A ConvNet for the
    2020s", section 2.6.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, affine, device, dtype, bias=bias)
        self.eps = eps

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        parts = self._parts_for_kernels(x, policy.unless_compiled)
        if parts is not None:
            return autograd.position_norm(x, parts.weight, parts.bias, True, self.eps)
        mean, var = moments(x, (1,))
        return normalize(x, mean, var, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


class RMSNorm(PerImageNorm):
    """RMS norm of (N, C, *space): y = γ x / √(m + eps), γ per channel.

    m is the mean of x² over the C values at each position of each image, in training and in evaluation: layer norm
    over channels that neither centres nor shifts.

    Args:
        num_features: C.
        eps: added to the mean square.
        affine: learn γ.
        device: the device of the parameters.
        dtype: the type of the parameters.

    Raises:
        InputError: `num_features` is less than 1, or the input is not (N, C, *space).

    Example:
        >>> y = RMSNorm(4)(5 + torch.randn(2, 4, 6, 6))
        >>> torch.allclose(y.square().mean(1), torch.ones(2, 6, 6), atol=1e-4)
        True

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization", equation 4, with eps added.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, affine, device, dtype, bias=False)
        self.eps = eps

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        parts = self._parts_for_kernels(x, policy.unless_compiled)
        if parts is not None:
            return autograd.position_norm(x, parts.weight, None, False, self.eps)
        wide = in_float32(x)
        x_hat = wide * ((wide * wide).mean(1, keepdim=True) + self.eps).rsqrt()
        return scale_shift(x_hat, self.weight, None).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"


register(
    "group",
    *in_groups(GroupNorm),
    summary="group norm: each image by itself, in 8 groups of channels",
    over="each image",
    about="each image by itself, per group of channels",
    source="Wu and He 2018",
)
register(
    "group_ws",
    *NORMS["group"].layers,
    summary="group norm after convolutions with standardised weights",
    convs=(WeightStandardizedConv1d, WeightStandardizedConv2d, WeightStandardizedConv3d),
    over="each image",
    about="group norm after convolutions with standardised weights",
    source="Qiao et al. 2019",
)
register(
    "layer",
    LayerNorm,
    summary="layer norm: each image by itself, over channels and space",
    over="each image",
    about="each image by itself, over channels and space",
    source="Ba et al. 2016",
)
register(
    "layer_channels",
    ChannelLayerNorm,
    summary="layer norm over channels: each position of each image by itself",
    over="each position",
    about="each position of each image over its channels",
    source="Ba et al. 2016, Liu et al. 2022",
)
register(
    "rms",
    RMSNorm,
    summary="RMS norm: each position of each image over its channels, not centred",
    over="each position",
    about="the same, divided by the root mean square, not centred",
    source="Zhang and Sennrich 2019",
)
register(
    "instance",
    InstanceNorm,
    summary="instance norm: each channel of each image by itself",
    over="each image",
    about="each channel of each image by itself",
    source="Ulyanov et al. 2016",
)

"""Layers that bound their input value by value in the place of a norm: dynamic tanh and dynamic erf."""

import torch
from torch import Tensor, nn

from .per_image import PerImageNorm, in_float32, scale_shift
from .registry import register


class DynamicTanh(PerImageNorm):
    """Dynamic tanh of (N, C, *space): y = γ tanh(α x) + β, value by value.

    `alpha` α is one learned number for the layer, γ and β are per channel. There are no statistics: training and
    evaluation are alike.

    Args:
        num_features: C.
        alpha: α at first.
        affine: learn γ and β; α is learned in any case.
        device: the device of the parameters.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> x = torch.randn(2, 4, 6, 6)
        >>> torch.allclose(DynamicTanh(4)(x), torch.tanh(0.5 * x))
        True

    Source: Zhu, Chen, He, LeCun and Liu 2025, "Transformers without Normalization", equation 2.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 0.5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, affine, device, dtype, bias=bias)
        self.initial_alpha = alpha
        self.alpha = nn.Parameter(torch.full((1,), float(alpha), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set α, γ and β to what they were at first."""
        super().reset_parameters()
        nn.init.constant_(self.alpha, self.initial_alpha)

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        bounded = torch.tanh(self.alpha * in_float32(x))
        if self.weight is None:  # tanh's gradient needs its output, which the layer after this one may change in place
            bounded = bounded.clone()
        return scale_shift(bounded, self.weight, self.bias).to(x.dtype)


class DynamicErf(PerImageNorm):
    """Dynamic erf of (N, C, *space): y = γ erf(α x + s) + β, value by value.

    `alpha` α and `shift` s are one learned number each for the layer, γ and β are per channel. There are no
    statistics: training and evaluation are alike.

    Args:
        num_features: C.
        alpha: α at first.
        shift: s at first.
        affine: learn γ and β; α and s are learned in any case.
        device: the device of the parameters.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> x = torch.randn(2, 4, 6, 6)
        >>> torch.allclose(DynamicErf(4)(x), torch.erf(0.5 * x))
        True

    Source: Chen, Lu, Zhu, Sun and Liu 2025, "Stronger Normalization-Free Transformers", equation 10.
    """

    def __init__(
        self,
        num_features: int,
        alpha: float = 0.5,
        shift: float = 0.0,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, affine, device, dtype, bias=bias)
        self.initial_alpha = alpha
        self.alpha = nn.Parameter(torch.full((1,), float(alpha), device=device, dtype=dtype))
        self.initial_shift = shift
        self.shift = nn.Parameter(torch.full((1,), float(shift), device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set α, s, γ and β to what they were at first."""
        super().reset_parameters()
        nn.init.constant_(self.alpha, self.initial_alpha)
        nn.init.constant_(self.shift, self.initial_shift)

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        bounded = torch.erf(self.alpha * in_float32(x) + self.shift)
        return scale_shift(bounded, self.weight, self.bias).to(x.dtype)


register(
    "dynamic_tanh",
    DynamicTanh,
    summary="dynamic tanh: tanh(αx), value by value",
    about="no statistics: tanh(αx)",
    source="Zhu et al. 2025",
)
register(
    "dynamic_erf",
    DynamicErf,
    summary="dynamic erf: erf(αx + s), value by value",
    about="no statistics: erf(αx + s)",
    source="Chen et al. 2025",
)

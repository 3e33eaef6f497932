"""Filter response norm, and the thresholded linear unit that is its activation."""

import torch
from torch import Tensor, nn

from ..errors import check
from ..kernels.launch import check_memory
from .functional import per_channel
from .per_image import PerImageNorm, check_channels, in_float32, scale_shift
from .registry import register

# Where the paper has the learned part of ε start.
LEARNED_EPS = 1e-4


class ThresholdedLinearUnit(nn.Module):
    """The activation z = max(y, τ) of (N, C, *space), with a learned threshold `tau` τ per channel, at first 0.

    Args:
        num_features: C.
        device: of τ.
        dtype: of τ.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> ThresholdedLinearUnit(2)(torch.tensor([[-3.0, 5.0]])).tolist()  # τ is 0 at first: a ReLU
        [[0.0, 5.0]]

    Source: Singh and Krishnan 2019, "Filter Response Normalization Layer", equation 3.
    """

    def __init__(self, num_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        check(num_features >= 1, "num_features", num_features, "a whole number from 1")
        self.num_features = num_features
        self.tau = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def reset_parameters(self) -> None:
        """Set τ to 0."""
        nn.init.zeros_(self.tau)

    def forward(self, y: Tensor) -> Tensor:
        check_channels(self, y)
        check_memory((("tau", self.tau),))
        return torch.maximum(y, per_channel(self.tau, y).to(y.dtype))

    def extra_repr(self) -> str:
        return str(self.num_features)


class FilterResponseNorm(PerImageNorm):
    """Filter response norm of (N, C, *space) with its activation: z = max(γ x / √(ν² + ε) + β, τ).

    ν² is the mean of x² over space, per channel of each image, in training and in evaluation; no mean is taken off. γ,
    β and τ are per channel. It stands in the place of a norm and the activation after it.

    A 1×1 map has ν² = x², so that x / √(x² + ε) is a soft sign of x, the softer the larger ε. For such maps the paper
    learns ε: with `learn_eps` it is eps + |e|, where e, one number for the layer, is at first 1e-4.

    Args:
        num_features: C.
        eps: ε, or the least ε when it is learned.
        affine: learn γ and β; τ is learned in any case.
        learn_eps: learn ε, for maps of one or few values.
        device: the device of the parameters.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> FilterResponseNorm(4)(torch.randn(2, 4, 6, 6)).shape
        torch.Size([2, 4, 6, 6])
        >>> FilterResponseNorm(4, learn_eps=True)(torch.randn(2, 4, 1, 1)).shape
        torch.Size([2, 4, 1, 1])

    Source: Singh and Krishnan 2019, "Filter Response Normalization Layer", equations 1 to 3.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-6,
        affine: bool = True,
        learn_eps: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, affine, device, dtype, bias=bias)
        self.eps = eps
        self.learned_eps = (
            nn.Parameter(torch.full((1,), LEARNED_EPS, device=device, dtype=dtype)) if learn_eps else None
        )
        self.activation = ThresholdedLinearUnit(num_features, device, dtype)

    def reset_parameters(self) -> None:
        """Set γ, β, τ and e to what they were at first."""
        super().reset_parameters()
        self.activation.reset_parameters()
        if self.learned_eps is not None:
            nn.init.constant_(self.learned_eps, LEARNED_EPS)

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        # In float32, where eps is not lost beside |e|.
        eps = self.eps if self.learned_eps is None else in_float32(self.learned_eps).abs() + self.eps
        return self.activation(filter_response_norm(x, self.weight, self.bias, eps, mask))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}, learn_eps={self.learned_eps is not None}"


def filter_response_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float | Tensor = 1e-6,
    mask: Tensor | None = None,
) -> Tensor:
    """γ x / √(ν² + ε) + β, with ν² the mean of x² over space, per channel of each image, in the dtype of `x`.

    Args:
        x: (N, C, *space).
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        eps: ε, a number or a tensor of one.
        mask: (N, 1, *space), True where a value is in ν²; None for all.
    """
    wide = in_float32(x)
    square, space = wide * wide, tuple(range(2, x.dim()))
    if mask is not None and space:
        mean_square = torch.where(mask, square, 0).sum(space, keepdim=True) / mask.sum(space, keepdim=True).clamp(min=1)
    else:
        mean_square = square.mean(space, keepdim=True) if space else square
    return scale_shift(wide * (mean_square + eps).rsqrt(), weight, bias).to(x.dtype)


register(
    "filter_response",
    FilterResponseNorm,
    summary="filter response norm: each channel of each image; the activation too",
    activates=True,
    over="each image",
    about="the same, not centred, with a learned threshold as activation",
    source="Singh and Krishnan 2019",
)

"""Norms of each image by itself: group norm, and its two ends, layer norm and instance norm."""

import torch
from torch import Tensor, nn

from ..errors import check


class GroupNorm(nn.Module):
    """Group norm of (N, C, *space): y = γ (x − μ) / √(σ² + eps) + β, γ and β per channel.

    μ and σ² (biased) are taken per image over each group of C / num_groups channels and all of space, in training and
    in evaluation. A group of one value (a 1×1 map with a group a channel) gives y = β.

    Args:
        num_features: C.
        num_groups: a divisor of C.
        eps: added to the variance.
        affine: learn γ and β.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        InputError: `num_groups` does not divide `num_features`.

    Source: Wu and He 2018, "Group Normalization".
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int = 8,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check(num_features >= 1, "num_features", num_features, "a whole number from 1")
        divides = num_groups >= 1 and num_features % num_groups == 0
        check(divides, "num_groups", num_groups, f"a divisor of num_features={num_features}")
        self.num_features, self.num_groups, self.eps, self.affine = num_features, num_groups, eps, affine
        self.weight = nn.Parameter(torch.ones(num_features, device=device, dtype=dtype)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        # The operator itself: torch.nn.functional.group_norm refuses groups of one value.
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, num_groups={self.num_groups}, eps={self.eps}, affine={self.affine}"


class LayerNorm(GroupNorm):
    """Layer norm of (N, C, *space): per image over channels and space, γ and β per channel; group norm of one group.

    Source: Ba, Kiros and Hinton 2016, "Layer Normalization".
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, 1, eps, affine, device, dtype)


class InstanceNorm(GroupNorm):
    """Instance norm of (N, C, *space): per image and channel over space, γ and β per channel; a group a channel.

    What follows a pool over all of space sees the same mean, β, for every image: not for the last layer of a
    classifier.

    Source: Ulyanov, Vedaldi and Lempitsky 2016, "Instance Normalization".
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(num_features, num_features, eps, affine, device, dtype)

"""Switchable norm: a learned mixture of instance, layer and batch norm."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from . import functional as F
from .base import RunningStatistics
from .functional import moments, normalize
from .per_image import instance_moments
from .registry import register

Moments = tuple[Tensor, Tensor]


class SwitchableNorm(RunningStatistics):
    """Switchable norm of (N, C, *space); see `SwitchableNorm2d`."""

    averages, needs_statistics = True, False
    mean_weight: nn.Parameter
    var_weight: nn.Parameter

    def first_parameters(self) -> dict[str, tuple[int, float]]:
        return {"mean_weight": (3, 1.0), "var_weight": (3, 1.0)}

    def in_training(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if mask is None:
            y, batch = switchable_norm(x, *self._mixture())
            count: int | Tensor = x.numel() // self.num_features
        else:
            mean, var, count = F.masked_moments(x, mask)
            batch = mean, var
            kept = F.unless_empty(count, batch, (self.running_mean, self.running_var))
            y, _ = switchable_norm(x, *self._mixture(), batch=kept, mask=mask)
        if self.training:
            self.remember_moments(*batch, count)
        return y

    def in_evaluation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        # Copies, because the gradient of the mixture needs them as they are now.
        mean, var = (part.clone() for part in F.unless_none((self.running_mean, self.running_var), x))
        return switchable_norm(x, *self._mixture(), batch=(mean, var), mask=mask)[0]

    def _mixture(self) -> tuple[Any, ...]:
        return self.mean_weight, self.var_weight, self.weight, self.bias, self.eps


class SwitchableNorm1d(SwitchableNorm):
    """Switchable norm of (N, C) or (N, C, L); see `SwitchableNorm2d`.

    (N, C) has no space for an instance part: there the mixture is of layer and batch alone, as in the authors' code.

    Example:
        >>> SwitchableNorm1d(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class SwitchableNorm2d(SwitchableNorm):
    """Switchable norm of (N, C, H, W): y = γ (x − Σₖ wₖ μₖ) / √(Σₖ w'ₖ σₖ² + eps) + β, k = instance, layer, batch.

    The means and biased variances are taken over space (instance), over channels and space (layer), over batch and
    space (batch). w is the softmax of the three learned numbers `mean_weight`, w' that of `var_weight`, both thirds at
    first. In training the gradient flows through every part. In evaluation the running statistics stand for the batch
    part; they move by `momentum` towards μ and the unbiased variance, as batch norm's do.

    With one image the batch part is the instance part. A batch of one value a channel moves the running mean, while
    the running variance, of which one value says nothing, stays.

    The paper evaluates with a plain average over some batches of the trained net ("batch average"), the moving average
    here is the other choice of the authors' code.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch in the running statistics, above 0, to 1.
        affine: learn γ and β; the mixture is learned in any case.
        track_running_stats: keep statistics; without, evaluation is as training.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> norm = SwitchableNorm2d(4)
        >>> norm(torch.randn(2, 4, 5, 5)).shape
        torch.Size([2, 4, 5, 5])
        >>> norm.mean_weight.tolist()  # instance, layer, batch: their softmax is a third each
        [1.0, 1.0, 1.0]

    Source: Luo, Ren, Peng, Zhang and Li 2018, "Differentiable Learning-to-Normalize via Switchable Normalization",
    equations 3 to 5.
    """

    accepted_dims = (4,)


class SwitchableNorm3d(SwitchableNorm):
    """Switchable norm of (N, C, D, H, W); see `SwitchableNorm2d`.

    Example:
        >>> SwitchableNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


def switchable_norm(
    x: Tensor,
    mean_weight: Tensor,
    var_weight: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    batch: Moments | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Moments]:
    """γ (x − Σₖ wₖ μₖ) / √(Σₖ w'ₖ σₖ² + eps) + β, in the dtype of `x`; see `SwitchableNorm2d`.

    Args:
        x: (N, C, *space).
        mean_weight: (3,), for instance, layer and batch; its softmax is w. (N, C) leaves out the first.
        var_weight: the same for w'.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        eps: added to the variance.
        batch: mean and variance of the batch part, which broadcast against `x`, or None for those of `x`.
        mask: (N, 1, *space), True where a value is in the instance and layer parts; None for all.

    Returns:
        y, and the mean and the biased variance of the batch part.
    """
    instance = instance_moments(x, mask)
    batch = _pooled(*instance, dim=0) if batch is None else batch
    parts = (_pooled(*instance, dim=1), batch) if x.dim() == 2 else (instance, _pooled(*instance, dim=1), batch)
    mean = _mixed(mean_weight, [mean for mean, _ in parts])
    var = _mixed(var_weight, [var for _, var in parts])
    return normalize(x, mean, var, weight, bias, eps), batch


def _pooled(mean: Tensor, var: Tensor, dim: int) -> Moments:
    """Mean and variance over `dim` too: the mean of the variances there plus the variance of the means."""
    pooled, between = moments(mean, (dim,))
    return pooled, var.mean(dim, keepdim=True) + between


def _mixed(weight: Tensor, parts: Sequence[Tensor]) -> Tensor:
    """Σₖ softmax(weight)ₖ partₖ, over as many of the last weights as there are parts."""
    shares = weight[-len(parts) :].to(parts[0].dtype).softmax(0)
    mixed = shares[0] * parts[0]
    for share, part in zip(shares[1:], parts[1:], strict=True):
        mixed = mixed + share * part
    return mixed


register(
    "switchable",
    SwitchableNorm1d,
    SwitchableNorm2d,
    SwitchableNorm3d,
    summary="switchable norm: a learned mixture of instance, layer and batch norm",
    over="this batch",
    about="a learned mixture of instance, layer and batch norm",
    source="Luo et al. 2018",
    cost=3.0,
)

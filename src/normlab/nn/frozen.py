"""Frozen batch norm: constant statistics, in training as in evaluation."""

import torch
from torch import Tensor, nn

from ..kernels import autograd, policy
from .base import RunningStatistics
from .registry import register


class FrozenBatchNorm(RunningStatistics):
    """Frozen batch norm of (N, C, *space); see `FrozenBatchNorm2d`."""

    _checks_memory = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ):
        super().__init__(num_features, eps, 0.1, affine, track_running_stats, device, dtype, bias=bias)

    def _by_running_ones(self, x: Tensor) -> bool:
        return True

    def in_evaluation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        parts = self._parts_for_kernels(x, policy.for_constants)
        if parts is not None:
            mean, var, _ = parts.state
            return autograd.frozen_norm(x, mean, var, parts.weight, parts.bias, self.eps, slope=1.0)
        self._check_memory(x)
        return super().in_evaluation(x, mask)

    def _scripted(self, input: Tensor) -> Tensor:
        mean, var = self.running_mean, self.running_var
        return nn.functional.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, affine={self.affine}"


class FrozenBatchNorm1d(FrozenBatchNorm):
    """Frozen batch norm of (N, C) or (N, C, L); see `FrozenBatchNorm2d`.

    Example:
        >>> FrozenBatchNorm1d(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class FrozenBatchNorm2d(FrozenBatchNorm):
    """Batch norm of (N, C, H, W) with constant statistics: y = γ (x − μ) / √(σ² + eps) + β, per channel.

    μ and σ² are `running_mean` and `running_var`, in training as in evaluation: no batch changes them, whatever mode
    the model is in, and no image has a part in another's output. γ and β learn, unless their `requires_grad` is False.
    Its state is that of a batch norm. A layer that was never given a trained one's statistics only scales and shifts.

    Args:
        num_features: C.
        eps: added to the variance.
        affine: learn γ and β.
        track_running_stats: True; see `RunningStatistics`.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> trained = torch.nn.BatchNorm2d(4)
        >>> norm = FrozenBatchNorm2d(4)
        >>> norm.load_state_dict(trained.state_dict())
        <All keys matched successfully>
        >>> x = torch.randn(2, 4, 5, 5)
        >>> torch.allclose(norm(x), trained.eval()(x), atol=1e-5)
        True

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", the implementation's fine-tuning for
    detection, where a batch is one or two images.
    """

    accepted_dims = (4,)


class FrozenBatchNorm3d(FrozenBatchNorm):
    """Frozen batch norm of (N, C, D, H, W); see `FrozenBatchNorm2d`.

    Example:
        >>> FrozenBatchNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


register(
    "frozen",
    FrozenBatchNorm1d,
    FrozenBatchNorm2d,
    FrozenBatchNorm3d,
    summary="frozen batch norm: each channel with constant statistics",
    about="each channel with the constant statistics of a trained batch norm",
    source="He et al. 2016",
)

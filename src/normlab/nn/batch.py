"""Batch norm, as torch has it, with a defined result where torch refuses or would spoil its statistics."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..kernels import fused, operators
from ..kernels.ops import CHANNELS_LAST
from . import functional as F
from .activation import SLOPES, activate, check_activation, check_residual, described
from .base import PreciseStatistics, recomputing, remember


class _Batch(PreciseStatistics, _BatchNorm):
    """A torch batch norm that writes its statistics by the rules of all norms here, see `remember`."""

    activation: str | None
    accepted_dims: tuple[int, ...] = ()  # of a tensor, beyond those of the class

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
        activation: str | None = None,
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.activation = check_activation(activation)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(x)
        if residual is not None:
            check_residual(x, residual)
        own = self.training or self.running_mean is None  # statistics of this batch
        if x.numel() > x.size(1) == self.num_features and operators.preferred(x, own):  # several values a channel
            taken = self._taken(x, residual)
            if taken is not None:
                return self._fast(x, taken, own, residual)
        return activate(self._composed(x), self.activation, residual)

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self.accepted_dims:
            super()._check_input_dim(input)

    def extra_repr(self) -> str:
        return super().extra_repr() + described(self.activation)

    def _composed(self, x: Tensor) -> Tensor:
        """The norm in torch's operators."""
        if torch.is_grad_enabled() and x.dim() > 3 and not torch.compiler.is_compiling() and 1 in x.shape:
            # Where a size is 1 strides can mean either memory format, of which torch's backward pass mistakes one for
            # the other: its gradient is wrong.
            layout = CHANNELS_LAST[x.dim()]
            last = x.is_contiguous(memory_format=layout) and not x.is_contiguous()
            y = self._composed(x.flatten(2)).reshape(x.shape)
            return y.contiguous(memory_format=layout) if last else y
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if part is None else part.to(dtype) for part in (self.weight, self.bias))
        mean, var = self.running_mean, self.running_var
        if x.numel() == 0 or not (self.training or mean is None):  # an empty batch has no statistics of its own
            mean = x.new_zeros(self.num_features, dtype=dtype) if mean is None else mean
            var = x.new_ones(self.num_features, dtype=dtype) if var is None else var
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                mean, var = mean.clone(), var.clone()  # a buffer written meanwhile would end the backward pass
            return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if x.numel() == x.shape[1] == self.num_features:
            # torch raises here, because the unbiased variance would be 0/0: of the variance one value says nothing.
            self._remember(x.detach().flatten(), var)
            return F.batch_norm(x, weight, bias, self.eps)
        if mean is None:  # ONNX, given the two below, would take them for running statistics
            return nn.functional.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        batch_mean, batch_var = x.new_zeros(2, self.num_features, dtype=dtype)
        y = nn.functional.batch_norm(x, batch_mean, batch_var, weight, bias, True, 1.0, self.eps)
        self._remember(batch_mean, batch_var)
        return y

    def _fast(self, x: Tensor, taken: tuple[Any, ...], own: bool, residual: Tensor | None) -> Tensor:
        """What `forward` computes, by the kernels; with the batch's `own` statistics or the running ones."""
        weight, bias, mean, var = taken[:4]
        slope = SLOPES[self.activation]
        if not own:
            return fused.frozen_norm(x, mean, var, weight, bias, self.eps, slope, residual)
        keeps = self.training and mean is not None and not recomputing()
        entered = fused.BatchStatistics._make(taken[2:5]) if keeps else None
        return fused.batch_norm(x, weight, bias, entered, self.momentum, self.eps, slope, residual)

    def _remember(self, mean: Tensor, var: Tensor | None) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None or var is None:
            return
        batches = self.num_batches_tracked + 1
        share = batches.reciprocal() if self.momentum is None else self.momentum
        remember(
            (self.running_mean, torch.lerp(self.running_mean, mean.to(self.running_mean.dtype), share)),
            (self.running_var, torch.lerp(self.running_var, var.to(self.running_var.dtype), share)),
            (self.num_batches_tracked, batches),
        )


class BatchNorm2d(_Batch, nn.BatchNorm2d):
    """Batch norm of (N, C, H, W): y = γ (x − μ) / √(σ² + eps) + β, per channel.

    In training μ and σ² are the mean and the biased variance over batch and space, and the gradient flows through
    them; the running statistics move by `momentum` towards μ and the unbiased variance. In evaluation μ and σ² are
    the running statistics. It is `torch.nn.BatchNorm2d`, arguments, state and all, but for these cases. A batch of one
    value a channel (one image, 1×1 map) gives y = β and moves the running mean, while the running variance, of which
    one value says nothing, stays. A batch that holds an infinite value or NaN leaves the statistics alone, and so do
    an empty batch and the second forward pass of an activation checkpoint that is not compiled. Cast to half precision
    the layer keeps its statistics in float32. `momentum=None` compiles without a break.

    With `activation="relu"` or `"leaky_relu"` (of slope .01) the layer is that activation too: the same values and
    gradients as with one after it, in less time, and without a tensor between the two. `layer(x, residual)`, with a
    tensor like `x`, adds it before the activation: the end of a residual block.

    Source: Ioffe and Szegedy 2015, "Batch Normalization".
    """


class BatchNorm1d(_Batch, nn.BatchNorm1d):
    """Batch norm of (N, C) or (N, C, L); see `BatchNorm2d`."""


class BatchNorm3d(_Batch, nn.BatchNorm3d):
    """Batch norm of (N, C, D, H, W); see `BatchNorm2d`."""

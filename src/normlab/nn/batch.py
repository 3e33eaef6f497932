"""Batch norm, as torch has it, with a defined result where torch refuses or would spoil its statistics."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..errors import InputError
from ..kernels import autograd, policy
from ..kernels.plain import CHANNELS_LAST
from . import functional as F
from .activation import SLOPES, activate, check_activation, described, scripted_activation
from .base import Parts, PreciseStatistics, is_tracing, recomputing
from .call import call, for_script, refuse_shape
from .registry import register


class _Batch(PreciseStatistics, _NormBase):
    """A torch batch norm that writes its statistics by the rules of all norms here, see `remember`."""

    activation: str | None
    accepted_dims: tuple[int, ...]  # of a tensor
    averages = True
    _checks_memory = True

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
        bias: bool = True,
        activation: str | None = None,
    ):
        if activation is not None and isinstance(self, _BatchNorm):  # torch's tools would replace it, and lose that
            kind = type(self).__name__
            raise InputError(f"{kind}: a class with an activation is derived from BatchNormAct1d, 2d or 3d.")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.activation = check_activation(activation)

    @for_script
    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The norm of `input`, and its activation of the sum with `residual`; see `OnKernels.forward`."""
        return call(self, input, mask, residual)

    def _normalize(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(x)
        mean = self.running_mean
        own = self.training or mean is None  # statistics of this batch
        if mask is not None and own:
            self._check_memory(x, residual)
            return activate(self._masked(x, mask), self.activation, residual)
        # Several values a channel. Not `num_features`: a norm that was pruned may hold fewer.
        fits = not is_tracing() and x.numel() > x.size(1) and (mean is None or len(mean) == x.size(1))
        use = policy.for_statistics if own else policy.for_constants
        parts = self._parts_for_kernels(x, use, residual) if fits else None
        if parts is not None:
            return self._by_kernels(x, parts, own, residual)
        self._check_memory(x, residual)
        return activate(self._composed(x), self.activation, residual)

    def _check_input_dim(self, input: Tensor) -> None:
        own = self.running_mean if self.weight is None else self.weight  # fewer than `num_features`, once pruned
        channels = None if own is None or is_tracing() else len(own)
        if input.dim() not in self.accepted_dims or (channels is not None and input.shape[1] != channels):
            refuse_shape(self, input, channels or self.num_features, self.accepted_dims)

    def _scripted(self, input: Tensor) -> Tensor:
        mean, var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        momentum, activation = self.momentum, self.activation
        share = 0.0 if momentum is None else momentum
        if self.training and not self.track_running_stats:
            mean, var = None, None
        elif self.training and batches is not None:
            batches.add_(1)
            if momentum is None:
                share = 1.0 / float(batches)
        own = self.training or mean is None
        y = nn.functional.batch_norm(input, mean, var, self.weight, self.bias, own, share, self.eps)
        return scripted_activation(y, activation)

    def extra_repr(self) -> str:
        return super().extra_repr() + described(self.activation)

    def _composed(self, x: Tensor) -> Tensor:
        """The norm in torch's operators."""
        plainly = not torch.compiler.is_compiling() and not is_tracing()
        if torch.is_grad_enabled() and x.dim() > 3 and plainly and 1 in x.shape:
            # Where a size is 1 strides can mean either memory format. Torch's backward pass mistakes one for the other,
            # and its gradient is wrong.
            layout = CHANNELS_LAST[x.dim()]
            last = x.is_contiguous(memory_format=layout) and not x.is_contiguous()
            y = self._composed(x.flatten(2)).reshape(x.shape)
            return y.contiguous(memory_format=layout) if last else y
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (None if part is None else part.to(dtype) for part in (self.weight, self.bias))
        mean, var = self.running_mean, self.running_var
        channels = x.shape[1] if mean is None else len(mean)
        if not (self.training or mean is None) or x.numel() == 0:  # an empty batch has no statistics of its own
            mean = x.new_zeros(channels, dtype=dtype) if mean is None else mean
            var = x.new_ones(channels, dtype=dtype) if var is None else var
            if torch.is_grad_enabled() and plainly:
                mean, var = mean.clone(), var.clone()  # a buffer written meanwhile would end the backward pass
            return nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        if x.numel() == x.shape[1] == channels:
            # torch raises here, because the unbiased variance would be 0/0: one value says nothing about the variance.
            self._remember(x.detach().flatten(), var)
            return F.batch_norm(x, weight, bias, self.eps)
        if (
            mean is None or not self.track_running_stats
        ):  # ONNX, given the two below, would take them for running statistics
            return _by_the_batch(x, None, None, weight, bias, 0.0, self.eps)
        batch_mean, batch_var = x.new_zeros(2, channels, dtype=dtype)
        y = _by_the_batch(x, batch_mean, batch_var, weight, bias, 1.0, self.eps)
        self._remember(batch_mean, batch_var)
        return y

    def _by_kernels(self, x: Tensor, parts: Parts, own: bool, residual: Tensor | None) -> Tensor:
        """What `forward` computes, with the batch's `own` statistics or the running ones."""
        (weight, bias, state), slope = parts, SLOPES[self.activation]
        if not own:
            mean, var, _ = state
            return autograd.frozen_norm(x, mean, var, weight, bias, self.eps, slope, residual)
        keeps = self.training and state.running_mean is not None and self.track_running_stats and not recomputing()
        kept = state if keeps else None
        return autograd.batch_norm(x, weight, bias, kept, self.momentum, self.eps, slope, residual)

    def _remember(self, mean: Tensor, var: Tensor | None) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None or var is None:
            return
        share = self._share()
        self._keep(
            (self.running_mean, torch.lerp(self.running_mean, mean.to(self.running_mean.dtype), share)),
            (self.running_var, torch.lerp(self.running_var, var.to(self.running_var.dtype), share)),
            (self.num_batches_tracked, self.num_batches_tracked + 1),
        )

    def _masked(self, x: Tensor, mask: Tensor) -> Tensor:
        """The norm with the statistics of the values where `mask` is True."""
        mean, var, count = F.masked_moments(x, mask)
        self._average(mean.detach().flatten(), var.detach().flatten(), count)
        mean, var = F.unless_empty(count, (mean, var), (self.running_mean, self.running_var))
        return F.normalize(x, mean, var, self.weight, self.bias, self.eps)


def _by_the_batch(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    share: float,
    eps: float,
) -> Tensor:
    """Batch norm by torch's operator itself: `nn.functional.batch_norm` refuses eps=0, which the kernels take."""
    return torch.batch_norm(x, weight, bias, mean, var, True, share, eps, torch.backends.cudnn.enabled)


class BatchNormAct2d(_Batch):
    """Batch norm of (N, C, H, W) with an activation, in one: what `BatchNorm2d(…, activation="relu")` makes.

    It is no `torch.nn.BatchNorm2d`: torch's tools that put another layer in the place of each, such as
    `SyncBatchNorm.convert_sync_batchnorm`, would drop the activation.

    Example:
        >>> norm = BatchNorm2d(4, activation="relu")
        >>> type(norm).__name__, bool((norm(torch.randn(2, 4, 5, 5)) >= 0).all())
        ('BatchNormAct2d', True)
    """

    accepted_dims = (4,)


class BatchNormAct1d(_Batch):
    """Batch norm of (N, C) or (N, C, L) with an activation; see `BatchNormAct2d`.

    Example:
        >>> BatchNormAct1d(4, activation="relu")(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims = (2, 3)


class BatchNormAct3d(_Batch):
    """Batch norm of (N, C, D, H, W) with an activation; see `BatchNormAct2d`.

    Example:
        >>> BatchNormAct3d(4, activation="relu")(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


class _OfTorch:
    """A layer that is of torch's class too. With an activation it is made a `with_activation`, which is not."""

    with_activation: type[_Batch]

    def __new__(cls, *arguments: Any, activation: str | None = None, **options: Any) -> Any:
        if activation is not None and "with_activation" in cls.__dict__:
            return cls.with_activation(*arguments, activation=activation, **options)
        return super().__new__(cls)


class BatchNorm2d(_Batch, _OfTorch, nn.BatchNorm2d):
    """Batch norm of (N, C, H, W): y = γ (x − μ) / √(σ² + eps) + β, per channel.

    In training μ and σ² are the mean and the biased variance over batch and space, and the gradient flows through
    them; the running statistics move by `momentum` towards μ and the unbiased variance. In evaluation μ and σ² are
    the running statistics. It is a `torch.nn.BatchNorm2d` with the same arguments and state. It differs in these cases:

    - A batch of one value a channel (one image, 1×1 map) gives y = β. It moves the running mean; the running variance
      stays, since one value says nothing about it.
    - A batch that holds an infinite value or NaN leaves the statistics alone. So does an empty batch, and so does the
      second forward pass of an activation checkpoint that is not compiled.
    - A layer cast to half precision keeps its statistics in float32.
    - `momentum=None` compiles without a break.

    With `activation="relu"` or `"leaky_relu"` (slope 0.01) the layer is that activation too. Values and gradients are
    the same as with one after it, in less time and memory. The layer is then a `BatchNormAct2d`, not of torch's class.
    `layer(x, residual=r)` adds r, a tensor like `x`, before the activation: the end of a residual block.
    `layer(x, mask=m)`, with m bool, (N, H, W), takes the statistics of the values where m is True, and normalises all
    values by them.

    Example:
        >>> norm = BatchNorm2d(4)
        >>> norm(torch.full((1, 4, 1, 1), 7.0)).flatten().tolist()  # one value a channel, which torch refuses
        [0.0, 0.0, 0.0, 0.0]
        >>> isinstance(norm, torch.nn.BatchNorm2d)
        True

    Source: Ioffe and Szegedy 2015, "Batch Normalization".
    """

    accepted_dims, with_activation = (4,), BatchNormAct2d


class BatchNorm1d(_Batch, _OfTorch, nn.BatchNorm1d):
    """Batch norm of (N, C) or (N, C, L); see `BatchNorm2d`.

    Example:
        >>> BatchNorm1d(4)(torch.randn(6, 4, 5)).shape
        torch.Size([6, 4, 5])
    """

    accepted_dims, with_activation = (2, 3), BatchNormAct1d


class BatchNorm3d(_Batch, _OfTorch, nn.BatchNorm3d):
    """Batch norm of (N, C, D, H, W); see `BatchNorm2d`.

    Example:
        >>> BatchNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

    accepted_dims, with_activation = (5,), BatchNormAct3d


register(
    "batch",
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    summary="batch norm: each channel over this batch",
    over="this batch",
    about="torch's batch norm, defined for a single value a channel too",
    source="Ioffe and Szegedy 2015",
)

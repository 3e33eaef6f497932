"""Norms by the compiled kernels, with their gradients: one kernel a pass.

Each takes what `dispatch.takes` says. Under a compiler the passes are operators of `torch.library` (see `operators`).
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, operators, ops


class BatchStatistics(NamedTuple):
    """Buffers of a batch norm layer, by their names there: float32, and the last int64."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


class RunningStatistics(NamedTuple):
    """Buffers of a running batch norm layer, by their names there: float32, but for `num_batches_tracked`, int64."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    share: Tensor
    innovation: Tensor
    gradient_share: Tensor


class RunningNumbers(NamedTuple):
    """The numbers of running batch norm.

    Attributes:
        momentum: how fast the share adapts.
        eps: added to the variance.
        least_share: below which the share in the statistics does not fall.
        least_gradient_share: likewise, in the averages of the backward pass.
        tolerated_drift: N times the cosine of innovation and push at which the latter stays.
        recomputing: this batch is in the statistics already.
    """

    momentum: float
    eps: float
    least_share: float
    least_gradient_share: float
    tolerated_drift: float
    recomputing: bool


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """As `function.apply`, without what that does for `torch.func`, where `takes` is false, and without gradients."""
    if not torch.is_grad_enabled():
        return function.forward(_NoContext(), *arguments)
    return super(torch.autograd.Function, function).apply(*arguments)  # pyright: ignore[reportAttributeAccessIssue]


class _NoContext:
    def save_for_backward(self, *_: Any) -> None:
        """There is no backward pass."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: BatchStatistics | None,
    momentum: float | None,
    eps: float,
    slope: float,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch norm with the mean and variance of this batch, which enter `statistics` unless they are infinite or NaN.

    Args:
        x: (N, C, *space).
        weight: γ, (C,), float32, or None for 1.
        bias: β, likewise, or None for 0.
        statistics: changed by this call.
        momentum: weight of this batch in `statistics`; if None, one over the batches seen.
        eps: added to the variance.
        slope: of the activation after the norm where it is below 0, from 0 (ReLU) to 1 (none).
        residual: as `x`; added before the activation.
    """
    momentum = -1.0 if momentum is None else momentum
    if torch.compiler.is_compiling():
        kept = statistics or (None, None, None)
        numbers = momentum, eps, slope if residual is None else 1.0
        return _added(operators.BatchNorm.apply(x, weight, bias, *kept, *numbers), residual, slope)
    return _apply(_ChannelNorm, x, weight, bias, residual, None, statistics, momentum, eps, slope, 1.0)


def frozen_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
    residual: Tensor | None = None,
) -> Tensor:
    """γ (x − mean) / √(var + eps) + β with constant `mean` and `var`, (C,), float32; arguments as in `batch_norm`."""
    return _apply(_ChannelNorm, x, weight, bias, residual, (mean, var), None, 0.0, eps, slope, 0.0)


def batch_norm_of(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm with the mean and the biased variance of `x`, known already; arguments as in `batch_norm`."""
    return _apply(_ChannelNorm, x, weight, bias, None, (mean, var), None, 0.0, eps, 1.0, 1.0)


def running_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: RunningStatistics,
    memory: ops.GradientMemory,
    numbers: RunningNumbers,
    step_bound: float | None,
    slope: float,
    residual: Tensor | None = None,
) -> Tensor:
    """Running batch norm; see `RunningBatchNorm2d`.

    Args:
        x: (N, C, *space).
        weight: γ, (C,), float32, or None for 1.
        bias: β, likewise, or None for 0.
        statistics: changed by this call, unless a value would become infinite or NaN.
        memory: changed by each backward pass; likewise.
        numbers: of the layer.
        step_bound: see `ops.normalize_with_memory`.
        slope: as in `batch_norm`.
        residual: likewise.
    """
    step_bound = -1.0 if step_bound is None else step_bound
    if torch.compiler.is_compiling():
        rest = *numbers[:-1], step_bound, slope if residual is None else 1.0
        return _added(operators.RunningNorm.apply(x, weight, bias, *statistics, *memory, *rest), residual, slope)
    return _apply(_RunningNorm, x, weight, bias, residual, statistics, memory, numbers, step_bound, slope)


def _added(y: Tensor, residual: Tensor | None, slope: float) -> Tensor:
    return y if residual is None else ops.activate(y + residual, slope)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> Tensor:
    """Group norm: of each image by itself, over `num_groups` groups of channels and space; as in `batch_norm`."""
    if torch.compiler.is_compiling():
        return operators.GroupNorm.apply(x, weight, bias, num_groups, eps, slope)
    return _apply(_GroupNorm, x, weight, bias, num_groups, eps, slope)


def position_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float) -> Tensor:
    """Norm of each position of each image over the channels: layer norm if `centred`, else RMS norm; not compiled.

    Args:
        x: (N, C, *space).
        weight: γ, (C,), float32, or None for 1.
        bias: β, likewise, or None for 0.
        centred: whether the mean is subtracted.
        eps: added to the variance, or the mean square.
    """
    return _apply(_PositionNorm, x, weight, bias, centred, eps)


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, known, statistics, momentum, eps, slope, share):
        """Types as in `batch_norm`, but for `known`, mean and variance if they are, and the batch's share in them."""
        ctx.eps, ctx.share = eps, share
        if known is not None:
            return _forward_added(ctx, x, weight, bias, residual, slope, "frozen_forward", known, eps)
        statistics = statistics or (None, None, None)
        return _forward_added(ctx, x, weight, bias, residual, slope, "batch_forward", statistics, momentum, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if torch.is_grad_enabled():  # these gradients are to be differentiated
            x, weight, bias, saved, y = ctx.saved_tensors
            norm, grad = _composed(x, weight, bias, None if ctx.share else saved, ctx.eps), grads[0]
            if y is not None:
                grad = torch.where(y > 0, grad, ctx.slope * grad)
            found = _again(norm, 1.0 if y is not None else ctx.slope, (x, weight, bias), grad)
            return *found, grad if ctx.needs_input_grad[3] else None, None, None, None, None, None, None
        found = _backward_added(ctx, grads[0], "batch_backward", (), ctx.share)
        return *found, None, None, None, None, None, None


class _RunningNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, statistics, memory, numbers, step_bound, slope):  # types: running_norm
        kept = (*statistics, *memory[:2])
        y = _forward_added(ctx, x, weight, bias, residual, slope, "running_forward", kept, *numbers)
        # Not saved: it may change before this backward pass, by that of another batch.
        ctx.memory, ctx.step_bound = memory, step_bound
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        # The decorator takes longer than small layers do, and does nothing unless the gradient is to have a gradient.
        return (_once if torch.is_grad_enabled() else _running_backward)(ctx, *grads)


def _running_backward(ctx: Any, *grads: Tensor):
    learns = all(ctx.needs_input_grad[1:3])
    numbers = ctx.result, ctx.step_bound, learns
    return *_backward_added(ctx, grads[0], "running_backward", ctx.memory, *numbers), None, None, None, None, None


_once = once_differentiable(_running_backward)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, slope):  # types: group_norm
        ctx.num_groups, ctx.eps = num_groups, eps
        return _forward(ctx, x, weight, bias, len(x) * num_groups, slope, "group_forward", (), num_groups, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if torch.is_grad_enabled():
            x, weight, bias, _ = ctx.saved_tensors
            y = torch.group_norm(x, ctx.num_groups, weight, bias, ctx.eps)
            return *_again(y, ctx.slope, (x, weight, bias), grads[0]), None, None, None
        return *_backward(ctx, grads[0], "group_backward", (), ctx.num_groups), None, None, None


class _PositionNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, centred, eps):  # types: position_norm
        ctx.centred, ctx.eps = centred, eps
        return _forward(ctx, x, weight, bias, x.numel() // x.shape[1], 1.0, "position_forward", (), centred, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if torch.is_grad_enabled():
            x, weight, bias, _ = ctx.saved_tensors
            distance = x.float() - x.float().mean(1, keepdim=True) if ctx.centred else x.float()
            x_hat = distance * (distance.square().mean(1, keepdim=True) + ctx.eps).rsqrt()
            return *_again(_scaled(x_hat, weight, bias).to(x.dtype), 1.0, (x, weight, bias), grads[0]), None, None
        return *_backward(ctx, grads[0], "position_backward", (), ctx.centred), None, None


def _forward(ctx, x, weight, bias, parts, slope, kernel, statistics, *numbers):
    """The output of a norm that has `parts` means and 1/√(var + eps); they are saved for `_backward`."""
    ctx.slope = slope
    x, ctx.described = dispatch.describe(x)
    numbers = parts, slope, kernel, statistics, *numbers
    y, saved, ctx.result = dispatch.forward(x, ctx.described, weight, bias, *numbers)
    ctx.save_for_backward(x, weight, bias, saved)
    return y


def _backward(ctx, grad, kernel, memory, *numbers):
    """The gradients of `x`, γ and β; None for those that want none."""
    x, weight, bias, saved = ctx.saved_tensors
    numbers = ctx.slope, kernel, memory, *numbers
    found = dispatch.backward(grad, x, ctx.described, weight, bias, saved, *numbers)
    return operators.wanted(ctx, found)


def _forward_added(ctx, x, weight, bias, residual, slope, kernel, statistics, *numbers):
    """As `_forward`, of a norm of channels to which `residual`, if there is one, is added."""
    ctx.slope = slope
    x, ctx.described = dispatch.describe(x)
    if residual is not None:
        residual = residual.contiguous(memory_format=ctx.described.layout)
    numbers = x.shape[1], slope, kernel, (residual, *statistics), *numbers
    y, saved, ctx.result = dispatch.forward(x, ctx.described, weight, bias, *numbers)
    # With a residual the norm alone does not say what the activation let through.
    ctx.save_for_backward(x, weight, bias, saved, None if residual is None or slope == 1 else y)
    return y


def _backward_added(ctx, grad, kernel, memory, *numbers):
    """As `_backward`, after `_forward_added`; and the gradient of the residual."""
    x, weight, bias, saved, y = ctx.saved_tensors
    slope = ctx.slope
    if y is not None:
        grad, slope = dispatch.activation_backward(y, grad, ctx.described, slope), 1.0
    found = dispatch.backward(grad, x, ctx.described, weight, bias, saved, slope, kernel, memory, *numbers)
    return *operators.wanted(ctx, found), grad if ctx.needs_input_grad[3] else None


def _again(y: Tensor, slope: float, inputs: Iterable[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The gradients of `inputs`, to be differentiated, where the norm is `y`; None for those that want none."""
    y = ops.activate(y, slope)
    wanted = [part for part in inputs if part is not None and part.requires_grad]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if part is not None and part.requires_grad else None for part in inputs]


def _composed(x, weight, bias, saved, eps):
    """A norm of channels in torch's operators; with the statistics of `x` if `saved` is None."""
    along = (-1, *[1] * (x.dim() - 2))
    if saved is None:
        var, mean = torch.var_mean(x.float(), (0, *range(2, x.dim())), correction=0, keepdim=True)
        inverse = (var + eps).rsqrt()
    else:
        mean, inverse = (part.view(along) for part in saved)
    return _scaled((x - mean) * inverse, weight, bias).to(x.dtype)


def _scaled(x_hat, weight, bias):
    along = (-1, *[1] * (x_hat.dim() - 2))
    y = x_hat if weight is None else x_hat * weight.view(along)
    return y if bias is None else y + bias.view(along)

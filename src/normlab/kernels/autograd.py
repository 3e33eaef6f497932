"""Norms by the kernels, with their gradients: one kernel a pass, an operator of `library`.

Each takes what `policy.takes` says.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import launch, library, plain, running  # noqa: F401 - `library` defines the operators

# By attribute each would take as long as a part of a kernel does.
_BATCH_FORWARD, _BATCH_BACKWARD = torch.ops.normlab.batch_forward.default, torch.ops.normlab.batch_backward.default
_RUNNING_FORWARD = torch.ops.normlab.running_forward.default
_RUNNING_BACKWARD = torch.ops.normlab.running_backward.default
_GROUP_FORWARD, _GROUP_BACKWARD = torch.ops.normlab.group_forward.default, torch.ops.normlab.group_backward.default
_FROZEN_FORWARD = torch.ops.normlab.frozen_forward.default
_MIXED_FORWARD = torch.ops.normlab.running_instance_forward.default
_MIXED_BACKWARD = torch.ops.normlab.running_instance_backward.default


class Statistics(NamedTuple):
    """The buffers of a norm with running statistics, by their names there: float32, and the last int64."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor


class RunningNumbers(NamedTuple):
    """The numbers of one running batch norm.

    Attributes:
        momentum: how fast the shares adapt.
        eps: added to the variance.
        recomputing: this batch is in the statistics already.
    """

    momentum: float
    eps: float
    recomputing: bool


class Gate(NamedTuple):
    """What the share of instance norm is made of: s = min(1, max(0, speed · gate)) · known.

    Attributes:
        gate: (C,), float32.
        speed: how fast s moves, where γ has a speed of 1.
        known: how well a map knows its own mean, from 0 to 1.
    """

    gate: Tensor
    speed: float
    known: float


def _quick(function: type[torch.autograd.Function]) -> Callable[..., Tensor]:
    """As `function.apply`, quicker.

    Without what that does for `torch.func`, where `takes` is false; without a context where there are no gradients; and
    without the function of torch's that looks for `backward`, once a backward pass.
    """
    apply = super(torch.autograd.Function, function).apply  # pyright: ignore[reportAttributeAccessIssue]
    function._backward_cls.apply = function.backward  # pyright: ignore[reportAttributeAccessIssue]

    def call(*arguments: Any) -> Tensor:
        if torch.compiler.is_compiling():
            return function.apply(*arguments)
        return apply(*arguments) if torch.is_grad_enabled() else function.forward(_NoContext(), *arguments)

    return call


class _NoContext:
    def save_for_backward(self, *_: Any) -> None:
        """There is no backward pass."""


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Statistics | None,
    momentum: float | None,
    eps: float,
    slope: float,
    residual: Tensor | None = None,
) -> Tensor:
    """Batch norm with the mean and variance of this batch, which enter `statistics` unless they are infinite or NaN.

    Args:
        x: (N, C, *space).
        weight: γ, (C,), float32, or None for 1.
        bias: β, (C,), float32, or None for 0.
        statistics: changed by this call.
        momentum: weight of this batch in `statistics`; if None, one over the batches seen.
        eps: added to the variance.
        slope: the slope of the activation after the norm for values below 0, from 0 (ReLU) to 1 (none).
        residual: as `x`; added before the activation.
    """
    momentum = -1.0 if momentum is None else momentum
    kept = statistics or (None, None, None)
    return _ChannelNorm(x, weight, bias, residual, None, kept, slope, momentum, eps, 1.0)


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
    return _ChannelNorm(x, weight, bias, residual, (mean, var), None, slope, 0.0, eps, 0.0)


def batch_norm_of(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Batch norm with the mean and the biased variance of `x`, known already; arguments as in `batch_norm`."""
    return _ChannelNorm(x, weight, bias, None, (mean, var), None, 1.0, 0.0, eps, 1.0)


def batch_norm_over_ranks(
    x: Tensor,
    moments: tuple[Tensor, Tensor, Tensor],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    total: Callable[[Tensor], Tensor],
) -> Tensor:
    """Batch norm where this batch is a part of the whole; no gradient of its gradient.

    Args:
        x: as in `batch_norm`, and so are those not named here.
        moments: mean and biased variance of the whole, (C,), and its number of values, 0-d; constants.
        weight: γ, (C,), float32, or None for 1.
        bias: β, (C,), float32, or None for 0.
        eps: added to the variance.
        total: called once a backward pass in which `x` wants a gradient, with the gradients of mean and variance by
            this part, (2, C); returns the sum of those by all parts.
    """
    return _NormOverRanks(x, moments, weight, bias, eps, total)


def running_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    state: running.State,
    numbers: RunningNumbers,
    step_bound: float | None,
    slope: float,
    residual: Tensor | None = None,
) -> Tensor:
    """Running batch norm; see `RunningBatchNorm2d`.

    Args:
        x: (N, C, *space).
        weight: γ, (C,), float32, or None for 1.
        bias: β, (C,), float32, or None for 0.
        state: changed by this call and by each backward pass, unless a value would become infinite or NaN.
        numbers: those of the layer.
        step_bound: see `running.normalize_with_memory`.
        slope: as in `batch_norm`.
        residual: as `x`; added before the activation.
    """
    step_bound = -1.0 if step_bound is None else step_bound
    return _RunningNorm(x, weight, bias, residual, state, slope, numbers, step_bound)


def running_instance_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate: Gate,
    state: running.State,
    numbers: RunningNumbers,
    step_bound: float | None,
    slope: float,
    residual: Tensor | None = None,
) -> Tensor:
    """Running instance norm; see `RunningInstanceNorm2d`. On a CPU, by the compiled module.

    Args:
        x: (N, C, *space).
        weight: γ, (C,), float32, or None for 1.
        bias: β, (C,), float32, or None for 0.
        gate: what s is made of.
        state: as in `running_norm`, and so are those not named here.
        numbers: those of the layer.
        step_bound: see `running.normalize_with_memory`.
        slope: as in `batch_norm`.
        residual: as `x`; added before the activation.
    """
    step_bound = -1.0 if step_bound is None else step_bound
    return _MixedNorm(x, weight, bias, gate.gate, residual, gate[1:], state, slope, numbers, step_bound)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> Tensor:
    """Group norm: of each image by itself, over `num_groups` groups of channels and space; as in `batch_norm`."""
    return _GroupNorm(x, weight, bias, num_groups, eps, slope)


def position_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, centred: bool, eps: float) -> Tensor:
    """Norm of each position of each image over the channels: layer norm if `centred`, else RMS norm; not compiled.

    Args:
        x: (N, C, *space).
        weight: γ, (C,), float32, or None for 1.
        bias: β, (C,), float32, or None for 0.
        centred: whether the mean is subtracted.
        eps: added to the variance, or the mean square.
    """
    return _PositionNorm(x, weight, bias, centred, eps)


@_quick
class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, known, kept, slope, momentum, eps, share):
        """Types as in `batch_norm`, but for `known`, mean and variance if they are, and the batch's share in them."""
        if known is None:
            y, saved = _BATCH_FORWARD(x, weight, bias, residual, *kept, slope, momentum, eps)
        else:
            y, saved = _FROZEN_FORWARD(x, weight, bias, residual, *known, slope, eps)
        added = residual is not None
        # With a residual the norm alone does not say what the activation let through.
        ctx.save_for_backward(x, weight, bias, saved, y if added and slope != 1 else None)
        ctx.numbers = slope, added, eps, share
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, weight, bias, saved, y = ctx.saved_tensors
        (grad,), (slope, added, eps, share) = grads, ctx.numbers
        if y is not None:
            grad, slope = _through_activation(slope, grad, y)
        if torch.is_grad_enabled():  # these gradients are to be differentiated
            norm = _composed(x, weight, bias, None if share else saved, eps)
            found = _again(norm, slope, (x, weight, bias), grad)
        else:
            found = _BATCH_BACKWARD(grad, x, weight, bias, saved, slope, share)
        return *_wanted(found, weight, bias), grad if added else None, None, None, None, None, None, None


@_quick
class _NormOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, moments, weight, bias, eps, total):  # types: batch_norm_over_ranks
        mean, var, count = moments
        y, saved = _FROZEN_FORWARD(x, weight, bias, None, mean, var, 1.0, eps)
        ctx.save_for_backward(x, weight, bias, saved, var, count)
        ctx.numbers = eps, total
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, weight, bias, saved, var, count = ctx.saved_tensors
        eps, total = ctx.numbers
        # In float32: rounded to half precision, parts that cancel where a channel has few values would not.
        grad, wide = grads[0].float(), x.float()
        of_x, of_weight, of_bias = _BATCH_BACKWARD(grad, wide, weight, bias, saved, 1.0, 0.0)
        if ctx.needs_input_grad[0]:  # else the parts that are empty do not take part in `total` either
            mean, inverse = saved
            scale = inverse if weight is None else inverse * weight
            of_mean, of_var = total(torch.stack([-scale * of_bias, -0.5 * scale * inverse * of_weight])) / count
            # of_x + of_mean + 2 of_var (x − mean), in the form of a norm of x
            of_x, _ = _FROZEN_FORWARD(wide, 2 * of_var / inverse, of_mean, of_x, mean, var, 1.0, eps)
            of_x = of_x.to(x.dtype)
        of_x, of_weight, of_bias = _wanted((of_x, of_weight, of_bias), weight, bias)
        return of_x, None, of_weight, of_bias, None, None


@_quick
class _RunningNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, state, slope, numbers, step_bound):  # types: running_norm
        y, saved, rate = _RUNNING_FORWARD(x, weight, bias, residual, *state[running.READ], slope, *numbers)
        added = residual is not None
        ctx.save_for_backward(x, weight, bias, saved, rate, y if added and slope != 1 else None)
        # Memory is not saved: it may change before this backward pass, by that of another batch.
        ctx.numbers = slope, added, step_bound, state[running.MEMORY]
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        # The decorator takes longer than small layers do, and does nothing unless the gradient is to have a gradient.
        return (_once if torch.is_grad_enabled() else _running_backward)(ctx, *grads)


def _running_backward(ctx: Any, *grads: Tensor):
    x, weight, bias, saved, rate, y = ctx.saved_tensors
    (grad,), (slope, added, step_bound, memory) = grads, ctx.numbers
    if y is not None:
        grad, slope = _through_activation(slope, grad, y)
    _, of_weight, of_bias, *_ = ctx.needs_input_grad
    numbers = slope, step_bound, of_weight and of_bias
    found = _RUNNING_BACKWARD(grad, x, weight, bias, saved, rate, *memory, *numbers)
    return *_wanted(found, weight, bias), grad if added else None, None, None, None, None


_once = once_differentiable(_running_backward)


@_quick
class _MixedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gate, residual, of_gate, state, slope, numbers, step_bound):
        """Types as in `running_instance_norm`, but for `of_gate`, the numbers of its gate."""
        kept = state[running.READ]
        y, saved, rate = _MIXED_FORWARD(x, weight, bias, gate, residual, *kept, *of_gate, slope, *numbers)
        added = residual is not None
        ctx.save_for_backward(x, weight, bias, gate, saved, rate, y if added and slope != 1 else None)
        ctx.numbers = slope, added, step_bound, of_gate, state[running.MEMORY]  # see `_RunningNorm`
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return (_mixed_once if torch.is_grad_enabled() else _mixed_backward)(ctx, *grads)


def _mixed_backward(ctx: Any, *grads: Tensor):
    x, weight, bias, gate, saved, rate, y = ctx.saved_tensors
    (grad,), (slope, added, step_bound, of_gate, memory) = grads, ctx.numbers
    if y is not None:
        grad, slope = _through_activation(slope, grad, y)
    _, of_weight, of_bias, *_ = ctx.needs_input_grad
    numbers = *of_gate, slope, step_bound, of_weight and of_bias
    *found, grad_gate = _MIXED_BACKWARD(grad, x, weight, bias, gate, saved, rate, *memory, *numbers)
    return *_wanted(found, weight, bias), grad_gate, grad if added else None, None, None, None, None, None


_mixed_once = once_differentiable(_mixed_backward)


@_quick
class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, slope):  # types: group_norm
        y, saved = _GROUP_FORWARD(x, weight, bias, num_groups, slope, eps)
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.num_groups, ctx.eps, ctx.slope = num_groups, eps, slope
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, weight, bias, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            y = plain.group_norm(x, ctx.num_groups, weight, bias, ctx.eps)
            return *_again(y, ctx.slope, (x, weight, bias), grads[0]), None, None, None
        found = _GROUP_BACKWARD(grads[0], x, weight, bias, saved, ctx.num_groups, ctx.slope)
        return *_wanted(found, weight, bias), None, None, None


@_quick
class _PositionNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, centred, eps):  # types: position_norm
        laid, described = launch.describe(x)
        parts, kernel = x.numel() // x.shape[1], "position_forward"
        y, saved, _ = launch.forward(laid, described, weight, bias, parts, 1.0, kernel, (), centred, eps)
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.centred, ctx.eps = centred, eps
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x, weight, bias, saved = ctx.saved_tensors
        if torch.is_grad_enabled():
            distance = x.float() - x.float().mean(1, keepdim=True) if ctx.centred else x.float()
            x_hat = distance * (distance.square().mean(1, keepdim=True) + ctx.eps).rsqrt()
            return *_again(_scaled(x_hat, weight, bias).to(x.dtype), 1.0, (x, weight, bias), grads[0]), None, None
        x, described = launch.describe(x)
        numbers = 1.0, "position_backward", (), ctx.centred
        found = launch.backward(grads[0], x, described, weight, bias, saved, *numbers)
        return *_wanted(found, weight, bias), None, None


def _through_activation(slope: float, grad: Tensor, y: Tensor) -> tuple[Tensor, float]:
    """The gradient of the sum of norm and residual whose activation is `y`; the slope left to the norm's kernel, 1."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return torch.where(y > 0, grad, slope * grad), 1.0
    return launch.activation_backward(y, grad, slope), 1.0


def _wanted(found: Sequence[Tensor | None], weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, ...]:
    """Without those of a γ and β that are not there: the kernels compute them always."""
    of_x, of_weight, of_bias = found
    return of_x, None if weight is None else of_weight, None if bias is None else of_bias


def _again(y: Tensor, slope: float, inputs: Iterable[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The gradients of `inputs`, to be differentiated, where the norm is `y`; None for those that want none."""
    y = plain.activate(y, slope)
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

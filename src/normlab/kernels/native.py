"""The compiled kernels: norms of channels and of groups on a CPU, one call a pass.

Where they were not built, and for tensors that they do not take, the composed operators do the same.
"""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ops

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATISTICS = (torch.float32, torch.int64)
SWITCH = "NORMLAB_KERNELS"


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
        tolerated_drift: the cosine of innovation and push at which the latter stays.
        recomputing: this batch is in the statistics already.
    """

    momentum: float
    eps: float
    least_share: float
    least_gradient_share: float
    tolerated_drift: float
    recomputing: bool


def takes(x: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Tensor | None) -> bool:
    """Whether the kernels can be used for the input `x`, with these parameters of (C,) and buffers.

    The sizes of buffers are those that the layer made and `load_state_dict` holds to; they are not looked at again.

    They see memory only, so not where an operation is to be recorded, transformed or batched: by a compiler, `export`,
    `torch.func`, forward-mode gradients or a dispatch mode.
    """
    return (
        _native is not None
        and not torch.compiler.is_compiling()
        and x.dtype in TYPES
        and x.is_cpu
        and x.layout is torch.strided
        and type(x) in (Tensor, torch.nn.Parameter)
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
        and x.numel() > 0
        and (weight is None or (_plain(weight) and weight.shape == x.shape[1:2]))
        and (bias is None or (_plain(bias) and bias.shape == x.shape[1:2]))
        and all(map(_plain, buffers))
    )


def _plain(part: Tensor | None) -> bool:
    return part is None or (part.dtype in STATISTICS and part.is_contiguous() and part.is_cpu)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """As `function.apply`, without what that does for `torch.func`, where `takes` is false."""
    return super(torch.autograd.Function, function).apply(*arguments)  # pyright: ignore[reportAttributeAccessIssue]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: BatchStatistics | None,
    momentum: float | None,
    eps: float,
    slope: float,
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
    """
    return _apply(_ChannelNorm, x, weight, bias, statistics, -1.0 if momentum is None else momentum, eps, slope, False)


def frozen_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> Tensor:
    """γ (x − mean) / √(var + eps) + β with constant `mean` and `var`, (C,), float32; arguments as in `batch_norm`."""
    return _apply(_ChannelNorm, x, weight, bias, (mean, var), 0.0, eps, slope, True)


def running_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: RunningStatistics,
    memory: ops.GradientMemory,
    numbers: RunningNumbers,
    step_bound: float | None,
    slope: float,
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
    """
    return _apply(_RunningNorm, x, weight, bias, statistics, memory, numbers, step_bound, slope)


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, slope: float
) -> Tensor:
    """Group norm: of each image by itself, over `num_groups` groups of channels and space; as in `batch_norm`."""
    return _apply(_GroupNorm, x, weight, bias, num_groups, eps, slope)


class _ChannelNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, statistics, momentum, eps, slope, frozen):  # types: batch_norm, frozen_norm
        ctx.eps, ctx.frozen = eps, frozen
        if frozen:
            return _forward(ctx, x, weight, bias, x.shape[1], slope, _native.frozen_forward, statistics, eps)
        statistics = statistics or (None, None, None)
        return _forward(ctx, x, weight, bias, x.shape[1], slope, _native.batch_forward, statistics, momentum, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if torch.is_grad_enabled():  # these gradients are to be differentiated
            x, weight, bias, saved = ctx.saved_tensors
            y = _composed(x, weight, bias, saved if ctx.frozen else None, ctx.eps)
            return *_again(ctx, y, (x, weight, bias), grads[0]), None, None, None, None, None
        share = 0.0 if ctx.frozen else 1.0
        return *_backward(ctx, grads[0], _native.batch_backward, (), share), None, None, None, None, None


class _RunningNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, statistics, memory, numbers, step_bound, slope):  # types: running_norm
        kept = (*statistics, *memory[:2])
        y = _forward(ctx, x, weight, bias, x.shape[1], slope, _native.running_forward, kept, *numbers)
        # Not saved: it may change before this backward pass, by that of another batch.
        ctx.memory, ctx.step_bound = memory, -1.0 if step_bound is None else step_bound
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        # The decorator takes longer than small layers do, and does nothing unless the gradient is to have a gradient.
        return (_once if torch.is_grad_enabled() else _running_backward)(ctx, *grads)


def _running_backward(ctx: Any, *grads: Tensor):
    learns = all(ctx.needs_input_grad[1:3])
    numbers = ctx.result, ctx.step_bound, learns
    return *_backward(ctx, grads[0], _native.running_backward, ctx.memory, *numbers), None, None, None, None, None


_once = once_differentiable(_running_backward)


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, slope):  # types: group_norm
        ctx.num_groups, ctx.eps = num_groups, eps
        return _forward(ctx, x, weight, bias, len(x) * num_groups, slope, _native.group_forward, (), num_groups, eps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        if torch.is_grad_enabled():
            x, weight, bias, _ = ctx.saved_tensors
            y = torch.group_norm(x, ctx.num_groups, weight, bias, ctx.eps)
            return *_again(ctx, y, (x, weight, bias), grads[0]), None, None, None
        return *_backward(ctx, grads[0], _native.group_backward, (), ctx.num_groups), None, None, None


def _forward(ctx, x, weight, bias, parts, slope, kernel, statistics, *numbers):
    """The output of a norm that has `parts` means and 1/√(var + eps); they are saved for `_backward`."""
    ctx.slope = slope
    x, ctx.shape, ctx.format = _describe(x)
    y, saved = torch.empty_like(x), torch.empty(2, parts)
    ctx.result = kernel(*ctx.shape, *_pointers(x, y, weight, bias, saved, *statistics), slope, *numbers)
    ctx.save_for_backward(x, weight, bias, saved)
    return y


def _backward(ctx, grad, kernel, memory, *numbers):
    """The gradients of `x`, γ and β; None for those that want none."""
    x, weight, bias, saved = ctx.saved_tensors
    grad = grad.contiguous(memory_format=ctx.format)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty(x.shape[1]), torch.empty(x.shape[1])
    pointers = _pointers(grad, x, grad_x, weight, bias, saved, grad_weight, grad_bias, *memory)
    kernel(*ctx.shape, *pointers, ctx.slope, *numbers)
    _, of_weight, of_bias, *_ = ctx.needs_input_grad
    return grad_x, grad_weight if of_weight else None, grad_bias if of_bias else None


def _describe(x: Tensor) -> tuple[Tensor, tuple, torch.memory_format]:
    """`x` in a layout that the kernels know; its type, images, channels, space, whether channels are last; the layout.

    With a single value in space both layouts are the same, and the rows of channels are the quicker way.
    """
    images, channels = x.shape[:2]
    space = x.numel() // (images * channels)
    layout, last = torch.contiguous_format, space == 1
    if not x.is_contiguous():
        channels_last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
        if channels_last is not None and x.is_contiguous(memory_format=channels_last):
            layout, last = channels_last, True
        else:
            x = x.contiguous()
    return x, (TYPES[x.dtype], images, channels, space, last), layout


def _pointers(*parts: Tensor | None) -> list[int]:
    return [0 if part is None else part.data_ptr() for part in parts]


def _again(ctx: Any, y: Tensor, inputs: Iterable[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """The gradients of `inputs`, to be differentiated, where the norm is `y`; None for those that want none."""
    y = ops.activate(y, ctx.slope)
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
    y = (x - mean) * inverse
    y = y if weight is None else y * weight.view(along)
    return (y if bias is None else y + bias.view(along)).to(x.dtype)


def _load() -> tuple[Any, str]:
    """The compiled module, ready for use, or None; and in words what is used, or why not."""
    if os.environ.get(SWITCH, "on") == "off":
        return None, f"composed operators ({SWITCH}=off)"
    try:
        from . import _native  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        return None, f"composed operators ({error})"
    _native.set_constants(ops.STEPS_REMEMBERED, ops.STEADY_IMAGES, ops.ALONG, ops.PULL)
    threads = _openmp()
    _native.set_openmp(*(threads or [0] * 5))
    return _native, f"compiled kernels, {_native.instruction_sets[-1]}" + ("" if threads else ", one thread")


def _openmp() -> list[int] | None:
    """Where functions of torch's own OpenMP runtime are in memory; None if it has none of this kind."""
    names = ("GOMP_parallel", "omp_get_max_threads", "omp_get_thread_num", "omp_get_num_threads", "omp_in_parallel")
    try:
        library = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
        return [ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in names]
    except (OSError, AttributeError, StopIteration):
        return None


_native, PATH = _load()

"""The kernels as operators of `torch.library`, and the norms made of them: what a compiler puts into its graph.

Its own code for a norm takes twice as long as these for running batch norm, and longer for the others from `LARGE`
values on (`benchmarks/norms.py --compiled`). Outside a compiler `fused` is quicker.

On a CPU torch calls them in the compiled module (`csrc/operators.cpp`), which takes half as long as the functions here.
Those are for a torch that lacks what the module needs of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import dispatch, native

LARGE = 1 << 16  # values
# Not measured: from here on a pass takes longer than it takes to launch three kernels.
LARGE_ON_GPU = 1 << 22

LIBRARY = torch.library.Library("normlab", "FRAGMENT")
COMPILED = native.register_operators()  # on a CPU
_PARAMETERS = "Tensor x, Tensor? weight, Tensor? bias"
_GRADIENTS = "(Tensor, Tensor, Tensor)"


def preferred(x: Tensor, reduces: bool = True) -> bool:
    """Whether the kernel is quicker than torch's operator, or a compiler's code; running batch norm's always is.

    Args:
        x: the input.
        reduces: whether the norm needs statistics of `x`: one that does not is merged into what stands before it.
    """
    if torch.compiler.is_compiling():
        return x.is_cpu and reduces and x.numel() >= LARGE
    return x.is_cpu or x.numel() >= LARGE_ON_GPU


def _operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as an operator, of this schema; `fake` says what comes out, without computing."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        name = function.__name__
        # The kernels know several layouts, so that a compiler need not copy its tensors into one.
        LIBRARY.define(f"{name}({schema}", tags=(torch.Tag.flexible_layout,))
        for device in ("CUDA",) if COMPILED else ("CPU", "CUDA"):
            LIBRARY.impl(name, function, device)
        torch.library.register_fake(f"normlab::{name}", fake, lib=LIBRARY)
        return function

    return register


def _fake_backward(grad, x, *_):
    channels = x.new_empty(x.shape[1], dtype=torch.float32)
    return _like(x), channels, torch.empty_like(channels)


def _like(x: Tensor) -> Tensor:
    """An empty tensor in the layout that the kernels write."""
    return torch.empty_like(dispatch.describe(x)[0])


def _saved(x: Tensor, parts: int) -> Tensor:
    return x.new_empty(2, parts, dtype=torch.float32)


@_operator(
    f"{_PARAMETERS}, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, float slope, "
    "float momentum, float eps) -> (Tensor, Tensor)",
    lambda x, *_: (_like(x), _saved(x, x.shape[1])),
)
def batch_forward(x, weight, bias, running_mean, running_var, num_batches_tracked, slope, momentum, eps):
    """The output, and mean and 1/√(var + eps); enters the batch in the running statistics."""
    x, described = dispatch.describe(x)
    kept = None, running_mean, running_var, num_batches_tracked
    return dispatch.forward(x, described, weight, bias, x.shape[1], slope, "batch_forward", kept, momentum, eps)[:2]


@_operator(f"Tensor grad, {_PARAMETERS}, Tensor saved, float slope) -> {_GRADIENTS}", _fake_backward)
def batch_backward(grad, x, weight, bias, saved, slope):
    """The gradients of `x`, γ and β."""
    x, described = dispatch.describe(x)
    return dispatch.backward(grad, x, described, weight, bias, saved, slope, "batch_backward", (), 1.0)


@_operator(
    f"{_PARAMETERS}, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, Tensor(d!) share,"
    " Tensor(e!) innovation, Tensor(f!) gradient_share, Tensor average, Tensor latest, float slope, float momentum, "
    "float eps, float least_share, float least_gradient_share, float tolerated_drift) -> (Tensor, Tensor, Tensor)",
    lambda x, *_: (_like(x), _saved(x, x.shape[1]), x.new_empty((), dtype=torch.float32)),
)
def running_forward(x, weight, bias, *rest):
    """The output, mean and 1/√(var + eps), and the share in the averages of the backward pass."""
    *kept, slope, momentum, eps, least_share, least_gradient_share, tolerated_drift = rest
    x, described = dispatch.describe(x)
    numbers = momentum, eps, least_share, least_gradient_share, tolerated_drift, False
    numbers = slope, "running_forward", (None, *kept), *numbers
    y, saved, rate = dispatch.forward(x, described, weight, bias, x.shape[1], *numbers)
    return y, saved, rate if isinstance(rate, Tensor) else torch.tensor(rate, dtype=torch.float32)


@_operator(
    f"Tensor grad, {_PARAMETERS}, Tensor saved, Tensor rate, Tensor(a!) average, Tensor(b!) latest, Tensor(c!) "
    f"parameters, Tensor(d!) push, Tensor(e!) measured, float slope, float step_bound, bool learns) -> {_GRADIENTS}",
    _fake_backward,
)
def running_backward(grad, x, weight, bias, saved, rate, *rest):
    """The gradients of `x`, γ and β; changes the averages."""
    *memory, slope, step_bound, learns = rest
    x, described = dispatch.describe(x)
    kernel, numbers = "running_backward", (rate.item() if rate.is_cpu else rate, step_bound, learns)
    return dispatch.backward(grad, x, described, weight, bias, saved, slope, kernel, memory, *numbers)


@_operator(
    f"{_PARAMETERS}, int num_groups, float slope, float eps) -> (Tensor, Tensor)",
    lambda x, weight, bias, num_groups, *_: (_like(x), _saved(x, len(x) * num_groups)),
)
def group_forward(x, weight, bias, num_groups, slope, eps):
    """The output, and the mean and 1/√(var + eps) of each group."""
    x, described = dispatch.describe(x)
    parts, kernel = len(x) * num_groups, "group_forward"
    return dispatch.forward(x, described, weight, bias, parts, slope, kernel, (), num_groups, eps)[:2]


@_operator(f"Tensor grad, {_PARAMETERS}, Tensor saved, int num_groups, float slope) -> {_GRADIENTS}", _fake_backward)
def group_backward(grad, x, weight, bias, saved, num_groups, slope):
    """The gradients of `x`, γ and β."""
    x, described = dispatch.describe(x)
    return dispatch.backward(grad, x, described, weight, bias, saved, slope, "group_backward", (), num_groups)


class BatchNorm(torch.autograd.Function):
    """See `fused.batch_norm`; its arguments, but the statistics one by one."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps, slope):
        kept = running_mean, running_var, num_batches_tracked
        y, saved = torch.ops.normlab.batch_forward(x, weight, bias, *kept, slope, momentum, eps)
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.slope = slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        return *wanted(ctx, torch.ops.normlab.batch_backward(grads[0], *ctx.saved_tensors, ctx.slope)), *[None] * 6


class RunningNorm(torch.autograd.Function):
    """See `fused.running_norm`; its arguments, but statistics (6), memory (5) and numbers (5) one by one."""

    @staticmethod
    def forward(ctx, x, weight, bias, *rest):
        kept, memory, numbers, (ctx.step_bound, ctx.slope) = rest[:6], rest[6:11], rest[11:16], rest[16:]
        operator = torch.ops.normlab.running_forward
        y, saved, rate = operator(x, weight, bias, *kept, *memory[:2], ctx.slope, *numbers)
        ctx.save_for_backward(x, weight, bias, saved, rate)
        ctx.memory = memory
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        numbers = ctx.slope, ctx.step_bound, all(ctx.needs_input_grad[1:3])
        found = torch.ops.normlab.running_backward(grads[0], *ctx.saved_tensors, *ctx.memory, *numbers)
        return *wanted(ctx, found), *[None] * 18


class GroupNorm(torch.autograd.Function):
    """See `fused.group_norm`."""

    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, slope):
        y, saved = torch.ops.normlab.group_forward(x, weight, bias, num_groups, slope, eps)
        ctx.save_for_backward(x, weight, bias, saved)
        ctx.num_groups, ctx.slope = num_groups, slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        found = torch.ops.normlab.group_backward(grads[0], *ctx.saved_tensors, ctx.num_groups, ctx.slope)
        return *wanted(ctx, found), *[None] * 3


def wanted(ctx: Any, found: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients that are wanted: the kernels compute those of γ and β always."""
    of_x, of_weight, of_bias = found
    return of_x, of_weight if ctx.needs_input_grad[1] else None, of_bias if ctx.needs_input_grad[2] else None

"""The kernels as operators of `torch.library`: what `autograd` makes norms of, and a compiler puts into its graph.

On a CPU torch calls them in the compiled module (`csrc/operators.cpp`), without Python in between. The functions here
are for a GPU, and for a torch that lacks what the module needs of it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cpu, launch

LIBRARY = torch.library.Library("normlab", "FRAGMENT")
COMPILED = cpu.OPERATORS
_PARAMETERS = "Tensor x, Tensor? weight, Tensor? bias"
_GRADIENTS = "(Tensor, Tensor, Tensor)"
# `running.State`: what a forward pass takes of it, and what a backward pass does.
_READ = (
    "Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!) num_batches_tracked, Tensor(d!) share, Tensor(e!) "
    "innovation, Tensor(f!) gradient_share, Tensor gradient_average, Tensor gradient_latest"
)
_MEMORY = (
    "Tensor(a!) gradient_average, Tensor(b!) gradient_latest, Tensor(c!) parameters_before, Tensor(d!) "
    "parameters_gradient, Tensor(e!) log_learning_rate, Tensor(f!) learning_rate_steps, Tensor(g!) output_square, "
    "Tensor(h!) step_length, Tensor(i!) latest_gradient_share"
)


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
    return torch.empty_like(x.contiguous(memory_format=launch.layout_of(x)))


def _saved(x: Tensor, parts: int) -> Tensor:
    return x.new_empty(2, parts, dtype=torch.float32)


@_operator(
    f"{_PARAMETERS}, Tensor? residual, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches_tracked, float slope, float momentum, float eps) -> (Tensor, Tensor)",
    lambda x, *_: (_like(x), _saved(x, x.shape[1])),
)
def batch_forward(x, weight, bias, residual, running_mean, running_var, num_batches_tracked, slope, momentum, eps):
    """The output, and mean and 1/√(var + eps); enters the batch in the running statistics."""
    kept = running_mean, running_var, num_batches_tracked
    return _of_channels(x, weight, bias, slope, "batch_forward", residual, *kept, numbers=(momentum, eps))[:2]


@_operator(
    f"{_PARAMETERS}, Tensor? residual, Tensor mean, Tensor var, float slope, float eps) -> (Tensor, Tensor)",
    lambda x, *_: (_like(x), _saved(x, x.shape[1])),
)
def frozen_forward(x, weight, bias, residual, mean, var, slope, eps):
    """The output, and mean and 1/√(var + eps)."""
    return _of_channels(x, weight, bias, slope, "frozen_forward", residual, mean, var, numbers=(eps,))[:2]


@_operator(f"Tensor grad, {_PARAMETERS}, Tensor saved, float slope, float share) -> {_GRADIENTS}", _fake_backward)
def batch_backward(grad, x, weight, bias, saved, slope, share):
    """The gradients of `x`, γ and β, where the batch has this share in mean and variance."""
    x, described = launch.describe(x)
    return launch.backward(grad, x, described, weight, bias, saved, slope, "batch_backward", (), share)


@_operator(
    f"{_PARAMETERS}, Tensor? residual, {_READ}, float slope, float momentum, float eps, bool recomputing) -> "
    "(Tensor, Tensor, Tensor)",
    lambda x, *_: (_like(x), _saved(x, x.shape[1]), x.new_empty((), dtype=torch.float32)),
)
def running_forward(x, weight, bias, residual, *rest):
    """The output, mean and 1/√(var + eps), and the share in the averages of the backward pass."""
    kept, (slope, *numbers) = rest[:8], rest[8:]
    y, saved, rate = _of_channels(x, weight, bias, slope, "running_forward", residual, *kept, numbers=numbers)
    return y, saved, rate if isinstance(rate, Tensor) else torch.tensor(rate, dtype=torch.float32)


def _of_channels(x, weight, bias, slope, kernel, residual, *statistics, numbers):
    x, described = launch.describe(x)
    if residual is not None:
        residual = launch.laid(residual, described.layout, "residual")
    statistics = residual, *statistics
    return launch.forward(x, described, weight, bias, x.shape[1], slope, kernel, statistics, *numbers)


@_operator(
    f"Tensor grad, {_PARAMETERS}, Tensor saved, Tensor rate, {_MEMORY}, float slope, float step_bound, bool learns) -> "
    f"{_GRADIENTS}",
    _fake_backward,
)
def running_backward(grad, x, weight, bias, saved, rate, *rest):
    """The gradients of `x`, γ and β; changes the averages."""
    *memory, slope, step_bound, learns = rest
    x, described = launch.describe(x)
    launch.check_storage(rate, "rate")
    kernel, numbers = "running_backward", (rate, step_bound, learns)
    return launch.backward(grad, x, described, weight, bias, saved, slope, kernel, memory, *numbers)


@_operator(
    f"{_PARAMETERS}, int num_groups, float slope, float eps) -> (Tensor, Tensor)",
    lambda x, weight, bias, num_groups, *_: (_like(x), _saved(x, len(x) * num_groups)),
)
def group_forward(x, weight, bias, num_groups, slope, eps):
    """The output, and the mean and 1/√(var + eps) of each group."""
    x, described = launch.describe(x)
    parts, kernel = len(x) * num_groups, "group_forward"
    return launch.forward(x, described, weight, bias, parts, slope, kernel, (), num_groups, eps)[:2]


@_operator(f"Tensor grad, {_PARAMETERS}, Tensor saved, int num_groups, float slope) -> {_GRADIENTS}", _fake_backward)
def group_backward(grad, x, weight, bias, saved, num_groups, slope):
    """The gradients of `x`, γ and β."""
    x, described = launch.describe(x)
    return launch.backward(grad, x, described, weight, bias, saved, slope, "group_backward", (), num_groups)


# Of the compiled module alone. Elsewhere running instance norm is made of torch's operators.
LIBRARY.define(
    f"running_instance_forward({_PARAMETERS}, Tensor gate, Tensor? residual, {_READ}, float gate_speed, float known, "
    "float slope, float momentum, float eps, bool recomputing) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)
LIBRARY.define(
    f"running_instance_backward(Tensor grad, {_PARAMETERS}, Tensor gate, Tensor saved, Tensor rate, {_MEMORY}, float "
    "gate_speed, float known, float slope, float step_bound, bool learns) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)


@torch.library.register_fake("normlab::running_instance_forward", lib=LIBRARY)
def _fake_running_instance_forward(x, *_):
    return _like(x), _saved(x, x.shape[1] * (1 + len(x))), x.new_empty((), dtype=torch.float32)


@torch.library.register_fake("normlab::running_instance_backward", lib=LIBRARY)
def _fake_running_instance_backward(grad, x, *_):
    found = _fake_backward(grad, x)
    return *found, torch.empty_like(found[1])

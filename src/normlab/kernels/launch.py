"""A pass of a norm by its kernel: what it needs in memory, and what runs it, `cpu` or `gpu`."""

from collections.abc import Callable, Iterable, Sequence
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import cpu, plain, policy


class Description(NamedTuple):
    """How a tensor lies in memory, as the kernels want to know it.

    Attributes:
        arguments: type, images, channels, space, whether channels are last.
        layout: torch's word for it.
    """

    arguments: tuple[int, int, int, int, bool]
    layout: torch.memory_format


def describe(x: Tensor) -> tuple[Tensor, Description]:
    """`x` in a layout that the kernels know, copied if need be, and its description.

    With a single value in space both layouts are the same, and the rows of channels are the quicker way.

    Raises:
        RuntimeError: the storage of `x` is too small for its values.
    """
    images, channels = x.shape[:2]
    space = x.numel() // (images * channels)
    x, layout, last = held(x, "x"), torch.contiguous_format, space == 1
    if not x.is_contiguous():
        layout = layout_of(x)
        x, last = x.contiguous(memory_format=layout), layout is not torch.contiguous_format or last
    return x, Description((policy.TYPES[x.dtype], images, channels, space, last), layout)


def layout_of(x: Tensor) -> torch.memory_format:
    """The layout in which the kernels take `x`: its own, unless they do not know that."""
    layout = plain.CHANNELS_LAST.get(x.dim())
    if layout is None or x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def laid(part: Tensor, layout: torch.memory_format, name: str) -> Tensor:
    """A tensor in this layout, copied if need be, with its values in memory; see `held`."""
    return held(part, name).contiguous(memory_format=layout)


def held(part: Tensor, name: str) -> Tensor:
    """A tensor with its values in memory, copied if it only says that they are negated, or 0.

    Raises:
        RuntimeError: its storage is too small for them.
    """
    check_storage(part, name)
    return part.new_zeros(part.shape) if part._is_zerotensor() else part.resolve_neg()


def check_memory(parts: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raises a RuntimeError if the storage of one of these tensors, by name, was freed: torch's operators would end."""
    if torch.compiler.is_compiling() or not policy.is_alone():
        return
    for name, part in parts:
        if part is not None and policy.has_memory(part):
            check_storage(part, name)


def check_storage(part: Tensor, name: str) -> None:
    """Raises a RuntimeError if the storage of a tensor was freed, as sharded training does, or is too short for it."""
    there, offset = part.untyped_storage().nbytes(), part.storage_offset()
    if (offset == 0 and there >= part.nbytes and part.is_contiguous()) or part.numel() == 0:
        return
    last = offset + sum(map(mul, (n - 1 for n in part.shape), part.stride()))
    needed = (last + 1) * part.itemsize
    if there < needed:
        found = f"{needed} bytes of storage, and {there} are there: it was freed, or resized"
        raise RuntimeError(f"normlab: {name} needs {found}")


def _parameter(part: Tensor | None, name: str, channels: int) -> Tensor | None:
    """γ or β with its values in memory.

    Raises:
        RuntimeError: it does not have one value a channel, or its storage is too small for them.
    """
    if part is None:
        return None
    if part.numel() != channels:
        raise RuntimeError(f"normlab: {name} has {part.numel()} elements, expected {channels}, one a channel")
    check_storage(part, name)
    return part.resolve_neg()


def _check_statistics(parts: Sequence[Tensor | None]) -> None:
    for part in parts:
        if part is not None:
            check_storage(part, "a statistic")


def forward(
    x: Tensor,
    described: Description,
    weight: Tensor | None,
    bias: Tensor | None,
    parts: int,
    slope: float,
    kernel: str,
    statistics: Sequence[Tensor | None],
    *numbers: Any,
) -> tuple[Tensor, Tensor, Any]:
    """A forward pass by the kernel of this name: the output, the `parts` means and 1/√(var + eps), what it returns."""
    _check_statistics(statistics)
    weight, bias = _parameter(weight, "weight", x.shape[1]), _parameter(bias, "bias", x.shape[1])
    y, saved = torch.empty_like(x), torch.empty(2, parts, device=x.device)
    tensors = x, y, weight, bias, saved, *statistics
    return y, saved, _run(x)(kernel, described.arguments, tensors, slope, *numbers)


def backward(
    grad: Tensor,
    x: Tensor,
    described: Description,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    slope: float,
    kernel: str,
    memory: Sequence[Tensor],
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """A backward pass, with `saved` as `forward` gave it: the gradients of `x`, γ and β."""
    _check_statistics((saved, *memory))
    weight, bias = _parameter(weight, "weight", x.shape[1]), _parameter(bias, "bias", x.shape[1])
    grad = laid(grad, described.layout, "the gradient")
    of_x, of_weight = torch.empty_like(x), torch.empty(x.shape[1], device=x.device)
    of_bias = torch.empty_like(of_weight)
    tensors = grad, x, of_x, weight, bias, saved, of_weight, of_bias, *memory
    _run(x)(kernel, described.arguments, tensors, slope, *numbers)
    return of_x, of_weight, of_bias


def activation_backward(y: Tensor, grad: Tensor, slope: float) -> Tensor:
    """The gradient of what the activation that gave `y`, an output of `forward`, was applied to."""
    y, described = describe(y)
    grad = laid(grad, described.layout, "the gradient")
    found = torch.empty_like(y)
    _run(y)("activation_backward", described.arguments, (y, grad, found), slope)
    return found


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (N, C, *space), (C,) each, without a gradient."""
    x, described = describe(x.detach())
    found = torch.empty(2, x.shape[1], device=x.device)
    _run(x)("channel_moments", described.arguments, (x, found))
    return found[0], found[1]


def _run(x: Tensor) -> Callable[..., Any]:
    """What runs a kernel on this tensor's device."""
    if x.is_cpu:
        return cpu.run
    from . import gpu  # not before: it imports Triton's compiler

    return gpu.run

"""Which tensors the kernels take, and a call of one: compiled ones on a CPU (`native`), Triton's on a GPU (`gpu`)."""

import os
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from operator import mul
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import native, plain

ON_GPU = os.environ.get(native.SWITCH, "on") != "off" and find_spec("triton") is not None
PATH_ON_GPU = "Triton kernels" if ON_GPU else f"composed operators (no module triton, or {native.SWITCH}=off)"
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATISTICS = (torch.float32, torch.int64)
_CLASSES = (Tensor, torch.nn.Parameter)  # other subclasses may be anything
# Whether torch is about to do something else with an operation: by attribute each takes as long as a kernel's part.
_num_modes, _traced = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
# On a GPU one program has all channels at once, and there are sums for each channel of each image.
MOST_CHANNELS_ON_GPU, MOST_SUMS_ON_GPU = 1 << 13, 1 << 26


def takes(x: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Tensor | None) -> bool:
    """Whether the kernels can be used for the input `x`, with these parameters of (C,) and buffers."""
    return takes_input(x) and takes_parts(x, weight, bias, *buffers)


def takes_input(x: Tensor) -> bool:
    """Whether the kernels can be used for the input `x`.

    They see memory only, so not where an operation is to be exported, transformed or batched: by `torch.export`,
    `torch.func`, forward-mode gradients or a dispatch mode. To a compiler they are operators of `torch.library`.
    """
    if torch.compiler.is_compiling():
        return _has_kernels(x) and not torch.compiler.is_exporting() and _is_plain(x)
    return _has_kernels(x) and in_memory(x)


def in_memory(x: Tensor) -> bool:
    """Whether an operation on `x`, outside a compiler, is nothing but that, and on memory that the kernels know."""
    return _is_plain(x) and _is_alone() and forward_ad._current_level < 0


def _is_alone() -> bool:
    """Whether an operation, outside a compiler, is neither recorded nor transformed."""
    return _num_modes() == 0 and _transforms() is None and _traced() is None


def check_memory(parts: Iterable[tuple[str, Tensor | None]]) -> None:
    """Raises a RuntimeError if the storage of one of these tensors, by name, was freed: torch's operators would end."""
    if torch.compiler.is_compiling() or not _is_alone():
        return
    for name, part in parts:
        if part is not None and type(part) in _CLASSES and part.layout is torch.strided and not part.is_meta:
            check_storage(part, name)


def _is_plain(x: Tensor) -> bool:
    return _is_known(type(x)) and x.layout is torch.strided and x.dtype in TYPES and x.numel() > 0


def _is_known(kind: Any) -> bool:
    """Whether a class of tensors is torch's, or a parameter's that leaves what operators do as it is."""
    return kind in _CLASSES or (issubclass(kind, torch.nn.Parameter) and _operators_of(kind) == _OPERATORS)


def _operators_of(kind: Any) -> tuple[Any, Any]:
    return kind.__torch_function__, kind.__torch_dispatch__


_OPERATORS = _operators_of(torch.nn.Parameter)


def takes_parts(x: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Tensor | None) -> bool:
    """Whether the kernels can be used with these parameters of (C,) and buffers, for an input like `x`.

    The sizes of buffers are those that the layer made and `load_state_dict` holds to; they are not looked at.
    """
    channels, device = x.shape[1], x.device
    for part in (weight, bias):
        if part is not None and not (part.dtype is torch.float32 and part.dim() == 1 and len(part) == channels):
            return False
    for part in buffers:
        if part is not None and part.dtype not in STATISTICS:
            return False
    there = [part for part in (weight, bias, *buffers) if part is not None]
    return all(_is_known(type(part)) and part.is_contiguous() and part.device == device for part in there)


def takes_residual(x: Tensor, residual: Tensor) -> bool:
    """Whether the kernels can add `residual` to a norm of `x`, which they take."""
    return residual.dtype is x.dtype and residual.device == x.device and _is_plain(residual)


def _has_kernels(x: Tensor) -> bool:
    if x.is_cpu:
        return native.kernels is not None
    channels = x.shape[1]
    return x.is_cuda and ON_GPU and channels <= MOST_CHANNELS_ON_GPU and len(x) * channels <= MOST_SUMS_ON_GPU


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
    return x, Description((TYPES[x.dtype], images, channels, space, last), layout)


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


def check_storage(part: Tensor, name: str) -> None:
    """Raises a RuntimeError if the storage of a tensor was freed, as sharded training does, or is too short for it."""
    there, offset = part.untyped_storage().nbytes(), part.storage_offset()
    if (offset == 0 and there >= part.nbytes and part.is_contiguous()) or part.numel() == 0:
        return
    last = offset + sum(map(mul, (n - 1 for n in part.shape), part.stride()))
    needed = (last + 1) * part.itemsize
    if there < needed:
        found = f"{needed} bytes of storage, of which {there} are there: it was freed, or resized"
        raise RuntimeError(f"normlab: {name} needs {found}")


def _parameter(part: Tensor | None, name: str) -> Tensor | None:
    """γ or β with its values in memory."""
    if part is None:
        return None
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
    weight, bias = _parameter(weight, "weight"), _parameter(bias, "bias")
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
    weight, bias = _parameter(weight, "weight"), _parameter(bias, "bias")
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
        return native.run
    from . import gpu  # with it Triton's compiler, of which a CPU has no need

    return gpu.run

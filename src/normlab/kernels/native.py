"""The compiled kernels: whether they are there, what they take, and a call of one."""

import ctypes
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATISTICS = (torch.float32, torch.int64)
SWITCH = "NORMLAB_KERNELS"


def takes(x: Tensor, weight: Tensor | None, bias: Tensor | None, *buffers: Tensor | None) -> bool:
    """Whether the kernels can be used for the input `x`, with these parameters of (C,) and buffers.

    The sizes of buffers are those that the layer made and `load_state_dict` holds to; they are not looked at again.

    The kernels see memory only, so not where an operation is to be exported, transformed or batched: by `torch.export`,
    `torch.func`, forward-mode gradients or a dispatch mode. To a compiler they are operators of `torch.library`.
    """
    if (
        kernels is None
        or not (not torch.compiler.is_exporting() if torch.compiler.is_compiling() else _in_memory(x))
        or x.dtype not in TYPES
        or not x.is_cpu
        or x.layout is not torch.strided
        or type(x) not in (Tensor, torch.nn.Parameter)
        or x.numel() == 0
    ):
        return False
    # Written out: this takes as long as a kernel does on a small tensor.
    channels = x.shape[1]
    for part in (weight, bias):
        if part is not None and not (
            part.dtype is torch.float32
            and part.dim() == 1
            and len(part) == channels
            and part.is_contiguous()
            and part.is_cpu
        ):
            return False
    for part in buffers:
        if part is not None and not (part.dtype in STATISTICS and part.is_contiguous() and part.is_cpu):
            return False
    return True


def takes_residual(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the kernels can add `residual`, if there is one, to a norm of `x`, which they take."""
    return residual is None or (
        residual.dtype is x.dtype
        and residual.is_cpu
        and residual.layout is torch.strided
        and type(residual) in (Tensor, torch.nn.Parameter)
    )


def _in_memory(x: Tensor) -> bool:
    return (
        not torch._C._functorch.is_functorch_wrapped_tensor(x)  # pyright: ignore[reportAttributeAccessIssue]
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]
        and torch._C._get_tracing_state() is None
        and torch.autograd.forward_ad._current_level < 0
    )


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
    return x, Description((TYPES[x.dtype], images, channels, space, last), layout)


def forward(
    x: Tensor,
    described: Description,
    weight: Tensor | None,
    bias: Tensor | None,
    parts: int,
    slope: float,
    kernel: str,
    statistics: Iterable[Tensor | None],
    *numbers: Any,
) -> tuple[Tensor, Tensor, Any]:
    """A forward pass by the kernel of this name: the output, the `parts` means and 1/√(var + eps), what it returns."""
    y, saved = torch.empty_like(x), torch.empty(2, parts)
    result = getattr(kernels, kernel)(
        *described.arguments, *_pointers(x, y, weight, bias, saved, *statistics), slope, *numbers
    )
    return y, saved, result


def activation_backward(y: Tensor, grad: Tensor, described: Description, slope: float) -> Tensor:
    """The gradient of what the activation that gave `y` was applied to."""
    grad = grad.contiguous(memory_format=described.layout)
    found = torch.empty_like(y)
    kernels.activation_backward(described.arguments[0], y.numel(), *_pointers(y, grad, found), slope)
    return found


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of (N, C, *space), (C,) each, without a gradient."""
    x, described = describe(x.detach())
    found = torch.empty(2, x.shape[1])
    kernels.channel_moments(*described.arguments, x.data_ptr(), found.data_ptr())
    return found[0], found[1]


def backward(
    grad: Tensor,
    x: Tensor,
    described: Description,
    weight: Tensor | None,
    bias: Tensor | None,
    saved: Tensor,
    slope: float,
    kernel: str,
    memory: Iterable[Tensor],
    *numbers: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """A backward pass, with `saved` as `forward` gave it: the gradients of `x`, γ and β."""
    grad = grad.contiguous(memory_format=described.layout)
    grad_x, grad_weight, grad_bias = torch.empty_like(x), torch.empty(x.shape[1]), torch.empty(x.shape[1])
    pointers = _pointers(grad, x, grad_x, weight, bias, saved, grad_weight, grad_bias, *memory)
    getattr(kernels, kernel)(*described.arguments, *pointers, slope, *numbers)
    return grad_x, grad_weight, grad_bias


def _pointers(*parts: Tensor | None) -> list[int]:
    return [0 if part is None else part.data_ptr() for part in parts]


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
        return [_address(name) for name in names]
    except AttributeError:
        return None


def _address(name: str) -> int:
    """Where a function of torch's, or of a library that it needs, is in memory.

    Raises:
        AttributeError: there is none of this name.
    """
    return ctypes.cast(getattr(_torch(), name), ctypes.c_void_p).value or 0


@cache
def _torch() -> ctypes.CDLL | None:
    """Torch's library; None if it is not found."""
    try:
        return ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))))
    except (OSError, StopIteration):
        return None


def register_operators() -> bool:
    """Has the compiled module implement `operators` on a CPU; False if it, or this torch, cannot (before 2.10)."""
    if kernels is None:
        return False
    try:
        kernels.register_operators(_address)
    except AttributeError:
        return False
    return True


kernels, PATH = _load()

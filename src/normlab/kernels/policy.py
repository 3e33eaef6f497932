"""When the kernels are used instead of torch's operators: every question and every threshold.

A layer asks through `OnKernels._parts_for_kernels`, and names its use: `always`, `if_compiled`, `unless_compiled`,
`for_statistics`, `for_constants`, `for_groups`, `for_activated_groups`.
"""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu

ON_GPU = os.environ.get(cpu.SWITCH, "on") != "off" and find_spec("triton") is not None
PATH_ON_GPU = "Triton kernels" if ON_GPU else f"composed operators (no module triton, or {cpu.SWITCH}=off)"

# --- thresholds, of how many values; measured by `benchmarks/norms.py` ------------------------------------------------

# A compiler's own code for a norm is quicker below (`--compiled`), but for running batch norm.
LARGE_FOR_COMPILERS = 1 << 16
# Launched one by one, not recorded in a CUDA graph, our kernels of a step take longer to launch than torch's to run, on
# an H200 up to 26 million values; see `benchmarks/results/norms.md`.
LARGE_ON_GPU = 1 << 25
# On a CPU torch's group norm is quicker below: values of a tensor, and of a channel of one image.
LARGE_FOR_GROUPS, LARGE_MAP_FOR_GROUPS = 1 << 17, 512
# On a GPU one program has all channels at once, and there are sums for each channel of each image.
MOST_CHANNELS_ON_GPU, MOST_SUMS_ON_GPU = 1 << 13, 1 << 26

# --- whether the kernels are quicker, by use --------------------------------------------------------------------------


def always(_: Tensor) -> bool:
    """For running batch norm in training, which needs many of torch's operators."""
    return True


def if_compiled(x: Tensor) -> bool:
    """For running instance norm in training, of which the compiled module alone has a kernel, as an operator."""
    return cpu.OPERATORS and x.is_cpu


def unless_compiled(_: Tensor) -> bool:
    """For kernels that are no operators of `torch.library`."""
    return not torch.compiler.is_compiling()


def for_statistics(x: Tensor) -> bool:
    """For a norm by the statistics of `x`."""
    if torch.compiler.is_compiling():
        return x.is_cpu and x.numel() >= LARGE_FOR_COMPILERS
    return x.is_cpu or x.numel() >= LARGE_ON_GPU


def for_constants(x: Tensor) -> bool:
    """For a norm by constant statistics: a compiler merges it into what stands before it."""
    return not torch.compiler.is_compiling() and for_statistics(x)


def for_activated_groups(x: Tensor) -> bool:
    """For group norm with an activation."""
    return not torch.compiler.is_exporting() and for_statistics(x)


def for_groups(x: Tensor) -> bool:
    """For group norm alone: on a CPU torch's is quick too, but for the channels last in memory."""
    if not for_activated_groups(x):
        return False
    if not x.is_cpu or not x.is_contiguous():
        return True
    return x.numel() >= LARGE_FOR_GROUPS and x.shape[2:].numel() >= LARGE_MAP_FOR_GROUPS


# --- whether they can be used -----------------------------------------------------------------------------------------

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STATISTICS = (torch.float32, torch.int64)
_CLASSES = (Tensor, torch.nn.Parameter)  # other subclasses may be anything
# Whether torch is about to do something else with an operation: by attribute each takes as long as a kernel's part.
_num_modes, _traced = torch._C._len_torch_dispatch_stack, torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]


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


def in_memory(x: Tensor) -> bool:
    """Whether an operation on `x`, outside a compiler, is nothing but that, and on memory that the kernels know."""
    return _is_plain(x) and is_alone() and forward_ad._current_level < 0


def has_memory(x: Tensor) -> bool:
    """Whether torch's operators would read the storage of `x`, if they are alone."""
    return type(x) in _CLASSES and x.layout is torch.strided and not x.is_meta


def is_alone() -> bool:
    """Whether an operation, outside a compiler, is neither recorded nor transformed."""
    return _num_modes() == 0 and _transforms() is None and _traced() is None


def _is_plain(x: Tensor) -> bool:
    return _is_known(type(x)) and x.layout is torch.strided and x.dtype in TYPES and x.numel() > 0


def _is_known(kind: Any) -> bool:
    """Whether a class of tensors is torch's, or a parameter's that leaves what operators do as it is."""
    return kind in _CLASSES or (issubclass(kind, torch.nn.Parameter) and _operators_of(kind) == _OPERATORS)


def _operators_of(kind: Any) -> tuple[Any, Any]:
    return kind.__torch_function__, kind.__torch_dispatch__


_OPERATORS = _operators_of(torch.nn.Parameter)


def _has_kernels(x: Tensor) -> bool:
    if x.is_cpu:
        return cpu.kernels is not None
    channels = x.shape[1]
    return x.is_cuda and ON_GPU and channels <= MOST_CHANNELS_ON_GPU and len(x) * channels <= MOST_SUMS_ON_GPU

"""The compiled kernels: whether they are there, and a call of one."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import running

SWITCH = "NORMLAB_KERNELS"


def run(kernel: str, arguments: tuple[int, ...], tensors: tuple[Tensor | None, ...], *numbers: Any) -> Any:
    """The kernel of this name, on tensors in memory that it knows; see `csrc/module.cpp`."""
    pointers = [0 if part is None else part.data_ptr() for part in tensors]
    values = [number.item() if isinstance(number, Tensor) else number for number in numbers]
    return getattr(kernels, kernel)(*arguments, pointers, *values)


def _load() -> tuple[Any, str]:
    """The compiled module, ready for use, or None; and in words what is used, or why not."""
    if os.environ.get(SWITCH, "on") == "off":
        return None, f"composed operators ({SWITCH}=off)"
    try:
        from . import _native  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        return None, f"composed operators ({error})"
    _native.set_constants(running.CONSTANTS)
    threads = _openmp()
    _native.set_openmp(threads or [0] * 5)
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


@contextmanager
def use_constants(**changed: float) -> Iterator[None]:
    """Inside, running batch norm has other constants, for a study or a test: on a CPU and on a GPU, in all layers."""
    before = running.CONSTANTS
    try:
        _set_constants(before._replace(**changed))
        yield
    finally:
        _set_constants(before)


def _set_constants(constants: running.Constants) -> None:
    running.CONSTANTS = constants
    if kernels is not None:
        kernels.set_constants(constants)


def _register_operators() -> bool:
    """Has the compiled module implement `library` on a CPU; False if it, or this torch, cannot (before 2.10)."""
    if kernels is None:
        return False
    try:
        kernels.register_operators(_address)
    except AttributeError:
        return False
    return True


kernels, PATH = _load()
OPERATORS = _register_operators()  # whether torch calls the module without Python in between

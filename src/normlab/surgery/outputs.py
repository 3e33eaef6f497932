"""The tensors in what a model returns, of whatever structure, and how far two of them differ."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError
from .places import attributes


def tensors(output: Any) -> list[Tensor]:
    """Every tensor in an output: of lists, tuples, dicts, dataclasses and objects of any class.

    Modules are not opened, and each object is opened once.
    """
    return [part for part, _ in _opened(output, "output", set())]


def named_tensors(output: Any) -> dict[str, Tensor]:
    """The same by where they are: `output.logits`, `output[0]`."""
    return {name: part for part, name in _opened(output, "output", set())}


def _opened(value: Any, name: str, seen: set[int]) -> Iterator[tuple[Tensor, str]]:
    if isinstance(value, Tensor):
        yield value, name
        return
    if isinstance(value, (str, bytes, int, float, bool, type(None), type, nn.Module)) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Mapping):
        parts = [(part, f"{name}[{key!r}]") for key, part in value.items()]
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = [(part, f"{name}[{index}]") for index, part in enumerate(value)]
    else:
        parts = [(part, f"{name}.{key}") for key, part in attributes(value).items()]
    for part, inner in parts:
        yield from _opened(part, inner, seen)


def comparable(output: Any, where: str) -> dict[str, Tensor]:
    """The tensors of an output as flat float64 numbers on the CPU.

    Raises:
        InputError: there is no tensor in it: nothing could be compared.
    """
    found = {name: _numbers(part) for name, part in named_tensors(output).items()}
    if not found:
        kind = type(output).__name__
        raise InputError(
            f"{where}: expected an output with tensors, to compare, got {kind} without any. "
            "Give forward=, a function of model and batch that returns tensors."
        )
    return found


def _numbers(part: Tensor) -> Tensor:
    part = part.detach()
    if part.is_nested:
        part = part.values() if part.layout is torch.jagged else torch.cat([one.flatten() for one in part.unbind()])
    if part.layout is not torch.strided:
        part = part.to_dense()
    part = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
    return part.as_subclass(Tensor).double().flatten().cpu()


def difference(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """The largest difference of any value over the largest value of its tensor.

    It is infinite where only one of them is finite, or where the outputs differ in structure.
    """
    if before.keys() != after.keys() or any(before[name].shape != after[name].shape for name in before):
        return float("inf")
    found = 0.0
    for name, one in before.items():
        other, finite = after[name], one.isfinite()
        if not torch.equal(finite, other.isfinite()) or not torch.equal(one.isnan(), other.isnan()):
            return float("inf")
        if finite.any():
            one, other = one[finite], other[finite]
            largest = one.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            found = max(found, ((one - other).abs().max() / largest).item())
    return found


def ratio(change: Tensor, deviation: Tensor) -> float:
    """A change over a deviation: NaN if it is not known, infinite for a change of what does not vary."""
    if not (change.isfinite() and deviation.isfinite()):
        return float("nan")
    return (change / deviation).item() if deviation > 0 else float(change > 0) and float("inf")

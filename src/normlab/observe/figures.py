"""Figures of the values that a module puts out."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Values counted at a time: on a CPU as many as stay in its cache, elsewhere as many as a float32 counts by ones.
PIECE, LARGEST_COUNT = 2**16, 2**24

Figures = tuple[int, Tensor, Tensor, Tensor]  # of an output: number of values, mean, variance, counts


def values(output: Any) -> Tensor | None:
    """The first plain tensor of floating point in what a module puts out; None without one.

    It looks into tuples, lists, dicts and dataclasses. A nested tensor becomes one row of all its values.
    """
    if isinstance(output, Tensor) and output.is_nested:
        parts = [part.flatten() for part in output.detach().unbind()]
        return values(torch.cat(parts)) if parts else None
    if isinstance(output, Tensor):
        plain = output.layout == torch.strided and not output.is_meta
        # By torch.func.vmap, for instance.
        inside_transform = torch._C._functorch.is_functorch_wrapped_tensor(output)  # pyright: ignore
        return output if output.is_floating_point() and plain and not inside_transform else None
    return next((x for x in map(values, _parts(output)) if x is not None), None)


def _parts(output: Any) -> Iterable[Any]:
    if isinstance(output, Mapping):
        return output.values()
    if is_dataclass(output) and not isinstance(output, type):
        return [getattr(output, field.name) for field in fields(output)]
    return output if isinstance(output, tuple | list) else ()


def figures(x: Tensor, limit: float, bins: int) -> Figures:
    """Number of values, their mean and population variance, and counts (bins,) of the finite ones from −limit to limit.

    In float32 at least, without a graph, and without making a GPU wait.
    """
    x = x.detach()
    if x.dim() > 2 and not x.is_contiguous():
        x = x.movedim(1, -1)  # channels last lie in order then, and are not copied
    x = x.flatten()
    x = x if x.dtype == torch.float64 else x.float()
    number, mean = x.numel(), x.mean()
    variance = (x - mean).square_().mean()  # torch.var_mean takes several times as long
    if x.device.type == "cpu":
        finite = x if math.isfinite(mean) else x[x.isfinite()]
        count, piece = _count, PIECE
    else:
        finite, count, piece = x, _count_on_gpu, LARGEST_COUNT
    if number <= piece:
        return number, mean, variance, count(finite, limit, bins)
    return number, mean, variance, torch.stack([count(part, limit, bins) for part in finite.split(piece)]).sum(0)


def _count(x: Tensor, limit: float, bins: int) -> Tensor:
    """Some four times as fast as histc."""
    places = x.mul(bins / (2 * limit)).add_(bins / 2).clamp_(0, bins - 1)
    return torch.bincount(places.to(torch.int16), minlength=bins)


def _count_on_gpu(x: Tensor, limit: float, bins: int) -> Tensor:
    with _any_algorithm():  # 0·x is nan where x is not finite, and nan is in no bin
        return torch.histc(x.clamp(-limit, limit).add_(x * 0), bins, -limit, limit)


def pooled(outputs: list[Figures], bins: int) -> np.ndarray:
    """Number, mean, deviation and counts of the values of all outputs together, as one row of 3 + bins."""
    size = sum(output[0] for output in outputs)
    if not size:
        return np.array([0, np.nan, np.nan, *[0] * bins])
    parts = [(n / size, float(mean), float(variance)) for n, mean, variance, _ in outputs]
    mean = sum(share * m for share, m, _ in parts)
    variance = sum(share * (v + (m - mean) * (m - mean)) for share, m, v in parts)
    counts = sum(output[3].cpu().numpy() for output in outputs)
    return np.concatenate(([size, mean, math.sqrt(variance)], counts))


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Lets torch count on a GPU where only deterministic algorithms are allowed: its counts do not depend on order."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)

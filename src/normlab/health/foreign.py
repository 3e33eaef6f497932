"""Runs a norm's own code on a twin of it, guarded, and finds out which dimension holds its channels."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_map

from ..surgery.modules import OTHERS, registered_name
from ..surgery.outputs import tensors
from ..surgery.probe import library, on_meta, twin

CHANNELS_FIRST = (_NormBase, nn.GroupNorm)
LONGEST = 200  # characters of what foreign code raised


class Unmeasured(Exception):
    """A figure cannot be had; it says why."""


def is_plain(norm: nn.Module) -> bool:
    """Whether it computes as a class of torch's or ours does, over (N, C, *space)."""
    if isinstance(norm, torch.jit.ScriptModule):
        return False
    forward: Any = type(norm).forward
    known = isinstance(norm, CHANNELS_FIRST) or (library(type(norm)) and registered_name(norm) is not None)
    return known and forward.__module__.split(".")[0] in ("torch", "normlab")


def why_opaque(norm: nn.Module) -> str | None:
    """Why nothing of what a norm is given can be seen, or None."""
    if isinstance(norm, torch.jit.ScriptModule):
        return "compiled by TorchScript, which lets nobody look at what a norm is given"
    if isinstance(norm, OTHERS):
        return "normalises each image or position by itself, over other dimensions than the batch's"
    return None


def run(
    norm: nn.Module, args: Any, kwargs: Any, training: bool = False, parts: Mapping[str, Tensor] | None = None
) -> Any:
    """What the norm's `forward` gives, in evaluation mode unless `training`; the norm itself stays as it is.

    Args:
        norm: of any class.
        args: by position.
        kwargs: by keyword.
        training: in training mode.
        parts: tensors in the place of its own, by their names.

    Raises:
        Unmeasured: its code raised something.
    """
    try:
        probe = twin(norm, random=False)
        probe.training = training
        for name, part in (parts or {}).items():
            (probe._buffers if name in probe._buffers else probe._parameters)[name] = part  # type: ignore[reportArgumentType]
        if not is_plain(norm):  # it may write into what it is given
            args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return probe.forward(*args, **kwargs)
    except Exception as error:  # the code may be anybody's
        said = (str(error).strip().splitlines() or [""])[0][:LONGEST]
        raise Unmeasured(f"its forward, called once more by itself, raised {type(error).__name__}: {said}") from error


def output_like(output: Any, x: Tensor) -> Tensor:
    """The first tensor in a norm's output that is of floating point and has the shape of its input.

    Raises:
        Unmeasured: there is none.
    """
    for part in tensors(output):
        if part.shape == x.shape and part.is_floating_point():
            return part
    raise Unmeasured(f"puts out no tensor of the shape of its input, {tuple(x.shape)}")


def channel_dim(norm: nn.Module, args: Any, kwargs: Any, x: Tensor) -> int:
    """Which dimension of `x` holds the channels.

    It is known for classes of torch and ours. A NaN shows it for others: put in the place of the first running mean or
    the first γ, it reaches the first channel and no other.

    Raises:
        Unmeasured: nothing shows it.
    """
    if is_plain(norm):
        unbatched = isinstance(norm, _InstanceNorm) and x.dim() == norm._get_no_batch_dim()  # type: ignore[reportAttributeAccessIssue]
        return 0 if unbatched else 1
    if on_meta(norm):
        raise Unmeasured("has no values: its tensors are on the meta device")
    own = {**norm._parameters, **norm._buffers}
    shown = [name for name in ("running_mean", "weight") if own.get(name) is not None and own[name].numel() > 0]
    for name in shown:
        dim = _reached(norm, name, own[name].detach(), args, kwargs, x)
        if dim is not None:
            return dim
    if not shown:
        raise Unmeasured("has neither running statistics nor γ, which would show where its channels are")
    count = own[shown[0]].numel()
    raise Unmeasured(f"no dimension of its input, {tuple(x.shape)}, is seen to hold its {count} channels")


def _reached(norm: nn.Module, name: str, part: Tensor, args: Any, kwargs: Any, x: Tensor) -> int | None:
    """The dimension along which a NaN in the first value of `part` reaches the first index alone."""
    if not part.is_floating_point():
        return None
    spoilt = part.clone()
    spoilt[(0,) * spoilt.dim()] = float("nan")
    parts = {name: nn.Parameter(spoilt, False) if name in norm._parameters else spoilt}
    reached = output_like(run(norm, args, kwargs, parts=parts), x).isnan()
    reached &= ~output_like(run(norm, args, kwargs), x).isnan()
    for dim in (1, *range(2, x.dim()), 0)[: x.dim()] if x.dim() > 1 else (0,):
        expected = torch.zeros_like(reached)
        expected.select(dim, 0).fill_(True)
        if x.shape[dim] == part.numel() and torch.equal(reached, expected):
            return dim
    return None


def follows_statistics(norm: nn.Module, args: Any, kwargs: Any, x: Tensor, output: Tensor) -> bool:
    """Whether in evaluation it depends on x through (x − μ) / √(σ² + eps) of its running statistics alone.

    If it does, 2x + 1 with the mean 2μ + 1 and the variance 4σ² + 3 eps gives the same.
    """
    own: Any = norm
    eps = own.eps if isinstance(getattr(norm, "eps", None), (int, float)) else 0.0
    moved = {"running_mean": 2 * own.running_mean + 1, "running_var": 4 * own.running_var + 3 * eps}
    args, kwargs = tree_map(lambda leaf: 2 * leaf + 1 if leaf is x else leaf, (args, kwargs))
    try:
        other = output_like(run(norm, args, kwargs, parts=moved), x).double()
    except Unmeasured:
        return False
    output = output.double()
    largest = float(output.abs().max())
    return torch.allclose(other, output, rtol=1e-2, atol=1e-2 * largest, equal_nan=True)

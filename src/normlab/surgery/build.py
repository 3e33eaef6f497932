"""A new norm from an old one: what carries over, and what the report says of it."""

import inspect
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import NORMS, GroupNorm, build_norm
from ..nn.base import RunningStatistics
from .memory import Before, remember, remembered
from .modules import PARTS, never_updated, pristine, registered_name
from .probe import (
    activation_of,
    affine_dims,
    channels,
    eps_of,
    example,
    input_name,
    is_constant,
    library,
    on_meta,
    output,
    own_tensor,
    space_dims,
    twin,
)

# Of torch.nn.Module: what is called around a module's own computation. Handles to remove them go on working.
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip
TORCH = "torch"  # the target that is no norm of ours
TORCH_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
GROUPED = {"group", "group_ws", "evonorm_s0"}
FEWEST = 8  # values a group has, where its layer has so many channels
ANY_DIMS = (2, 3, 4, 5)  # of a tensor
FURTHER = ("residual", "mask")  # what layers of ours may be given beside the input
_OF_TORCH = set(nn.BatchNorm1d(1).__dict__) | set(nn.GroupNorm(1, 1).__dict__) | set(nn.InstanceNorm1d(1).__dict__)
_OF_OURS = {"activation", "step_bound", "process_group", "virtual_batch_size", "accepted_dims", "was", "_known"}


class Seen:
    """What is known of how a norm is used.

    Attributes:
        dims: space dimensions of what it is given; None if it is not known.
        values: how many a channel of one image has, at the fewest; None if it is not known.
        like: a tensor of the type and on the device that its parameters would have, if it had any.
    """

    def __init__(self, dims: int | None = None, values: int | None = None, like: Tensor | None = None):
        self.dims, self.values, self.like = dims, values, like


def values_a_statistic(old: nn.Module, to: str, seen: Seen) -> int | None:
    """How many values of one image the new norm would take each statistic over; None if it is not known."""
    values = seen.values if seen.values is not None else (1 if _takes_vectors(old) else None)
    if to == "layer_channels":
        return channels(old)
    if values is None:
        return None
    return values if to == "instance" else values * channels(old)


def _takes_vectors(norm: nn.Module) -> bool:
    """Whether it may be given (N, C): a norm of one space dimension, as torch's batch norm for vectors."""
    return space_dims(norm) == 1


def groups_for(old: nn.Module, seen: Seen) -> int:
    """Eight groups, or as many as divide the channels, but fewer where a group would have few values."""
    count = channels(old)
    values = seen.values if seen.values is not None else (1 if _takes_vectors(old) else FEWEST)
    groups = math.gcd(count, 8)
    while groups > 1 and count // groups * values < FEWEST:
        groups = max(divisor for divisor in range(1, groups) if count % divisor == 0)
    return groups


def built(old: nn.Module, to: str, seen: Seen, dims: int, options: dict[str, Any]) -> nn.Module:
    """The new layer, with what carries over from the old one.

    Args:
        old: the norm.
        to: a registered norm, or "torch".
        seen: of its use.
        dims: space dimensions where neither its class nor its use says how many: then the new layer takes any.
        options: for the constructor.
    """
    known = space_dims(old) if space_dims(old) is not None else seen.dims
    if known is None and registered_name(old) is None and not isinstance(old, (nn.GroupNorm, _BatchNorm)):
        taken = affine_dims(old)
        known = taken[0] if len(taken) == 1 else None
    space = max(known, 1) if known is not None else dims
    new = _made(old, to, seen, space, dict(options))
    if known is None and to != TORCH and hasattr(new, "accepted_dims"):
        new.__dict__["accepted_dims"] = ANY_DIMS
    _move(old, new, seen)
    _hand_over_parameters(old, new)
    _hand_over_statistics(old, new)
    _hand_over_attributes(old, new)
    if to != TORCH:
        _keep_in_mind(old, new, to)
    new = _with_activation(old, new) if to == TORCH else new
    new.train(old.training)
    for hooks in HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    return new


def _made(old: nn.Module, to: str, seen: Seen, space: int, options: dict[str, Any]) -> nn.Module:
    """The layer as its constructor makes it."""
    if to == TORCH:
        return _made_of_torch(old, space, options)
    accepted = accepted_options(to, space)
    weight, bias = getattr(old, "weight", None), getattr(old, "bias", None)
    if to in GROUPED and "num_groups" in accepted:
        options.setdefault("num_groups", groups_for(old, seen))
    if "affine" in accepted:
        options.setdefault("affine", weight is not None)
    if "bias" in accepted and weight is not None:
        options.setdefault("bias", bias is not None)
    if getattr(old, "activation", None) is not None:
        options.setdefault("activation", old.activation)
    eps = _eps(old)
    if eps is not None and "eps" in accepted and accepted["eps"].default == 1e-5:
        options.setdefault("eps", eps)
    has, momentum = torch_momentum(old)
    if NORMS[to].averages and has and (momentum or to == "batch"):  # None is the mean of all batches
        options.setdefault("momentum", momentum)
    if "process_group" in accepted:
        options.setdefault("process_group", getattr(old, "process_group", None))
    needs = getattr(NORMS[to].layers[space - 1], "needs_statistics", False)
    if "track_running_stats" in accepted and isinstance(old, (_BatchNorm, RunningStatistics)) and not needs:
        options.setdefault("track_running_stats", old.running_mean is not None)
    return build_norm(to, channels(old), space, **options)


def takes(*kinds: type[nn.Module]) -> set[str]:
    """The arguments that the forward passes of classes take beside the input."""
    return {name for kind in kinds for name in FURTHER if name in inspect.signature(kind.forward).parameters}


def accepted_options(to: str, space: int) -> dict[str, inspect.Parameter]:
    """The options of a registered norm's constructor, and the layer's too where a function builds it."""
    builder = NORMS[to].layers[space - 1]
    inner = builder.args[0] if isinstance(builder, partial) and builder.args else builder
    own, outer = inspect.signature(inner).parameters, inspect.signature(builder).parameters
    if inner is builder:
        return dict(own)
    return {**own, **{name: one for name, one in outer.items() if one.kind is one.POSITIONAL_OR_KEYWORD}}


def _made_of_torch(old: nn.Module, space: int, options: dict[str, Any]) -> nn.Module:
    """The layer of torch that does the same."""
    affine = getattr(old, "weight", None) is not None
    common = {"affine": affine, "bias": getattr(old, "bias", None) is not None} if affine else {"affine": False}
    if isinstance(old, GroupNorm):
        return nn.GroupNorm(old.num_groups, channels(old), old.eps, **common, **options)
    has, momentum = torch_momentum(old)
    momentum = momentum if has else 0.1
    tracked = getattr(old, "running_mean", None) is not None
    kind: Any = TORCH_BATCH_NORMS[space - 1]
    return kind(channels(old), eps_of(old), momentum, track_running_stats=tracked, **common, **options)


def _with_activation(old: nn.Module, new: nn.Module) -> nn.Module:
    activation = activation_of(old)
    return new if isinstance(activation, nn.Identity) else nn.Sequential(new, activation)


def torch_momentum(norm: nn.Module) -> tuple[bool, float | None]:
    """Whether there is a momentum in torch's meaning, the norm's own or of the one before it, and which."""
    before = remembered(norm)
    if before is not None and before.has_momentum:
        return True, before.momentum
    name = registered_name(norm)
    own = isinstance(norm, _BatchNorm) if name is None else NORMS[name].averages
    return (True, getattr(norm, "momentum", None)) if own and hasattr(norm, "momentum") else (False, None)


def _eps(norm: nn.Module) -> float | None:
    """The norm's own eps, or that of the one before it that had one."""
    before = remembered(norm)
    return before.eps if before is not None and before.eps is not None else eps_of(norm)


def _keep_in_mind(old: nn.Module, new: nn.Module, to: str) -> None:
    """The momentum and eps that the new norm cannot have."""
    has, momentum = torch_momentum(old)
    has = has and not (NORMS[to].averages and getattr(new, "momentum", None) == momentum)
    eps = None if getattr(new, "eps", None) == _eps(old) else _eps(old)
    if has or eps is not None:
        remember(new, Before(momentum if has else None, has, eps))


def _move(old: nn.Module, new: nn.Module, seen: Seen) -> None:
    """Move it to the old one's device and type, or to those of its use if the old one has no tensors."""
    part = next(iter((*old.parameters(), *old.buffers())), None)
    if part is None and seen.like is not None:
        new.to(seen.like.device, seen.like.dtype)
    if part is not None:
        new.to(part.device)
        typed = getattr(old, "weight", None)
        typed = old._buffers.get("running_mean") if typed is None else typed
        if typed is not None:
            new.to(typed.dtype)


def _hand_over_parameters(old: nn.Module, new: nn.Module) -> None:
    """γ and β: the same objects, where both have them; a new parameter where they were constants."""
    for name in ("weight", "bias"):
        part, there = getattr(old, name, None), getattr(new, name, None)
        if not isinstance(part, Tensor) or there is None:
            continue
        if isinstance(part, nn.Parameter):
            new._parameters[name] = part
        else:
            new._parameters[name] = nn.Parameter(part.detach().clone().reshape(there.shape))


def _hand_over_statistics(old: nn.Module, new: nn.Module) -> None:
    """Hand over those that both have, but none of a norm that never saw a batch: the new one begins fresh."""
    if "running_mean" in old._buffers and not never_updated(old) and not on_meta(old):
        own = dict(new.named_buffers())
        there = {name: value for name, value in old.named_buffers() if name in own}
        if "running_mean" in there:
            # What is learned beside γ and β begins as in a new layer.
            there |= {name: value for name, value in new.named_parameters() if name not in PARTS}
            there = {name: value.reshape(own[name].shape) if name in PARTS else value for name, value in there.items()}
            new.load_state_dict(there, strict=False)
    switched = (
        isinstance(getattr(old, "track_running_stats", None), bool) and old._buffers.get("running_mean") is not None
    )
    if switched and new._buffers.get("running_mean") is not None:
        new.__dict__["track_running_stats"] = old.track_running_stats


def extra_attributes(old: nn.Module) -> dict[str, Any]:
    """What somebody put on a norm beside what its class has, such as a `qconfig`."""
    own = set(nn.Module().__dict__) | _OF_TORCH | _OF_OURS
    if registered_name(old) is not None:
        own |= set(pristine(old).__dict__)
    return {key: value for key, value in old.__dict__.items() if key not in own and not key.startswith("_")}


def _hand_over_attributes(old: nn.Module, new: nn.Module) -> None:
    for key, value in extra_attributes(old).items():
        if key not in new.__dict__ and not hasattr(type(new), key):
            new.__dict__[key] = value


def note(old: nn.Module, new: nn.Module, to: str, seen: Seen, established: str) -> str:
    """What carries over, and what was assumed."""
    if isinstance(new, nn.Identity):
        return "γ, β and statistics are gone"
    notes = [established]
    if to == "frozen" and never_updated(old):
        notes.append("its statistics, 0 and 1, are those of a layer that has seen no batch")
    has, momentum = torch_momentum(old)
    if has and hasattr(new, "momentum") and getattr(new, "momentum", None) != momentum:
        notes.append(f"momentum is {new.momentum}, no longer {momentum}, which is kept for the way back")
    if "weight" in old._buffers and "weight" in new._parameters:
        notes.append("γ and β, constants so far, are parameters now")
    says = getattr(old, "num_features", None) or getattr(old, "num_channels", None)
    if isinstance(says, int) and says != channels(old):
        notes.append(f"has {channels(old)} channels, though it says {says}")
    notes += _notes_on_use(old, new, to, seen)
    extra = [name for name, _ in new.named_parameters() if name.split(".")[-1] not in ("weight", "bias")]
    if extra:
        notes.append(f"has new parameters: {', '.join(extra)}")
    before, after = own_tensor(old, "running_mean"), own_tensor(new, "running_mean")
    if before is not None and after is not None and after.dtype.itemsize < before.dtype.itemsize:
        notes.append(f"its statistics are rounded to {after.dtype}, the type of γ")
    if carried := sorted(set(extra_attributes(old)) & set(new.__dict__)):
        notes.append(f"attributes carry over: {', '.join(carried)}")
    if to != TORCH and NORMS[to].activates:
        notes.append("is an activation too, and the one after it stays")
    if to != TORCH and NORMS[to].convs != NORMS["batch"].convs:
        notes.append("made to follow convolutions of another kind, which stay as they are")
    return "; ".join(notes)


def _notes_on_use(old: nn.Module, new: nn.Module, to: str, seen: Seen) -> list[str]:
    notes = []
    if (key := input_name(old)) != "input" and seen.values is None:
        notes.append(f"assumed to be given its input by position, not as {key}=")
    lost = sorted(takes(type(old)) - takes(type(new))) if library(type(old)) and seen.values is None else []
    if lost:
        notes.append(f"assumed to be called without {'= and '.join(lost)}=, which {type(new).__name__} does not take")
    if new.__dict__.get("accepted_dims") == ANY_DIMS:
        notes.append(f"takes any number of space dimensions, as {type(old).__name__} does")
    groups = getattr(new, "num_groups", None)
    if to in GROUPED and groups is not None and groups < math.gcd(channels(old), 8):
        most = math.gcd(channels(old), 8)
        values = channels(old) // most * (seen.values or 1)
        notes.append(f"num_groups is {groups}: of {most} groups each would have too few values, {values}")
    if to == "instance" and seen.values is None:
        given, not_given = ("(N, C, L)", "(N, C)") if _takes_vectors(old) else ("more than one position", "one")
        notes.append(f"assumed to be given {given}: of {not_given} it would put out β whatever the input")
    return notes


def established(old: nn.Module, new: nn.Module) -> str:
    """Whether both give the same in evaluation mode, as found by running them on made-up values."""
    if on_meta(old):
        return "on the meta device, without values: nothing was run, what it does in evaluation is assumed"
    own = space_dims(old) if space_dims(old) is not None else space_dims(new)
    if isinstance(new, nn.Sequential):
        own = space_dims(new[0])
    results = [_same_at(old, new, dims) for dims in ((own,) if own is not None else (2, 1, 3))]
    known = [result for result in results if result is not None]
    if not known:
        return "not run: its statistics or parameters are not finite, or it fails on made-up values"
    return "the same in evaluation" if all(known) else _another(old, new)


def _same_at(old: nn.Module, new: nn.Module, dims: int) -> bool | None:
    x = example(old, dims)
    modes = [(module, module.training) for module in new.modules()]
    try:
        for module, _ in modes:
            module.training = False
        y, other = output(twin(old, random=False), x.clone()), output(new, x.clone())
    finally:
        for module, training in modes:
            module.training = training
    if y is None or other is None or not y.isfinite().all():
        return None
    return torch.allclose(y, other, rtol=1e-3, atol=1e-5 * float(y.abs().max()))


def _another(old: nn.Module, new: nn.Module) -> str:
    kept = [symbol for symbol, name in (("γ", "weight"), ("β", "bias")) if _shared(old, new, name)]
    return "another function" + (f", with the same {' and '.join(kept)}" if kept else "")


def _shared(old: nn.Module, new: nn.Module, name: str) -> bool:
    return getattr(old, name, None) is not None and getattr(old, name) is getattr(new, name, None)


def is_frozen(norm: nn.Module) -> bool:
    """Whether it is a frozen batch norm: of our class, or a foreign one that behaves so."""
    if registered_name(norm) is not None:
        return registered_name(norm) == "frozen"
    foreign = not isinstance(norm, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
    return foreign and "running_mean" in norm._buffers and bool(affine_dims(norm)) and is_constant(norm)

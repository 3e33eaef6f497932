"""What a norm computes, found by running it on made-up values: a twin of it, inside a guard."""

import copy
import inspect
import math
import random
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import check
from ..nn.activation import SLOPES
from ..nn.frozen import FrozenBatchNorm
from ..nn.mabn import MovingAverageBatchNorm

CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
CONVOLUTIONS |= {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
AFFINE = ("weight", "bias", "running_mean", "running_var")  # of batch norm, whatever its class
RANKS = (2, 1, 3, 0)  # space dimensions to try
IMAGES, SIDE = 5, 3


def library(kind: type) -> bool:
    """Whether a class is torch's or ours; a parametrized one is what it was made from."""
    if kind.__module__ == "torch.nn.utils.parametrize" and kind.__base__ is not None:
        return library(kind.__base__)
    return kind.__module__.split(".")[0] in ("torch", "normlab")


def input_name(module: nn.Module) -> str:
    """What its `forward` calls its input: "input", as torch does, or otherwise."""
    if library(type(module)):
        return "input"
    return next(iter(inspect.signature(module.forward).parameters), "input")


def channels(module: nn.Module) -> int:
    """C of the (N, C, *space) that the norm takes: by its tensors, or without any by what it says."""
    for name in ("running_mean", "running_var", "weight", "bias"):
        part = own_tensor(module, name)
        if part is not None:
            return part.numel()
    return getattr(module, "num_features", None) or getattr(module, "num_channels", None) or 0


def own_tensor(module: nn.Module, name: str) -> Tensor | None:
    """A parameter, buffer or plain attribute of a module; a property, which may be anybody's code, is not run."""
    for held in (module._parameters, module._buffers, module.__dict__):
        part = held.get(name)
        if isinstance(part, Tensor):
            return part
    return None


def space_dims(module: nn.Module) -> int | None:
    """How many space dimensions the norm's class says it takes; None if it takes any, or was told to."""
    if "accepted_dims" in module.__dict__:
        return None
    if _checks_by_itself(type(module)) and not on_meta(module):
        return _only_dims(module)
    for kind in type(module).__mro__:
        for dims in (1, 2, 3):
            if f"{dims}d" in kind.__name__:
                return dims
    return None


def _checks_by_itself(kind: type) -> bool:
    """Whether a foreign subclass has another idea of the inputs that it takes than the class that it is made from."""
    definer = next((base for base in kind.__mro__ if "_check_input_dim" in vars(base)), kind)
    return not library(definer)


def _only_dims(module: nn.Module) -> int | None:
    """How many space dimensions a norm takes, found by running it; None if several, or none that was tried."""
    taken = [dims for dims in RANKS if output(twin(module), example(module, dims)) is not None]
    if sorted(taken) == [0, 1]:  # vectors and sequences, as torch's layer of one dimension
        return 1
    return taken[0] if len(taken) == 1 else None


def model_dims(model: nn.Module) -> int | None:
    """How many space dimensions most of its convolutions have; None without any."""
    counts = [dims for module in model.modules() for kind, dims in CONVOLUTIONS.items() if isinstance(module, kind)]
    return max(set(counts), key=counts.count) if counts else None


def twin(module: nn.Module, random: bool = True) -> nn.Module:
    """A module of the same class and attributes, with tensors, modules and lists of its own, no hooks, in evaluation.

    With `random` γ, β and statistics are drawn, so that no two channels are alike.
    """
    new = type(module).__new__(type(module))
    fresh = nn.Module().__dict__
    new.__dict__.update({key: fresh.get(key, _apart(value)) for key, value in module.__dict__.items()})
    generator = torch.Generator().manual_seed(1)
    new.__dict__["_modules"] = {
        name: child if child is None or isinstance(child, torch.jit.ScriptModule) else twin(child, random=False)
        for name, child in module._modules.items()
    }
    for kind in ("_parameters", "_buffers"):
        new.__dict__[kind] = {
            name: None if part is None else _drawn(name, part.detach(), generator if random else None)
            for name, part in getattr(module, kind).items()
        }
    for name, part in new.__dict__["_parameters"].items():
        new.__dict__["_parameters"][name] = None if part is None else nn.Parameter(part, False)
    new.__dict__["training"] = False
    return new


def _apart(value: Any) -> Any:
    """A copy of what foreign code may write into, such as a list of what it was given."""
    return copy.copy(value) if isinstance(value, (list, dict, set, deque)) else value


def _drawn(name: str, part: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None or name not in AFFINE or not part.is_floating_point():
        return part.clone()
    values = torch.rand(part.shape, generator=generator) * 2 + 0.5
    signs = 1 if name == "running_var" else torch.rand(part.shape, generator=generator).sub(0.3).sign()
    return (values * signs).to(part)


def example(module: nn.Module, dims: int | None = None) -> Tensor:
    """An input that the norm takes, with values on both sides of 0."""
    device, dtype = typed(module) or (None, None)
    space = dims if dims is not None else space_dims(module)
    shape = IMAGES, channels(module), *[SIDE] * (2 if space is None else space)
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(shape, generator=generator)).to(device, dtype)


def output(module: nn.Module, x: Tensor, kind: type[nn.Module] | None = None) -> Tensor | None:
    """What its `forward` (or that of class `kind`) gives, without hooks or gradients; None if it fails.

    The code may be anybody's: whatever it raises says that it does not take this input.
    """
    try:
        with torch.no_grad(), same_random([x] if x.is_cuda else []), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = (kind or type(module)).forward(module, x)  # type: ignore[reportAttributeAccessIssue]
    except Exception:
        return None
    return y if isinstance(y, Tensor) and y.shape == x.shape else None


@contextmanager
def same_random(parts: Iterable[Tensor] = ()) -> Iterator[None]:
    """After, generators of random numbers are as before: torch's, of the GPUs of `parts` too, numpy's and Python's."""
    state, numbers = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng({part.get_device() for part in parts}):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numbers)


def check_made(model: nn.Module) -> None:
    """An InputError for a model with parameters or buffers that are not made yet, as those of lazy modules."""
    parts = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, part in parts if is_lazy(part)]
    accepted = "one whose parameters are all there: run a batch through it first"
    check(not lazy, "model", ", ".join(lazy), accepted)


Typed: TypeAlias = tuple[torch.device, torch.dtype] | None


def typed(module: nn.Module) -> Typed:
    """Device and type of its first tensor of real numbers; None without any."""
    part = next((part for part in (*module.parameters(), *module.buffers()) if part.is_floating_point()), None)
    return None if part is None else (part.device, part.dtype)


def follow(old: nn.Module, then: Typed, new: nn.Module) -> None:
    """Moves and casts a module that was out of the model as the one in its place was, since it had `then`."""
    now = typed(new)
    if now is not None and then is not None and now != then:
        old.to(*now)


def version(part: Tensor) -> int:
    """How often a tensor was written; 0 of tensors made in inference mode, which do not count."""
    return 0 if part.is_inference() else part._version


def on_meta(module: nn.Module) -> bool:
    """Whether it has no values to run with."""
    return any(part.is_meta for part in (*module.parameters(), *module.buffers()))


def computes_as_its_base(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a subclass gives in evaluation what `base` gives, whatever its statistics, γ and β.

    It has to refuse what `base` refuses too: fewer channels, of which a slimmable norm takes its first ones.
    """
    kind: Any = type(module)
    if kind.__call__ is not nn.Module.__call__:
        return False
    if kind.forward is base.forward:
        return True
    if on_meta(module):
        return False
    probe = twin(module)
    x = example(probe)
    one, other = output(probe, x.clone()), output(probe, x.clone(), base)
    if one is None or other is None or not _close(one, other):
        return False
    fewer = x[:, :-1]
    return output(probe, fewer.clone()) is None or output(probe, fewer.clone(), base) is not None


def is_affine(norm: nn.Module, dims: int | None = None) -> bool:
    """Whether in evaluation it is what its statistics, γ and β say, with the activation it has.

    It is tried on an input with `dims` space dimensions, or with any that it takes.
    """
    return bool(affine_dims(norm, (dims,) if dims is not None else RANKS))


def affine_dims(norm: nn.Module, tried: tuple[int, ...] = RANKS) -> list[int]:
    """For which numbers of space dimensions it is a scale and shift in evaluation."""
    if not all(hasattr(norm, name) for name in AFFINE) or not isinstance(norm.running_mean, Tensor):
        return []
    if not isinstance(norm.running_var, Tensor) or on_meta(norm) or isinstance(norm, torch.jit.ScriptModule):
        return []
    return [dims for dims in tried if _affine_at(twin(norm), dims) and _affine_at(twin(norm, random=False), dims)]


def _affine_at(probe: nn.Module, dims: int) -> bool:
    x = example(probe, dims)
    y = output(probe, x.clone())
    if y is None:
        return False
    scale, shift = scale_and_shift(probe)
    along = (1, -1, *[1] * dims)
    return _close(y.double(), activation_of(probe)(scale.view(along) * x.double() + shift.view(along)), x.dtype)


def _close(one: Tensor, other: Tensor, dtype: torch.dtype | None = None) -> bool:
    finite = other.isfinite()
    if not torch.equal(finite, one.isfinite()):
        return False
    largest = float(other[finite].abs().max()) if finite.any() else 0.0
    close = 8 * max(torch.finfo(dtype or one.dtype).eps, 1e-5)
    return torch.allclose(one[finite].double(), other[finite].double(), rtol=close, atol=close * largest)


def scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The scale and shift of each channel in evaluation, in float64."""
    parts: Any = norm  # γ and β may be buffers too
    mean, var = parts.running_mean.double().flatten(), parts.running_var.double().flatten()
    scale = (var + (eps_of(norm) or 0.0)).rsqrt()
    if parts.weight is not None:
        scale = scale * parts.weight.detach().double().flatten()
    shift = -mean * scale
    return scale, shift if parts.bias is None else shift + parts.bias.detach().double().flatten()


def eps_of(norm: nn.Module) -> float | None:
    """Its eps; where it has no such attribute, what it adds to the variance when that is 0, found by running a twin.

    None if it keeps no variance, or does not run.

        y = x / √(0 + eps)          eps = (x / y)²          0 where y is infinite or NaN
    """
    own = getattr(norm, "eps", None)
    if isinstance(own, (int, float)):
        return float(own)
    if not isinstance(norm._buffers.get("running_var"), Tensor) or on_meta(norm):
        return None
    probe = twin(norm)
    with torch.no_grad():
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 0.0)):
            part = getattr(probe, name, None)
            if isinstance(part, Tensor):
                part.fill_(value)
    for dims in RANKS:
        x = example(probe, dims).abs() + 1
        y = output(probe, x.clone())
        if y is not None:
            eps = (x.double() / y.double()).square().median().item()
            return float(f"{eps:.5g}") if math.isfinite(eps) else 0.0
    return None


def activation_of(norm: nn.Module) -> nn.Module:
    """The activation that a norm of ours has, as a module of its own."""
    name = getattr(norm, "activation", None)
    if name is None or not library(type(norm)):
        return nn.Identity()
    return nn.ReLU() if SLOPES[name] == 0 else nn.LeakyReLU(SLOPES[name])


def is_linear_in_its_parameters(norm: nn.Module) -> bool:
    """Whether in evaluation it is γ x̂ + β, channel by channel, of an x̂ that knows nothing of γ and β."""
    if not {"weight", "bias"} <= {name for name, _ in norm.named_parameters()} or on_meta(norm):
        return False
    probe, plain = twin(norm), twin(norm)
    with torch.no_grad():
        plain.get_parameter("weight").fill_(1)
        plain.get_parameter("bias").fill_(0)
    x = example(probe)
    y, x_hat = output(probe, x.clone()), output(plain, x.clone())
    if y is None or x_hat is None:
        return False
    gamma, beta = (getattr(probe, name).detach().view(1, -1, *[1] * (x.dim() - 2)) for name in ("weight", "bias"))
    return _close(y, gamma * x_hat + beta)


def is_constant(norm: nn.Module) -> bool:
    """Whether it computes in training what it does in evaluation and keeps its statistics: a frozen norm."""
    for dims in (space_dims(norm),) if space_dims(norm) is not None else RANKS:
        probe = twin(norm)
        x = example(probe, dims)
        evaluated = output(probe, x.clone())
        probe.training = True
        before = [part.clone() for part in probe.buffers()]
        trained = output(probe, x.clone())
        if evaluated is not None and trained is not None:
            kept = all(torch.equal(*pair) for pair in zip(before, probe.buffers(), strict=True))
            return kept and torch.equal(evaluated, trained)
    return False


def statistics_kind(norm: nn.Module) -> str | None:
    """What its running statistics are statistics of, found by training a twin on one batch.

    "pooled": mean and variance of all values of a channel. "images": the means over images of their own means and
    variances, as instance norm has. "squares": the mean square, in the place of the variance. "constant": nothing
    moves them. None: something else, or it could not be run.
    """
    if library(type(norm)):
        if isinstance(norm, (FrozenBatchNorm, MovingAverageBatchNorm)):
            return "constant" if isinstance(norm, FrozenBatchNorm) else "squares"
        return "images" if isinstance(norm, nn.modules.instancenorm._InstanceNorm) else "pooled"
    if is_constant(norm):
        return "constant"
    dims = space_dims(norm)
    kinds = (_kind_at(norm, tried) for tried in ((dims,) if dims is not None else (2, 1, 3)))
    return next((kind for kind in kinds if kind is not None), None)


def _kind_at(norm: nn.Module, dims: int) -> str | None:
    """The kind of a batch's statistics that its own move towards in training."""
    probe = twin(norm)
    before = [probe._buffers[name] for name in ("running_mean", "running_var")]
    before = [None if part is None else part.double().flatten().clone() for part in before]
    probe.training = True
    if "momentum" in probe.__dict__:  # of 0 nothing would be seen, and little of None after many batches
        probe.__dict__["momentum"] = 0.5
    x = example(probe, dims)
    if output(probe, x.clone()) is None:
        return None
    after = [probe._buffers[name] for name in ("running_mean", "running_var")]
    x = x.double()
    values, images = x.transpose(0, 1).flatten(1), x.flatten(2) if x.dim() > 2 else x[..., None]
    for correction in (1, 0):
        found = {
            "pooled": (values.mean(1), values.var(1, correction=correction)),
            "images": (images.mean((0, 2)), images.var(2, correction=correction).mean(0)),
        }
        for kind, batch in found.items():
            if _moved_towards(before, after, batch):
                return kind
    return None


def _moved_towards(before: Any, after: Any, batch: tuple[Tensor, Tensor]) -> bool:
    """Whether mean and variance went the same share of the way, above 0, from before to those of a batch."""
    if any(part is None for part in (*before, *after)):
        return False
    way = torch.cat([new - old for new, old in zip(batch, before, strict=True)])
    moved = torch.cat([new.double().flatten() - old for new, old in zip(after, before, strict=True)])
    share = float((way * moved).sum() / way.square().sum())
    return 0 < share <= 1 + 1e-6 and bool((moved - share * way).abs().max() <= 1e-3 * share * way.abs().max())

"""Which modules of a model are norms, and where they are."""

import copy
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase, _NormBase
from torch.nn.parameter import UninitializedParameter

from ..choice import Choice, is_meant
from ..errors import check
from ..nn import NORMS

CONVOLUTIONS = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
CONVOLUTIONS |= {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
# Modules that normalise, but not (N, C, *space) over channels.
OTHERS = (nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)


def classes(name: str) -> set[type[nn.Module]]:
    """Those of a registered norm, for any number of space dimensions; none if it is built by a function."""
    layers = (layer.args[0] if isinstance(layer, partial) and layer.args else layer for layer in NORMS[name].layers)
    return {layer for layer in layers if isinstance(layer, type) and layer is not nn.Identity}


def registered_name(module: nn.Module) -> str | None:
    """The name of the registered norm of this very class; None for others."""
    return next((name for name in NORMS if type(module) in classes(name)), None)


class Place(NamedTuple):
    """Where a module is: `parent._modules[key]`; the model itself has no parent."""

    name: str
    parent: nn.Module | None
    key: str


class Found(NamedTuple):
    """A norm of a model, with all its places."""

    module: nn.Module
    places: list[Place]

    @property
    def name(self) -> str:
        """All its names."""
        return ", ".join(place.name for place in self.places)


def copied(model: nn.Module) -> nn.Module:
    """A copy.

    Raises:
        InputError: parts of it are not made yet.
    """
    lazy = [name for name, part in model.named_parameters() if isinstance(part, UninitializedParameter)]
    check(not lazy, "model", ", ".join(lazy), "one whose parameters are all there: run a batch through it first")
    return copy.deepcopy(model)


def norms(model: nn.Module) -> list[Found]:
    """Every module that normalises, once, in the order of the model."""
    found: dict[int, Found] = {}
    parents = dict(model.named_modules(remove_duplicate=False))
    for name, module in parents.items():
        if is_norm(module):
            parent, _, key = name.rpartition(".")
            place = Place(name, parents[parent] if name else None, key)
            found.setdefault(id(module), Found(module, [])).places.append(place)
    return list(found.values())


def is_norm(module: nn.Module) -> bool:
    """Whether it normalises: by its class, or by its class's name if it has no modules inside."""
    known = isinstance(module, (_NormBase, nn.GroupNorm, *OTHERS)) or registered_name(module) is not None
    kind = type(module)
    # torch.nn.utils has parametrizations of weights by their norm.
    looks = "norm" in kind.__name__.lower() and not kind.__module__.startswith("torch.nn.utils")
    return known or (looks and not list(module.children()))


def why_not(module: nn.Module) -> str | None:
    """Why no other norm can take this one's place, or None if one can."""
    kind = type(module)
    if isinstance(module, OTHERS):
        return "does not normalise over the channels of (N, C, *space)"
    if isinstance(module, _LazyNormBase):
        return "does not know its channels yet: run a batch through the model first"
    if not isinstance(module, (_NormBase, nn.GroupNorm)) and registered_name(module) is None:
        return "of a class that is not known"
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "parametrized: remove the parametrizations first"
    own = set(dict(module.named_parameters(recurse=False))) - {"weight", "bias"}
    if own and kind.__module__.split(".")[0] not in ("torch", "normlab"):
        return f"has parameters of its own: {', '.join(sorted(own))}"
    if list(module.children()):
        return "has modules inside, which would be lost: " + ", ".join(dict(module.named_children()))
    plain = kind.__module__.split(".")[0] in ("torch", "normlab")
    if not plain and not _computes_as_its_base(module):
        return f"computes something else than {_base(kind).__name__}: a conversion would lose it"
    return None


def _base(kind: type[nn.Module]) -> type[nn.Module]:
    return next(base for base in kind.__mro__ if base.__module__.split(".")[0] in ("torch", "normlab"))


def _computes_as_its_base(module: nn.Module) -> bool:
    """Whether a subclass gives what the class of torch's or ours that it is made from gives."""
    kind = type(module)
    base = _base(kind)
    if kind.forward is base.forward:
        return True
    x = example(module)
    training = module.training
    try:
        module.training = False
        with torch.no_grad():
            return torch.allclose(kind.forward(module, x), base.forward(module, x), atol=1e-6)
    except Exception:  # whatever a forward of its own may raise on this input, it is not its base's
        return False
    finally:
        module.training = training


def channels(module: nn.Module) -> int:
    """C of the (N, C, *space) that the norm takes."""
    found: Any = getattr(module, "num_features", None) or getattr(module, "num_channels", None)
    return found or len(module.get_buffer("running_mean"))


def untouched(module: nn.Module) -> bool:
    """Whether its running statistics, if it has any, are those that every layer begins with, 0 and 1."""
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return mean is not None and var is not None and not mean.any() and bool((var == 1).all())


def example(module: nn.Module, dims: int | None = None) -> Tensor:
    """An input that the norm takes, with values on both sides of 0."""
    part = next((part for part in (*module.parameters(), *module.buffers()) if part.is_floating_point()), None)
    options: dict[str, Any] = {} if part is None else {"device": part.device, "dtype": part.dtype}
    shape = 4, channels(module), *[3] * (dims or space_dims(module) or 2)
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(shape, generator=generator)).to(**options)


def space_dims(module: nn.Module) -> int | None:
    """How many space dimensions the norm's name says it takes; None if it takes any."""
    for kind in type(module).__mro__:
        for dims in (1, 2, 3):
            if f"{dims}d" in kind.__name__:
                return dims
    return None


def model_dims(model: nn.Module) -> int | None:
    """How many space dimensions most of its convolutions have; None without any."""
    counts = [dims for module in model.modules() for kind, dims in CONVOLUTIONS.items() if isinstance(module, kind)]
    return max(set(counts), key=counts.count) if counts else None


def chosen(choice: Choice | Iterable[Choice] | None, found: Found) -> bool:
    """Whether a norm is meant, at any of its places; None means all.

    Raises:
        InputError: the choice is no choice.
    """
    return choice is None or is_meant(found.module, [place.name for place in found.places], choice)


def called(module: nn.Module) -> str:
    """Its class, in words that tell torch's from ours."""
    kind = type(module)
    return ("torch " if kind.__module__.startswith("torch.") else "") + kind.__name__


def put(model: nn.Module, found: Found, new: nn.Module) -> nn.Module:
    """Put `new` at every place of a norm; returns the model, which is `new` if the model was that norm."""
    for place in found.places:
        if place.parent is None:
            model = new
        else:
            place.parent._modules[place.key] = new
    return model

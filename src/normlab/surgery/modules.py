"""Which modules of a model are norms, where they are, and why one cannot be replaced."""

import copy
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _LazyNormBase, _NormBase
from torch.nn.utils import parametrize

from ..choice import Choice, is_meant
from ..errors import InputError, check, unknown
from ..nn import NORMS, build_norm
from ..nn.base import is_fresh
from .places import Held, Place, held_modules
from .probe import channels, check_made, computes_as_its_base, is_affine, library, own_tensor, space_dims

# Modules that normalise, but not (N, C, *space) over channels.
OTHERS = (nn.LayerNorm, nn.RMSNorm, nn.LocalResponseNorm, nn.CrossMapLRN2d)
KNOWN = (_NormBase, nn.GroupNorm, *OTHERS)
STATISTICS = {"running_mean", "running_var"}
PARTS = {"weight", "bias", *STATISTICS, "num_batches_tracked"}  # of batch norm
_NAMED_SO = re.compile(r"Norm(?![a-z])|norm$")  # not NormalSampler


def classes(name: str) -> set[type[nn.Module]]:
    """Those of a registered norm, for any number of space dimensions; none if it is built by a function."""
    layers = (layer.args[0] if isinstance(layer, partial) and layer.args else layer for layer in NORMS[name].layers)
    found = {layer for layer in layers if isinstance(layer, type) and layer is not nn.Identity}
    return found | {layer.with_activation for layer in found if hasattr(layer, "with_activation")}


def registered_name(module: nn.Module) -> str | None:
    """The name of the registered norm of this very class; None for others."""
    return next((name for name in NORMS if type(module) in classes(name)), None)


@dataclass(frozen=True, eq=False)
class Found:
    """A norm of a model, with all that holds it."""

    held: Held

    @property
    def module(self) -> nn.Module:
        """The norm."""
        return self.held.module

    @property
    def hidden(self) -> bool:
        """Whether torch does not see it."""
        return self.held.hidden

    @property
    def places(self) -> list[Place]:
        """Where another can be put."""
        return [*self.held.registered, *self.held.beside]

    @property
    def names(self) -> list[str]:
        """By which torch knows it; where it does not, by what holds it."""
        return self.held.names or [place.name for place in self.held.beside] or self.held.stuck

    @property
    def name(self) -> str:
        """All its names."""
        return ", ".join(self.names)


def copied(model: nn.Module) -> nn.Module:
    """A copy.

    Raises:
        InputError: parts of it are not made yet, or cannot be copied.
    """
    check_made(model)
    memo: dict[int, Any] = {}
    try:
        new = copy.deepcopy(model, memo)
    except Exception as error:
        raise InputError(
            f"model: {called(model)} cannot be copied: {error} ({_not_copied(model)}). "
            "Give inplace=True to change the model itself."
        ) from error
    return new


def _not_copied(model: nn.Module) -> str:
    """Which parts of a model stand in the way of a copy."""
    computed = [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, value in module.__dict__.items()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    return f"{', '.join(computed)}: computed from other tensors" if computed else "one of its attributes"


def norms(model: nn.Module) -> list[Found]:
    """Every module that normalises, once, in the order of the model; also those that torch does not see."""
    return [Found(held) for held in held_modules(model) if known_by(held.module) is not None]


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: by its class, or by the running statistics that it owns.

    For what others find by torch's classes and so miss: weight decay that spares norms, freezing, averaging.

        no_decay = [p for m in model.modules() if normlab.is_norm(m) for p in m.parameters()]

    A class that is called a norm, and shows it by nothing else, is none to this function.
    """
    return known_by(module) in ("class", "statistics")


def known_by(module: nn.Module) -> str | None:
    """What says that a module normalises: its "class", its "statistics" or only its class's "name"; None if nothing."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        known = getattr(nn, str(module.original_name), None)
        if isinstance(known, type) and issubclass(known, KNOWN):
            return "class"
    elif isinstance(module, KNOWN) or registered_name(module) is not None:
        return "class"
    buffers = dict(module.named_buffers(recurse=False))
    if set(buffers) >= STATISTICS:
        return "statistics"
    # torch.nn.utils has parametrizations of weights by their norm.
    hinted = _NAMED_SO.search(kind.__name__) and not kind.__module__.startswith("torch.nn.utils")
    return "name" if hinted and not list(module.children()) else None


def never_updated(module: nn.Module) -> bool:
    """Whether its running statistics, if it has any, are those that every layer begins with, 0 and 1."""
    return is_fresh(dict(module.named_buffers(recurse=False)))


def why_left(found: Found) -> str | None:
    """Why no other norm can take this one's place, or None if one can."""
    held = found.held
    if held.stuck:
        return f"held by {held.stuck[0]} too, where no other can be put"
    if held.hidden:
        return "held only where torch does not see it: register it as a submodule, or convert it by itself"
    return why_not(found.module)


def why_not(module: nn.Module) -> str | None:
    """Why no other norm can take this module's place, by what it is; None if one can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript: convert the model before it is scripted"
    if isinstance(module, OTHERS):
        base = next(base.__name__ for base in OTHERS if isinstance(module, base))
        return f"is a kind of {base}, which does not normalise the channels of (N, C, *space) one by one"
    if isinstance(module, _LazyNormBase):
        return "does not know its channels yet: run a batch through the model first"
    if list(module.children()) and not parametrize.is_parametrized(module):
        return "has modules inside, which would be lost: " + ", ".join(dict(module.named_children()))
    by = known_by(module)
    if by == "name":
        return "of a class that is not known: only its name says that it is a norm"
    return _why_not_tensors(module) or (_why_not_class(module) if by == "class" else _why_not_foreign(module))


def _why_not_tensors(module: nn.Module) -> str | None:
    """Why its tensors cannot be handed on."""
    if reason := why_computed(module):
        return reason
    own = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
    extra = sorted(set(own) - PARTS - _of_its_class(module))
    if extra:
        return f"has parameters of its own: {', '.join(extra)}"
    if own_tensor(module, "weight") is None and own_tensor(module, "bias") is not None:
        return "has β without γ, which another norm cannot"
    for name in ("weight", "bias"):
        learned = module._parameters.get(name)
        if learned is not None and learned.dim() != 1:  # another norm has the same object
            return f"its {name} has the shape {tuple(learned.shape)}, which another norm's cannot have"
    sizes = {part.numel() for part in _per_channel(module)}
    return None if len(sizes) < 2 else f"its parts are of different sizes: {', '.join(map(str, sorted(sizes)))}"


def _per_channel(module: nn.Module) -> list[torch.Tensor]:
    found = (own_tensor(module, name) for name in ("weight", "bias", *STATISTICS))
    return [part for part in found if part is not None]


def why_computed(module: nn.Module) -> str | None:
    """Which of its tensors are computed from others before each pass: by a parametrization, or a pruning mask."""
    if parametrize.is_parametrized(module):
        return "parametrized: remove the parametrizations first"
    computed = [key for key, value in module.__dict__.items() if key in PARTS and value is not None]
    return f"its {', '.join(computed)} is computed from other tensors: remove that first" if computed else None


def _of_its_class(module: nn.Module) -> set[str]:
    """What a new layer of a registered norm's class has."""
    if registered_name(module) is None:
        return set()
    return set(pristine(module).state_dict())


def pristine(module: nn.Module) -> nn.Module:
    """A new layer of a registered norm, for as many channels."""
    name = registered_name(module)
    assert name is not None
    with torch.random.fork_rng(devices=[]):
        return build_norm(name, channels(module), space_dims(module) or 2)


def _why_not_class(module: nn.Module) -> str | None:
    """Why a subclass of torch's or ours is more than that."""
    kind = type(module)
    base = next(base for base in kind.__mro__ if base.__module__.split(".")[0] in ("torch", "normlab"))
    further = takes_more(module)
    if further:
        return f"its forward takes more than an input: {', '.join(further)}, which another norm cannot"
    if "forward" in module.__dict__ or (not library(kind) and not computes_as_its_base(module, base)):
        return f"computes something else than {base.__name__}: a conversion would lose it"
    return None


def _why_not_foreign(module: nn.Module) -> str | None:
    """Why a class that has running statistics is no batch norm."""
    if further := takes_more(module):
        return f"its forward takes more than an input: {', '.join(further)}, which another norm cannot"
    if all(hasattr(module, name) for name in ("weight", "bias")) and is_affine(module):
        return None
    return "of a class that is not known, and in evaluation no scale and shift by its statistics, γ and β"


def takes_more(module: nn.Module) -> list[str]:
    """Arguments of a foreign class's `forward` beyond the input."""
    if library(type(module)):
        return []
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    except (TypeError, ValueError):  # written in another language
        return ["a signature that cannot be read"]
    return [str(parameter).split(":")[0].split("=")[0] for parameter in parameters]


def called(module: nn.Module) -> str:
    """Its class, in words that tell torch's from ours."""
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return f"TorchScript {module.original_name}"
    return ("torch " if kind.__module__.startswith("torch.") else "") + kind.__name__


def put(model: nn.Module, found: Found, new: nn.Module) -> nn.Module:
    """Put `new` at every place of a norm; returns the model, which is `new` if the model was that norm."""
    for place in found.places:
        if place.holder is None:
            model = new
        else:
            place.write(new)
    return model


def chosen(choice: Choice | Iterable[Choice] | None, found: Found) -> bool:
    """Whether a norm is meant, by any of its names; None means all.

    Raises:
        InputError: the choice is no choice.
    """
    return choice is None or is_meant(found.module, found.names, choice)


class Selection:
    """Which norms are meant, by `only` and `skip`.

    Raises:
        InputError: a pattern of names meets no norm of the model, or a choice is none.
    """

    def __init__(self, only: Any, skip: Any, found: list[Found]):
        self._only, self._skip = _checked("only", only, found), _checked("skip", skip, found)
        meets = any(chosen(self._only, one) for one in found)
        self._note = "not chosen" if meets else f"not chosen: only={_worded(self._only)} meets no norm of the model"

    def why_not(self, found: Found) -> str | None:
        """Why a norm is not meant, or None."""
        left = not chosen(self._only, found) or (self._skip != () and chosen(self._skip, found))
        return self._note if left else None


def _checked(argument: str, choice: Any, found: list[Found]) -> Any:
    """The choice, whose patterns meet a norm each; an iterable as a list, so that it can be gone through again."""
    if choice is None:
        return None
    single = isinstance(choice, (str, type)) or callable(choice)
    check(single or isinstance(choice, Iterable), argument, choice, "a pattern, a class, a function, or several")
    parts: list[Any] = [choice] if single else [*choice]  # pyright: ignore[reportGeneralTypeIssues]
    for part in parts:
        if isinstance(part, str) and not any(chosen(part, one) for one in found):
            names = [name for one in found for name in one.names]
            check(bool(names), argument, part, "a pattern of norms' names; the model has no norms")
            raise unknown(argument, part, names)
    return choice if single else parts if parts or argument == "only" else ()


def _worded(choice: Any) -> str:
    parts = choice if isinstance(choice, list) else [choice]
    return ", ".join(getattr(part, "__name__", repr(part)) for part in parts) or "[]"

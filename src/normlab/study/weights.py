"""Weights in files: written whole with a norm card; read from what people save, and checked against the model."""

import json
import re
import struct
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from ..choice import plain_name
from ..errors import InputError, check
from ..files import write_whole
from ..surgery import check_card
from ..surgery._card import CARD, with_card

# Under which keys training scripts keep the state of a model, the likeliest first.
STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model",
    "model_state",
    "net",
    "network",
    "network_weights",
    "module",
    "weights",
)
NAMED = 6  # keys in a message
RUN = "normlab.run"  # the key of a trial's key in the metadata


class Saved(NamedTuple):
    """What a file holds.

    Attributes:
        state: the state of a model.
        card: its norm card as JSON or dict; None without one.
        run: the key of the trial that made it; None if none did.
    """

    state: Mapping[str, Any]
    card: Any = None
    run: str | None = None


def save_weights(model: nn.Module, path: Path, run: str) -> None:
    """Write the state of a model as `.safetensors`, with its norm card and the key of its trial as metadata."""
    write_whole(path, with_card(model, {RUN: run}))


def load_weights(model: nn.Module, path: Path) -> list[str]:
    """Load a state into a model. Returns what is odd: keys that are left over, and how norms differ from their card.

    Names count without the prefixes of DataParallel (`module.`) and torch.compile (`_orig_mod.`). They count without
    a prefix of the whole model too, such as `model.` in the checkpoints of Lightning.

    Args:
        model: it is changed.
        path: `.safetensors`, or what `torch.save` wrote: a state, or a dict that has one under one of `STATE_KEYS`.
            Nothing but weights is unpickled.

    Raises:
        InputError: the file is missing or damaged, has no state, or one that lacks parts of the model or has them in
            another shape.
    """
    saved = read_weights(path)
    state = _rename(path, saved.state, model)
    here = model.state_dict()
    shapes = [
        f"{key} {tuple(part.shape)}, in the model {tuple(here[key].shape)}"
        for key, part in state.items()
        if isinstance(part, Tensor) and isinstance(here.get(key), Tensor) and _differ(part, here[key])
    ]
    _refuse(path, "of another shape", shapes)
    try:
        found = model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputError(f"weights={str(path)!r} are of another model: {error}") from error
    left = [_describe(key, state[key]) for key in found.unexpected_keys]
    _refuse(path, "missing", found.missing_keys, f"; left over: {_enumerate(left)}" if left else "")
    notes = [f"weights={str(path)!r}: left over, not in the model: {_enumerate(left)}."] if left else []
    if saved.card is not None:
        notes += [f"weights={str(path)!r}: {difference}" for difference in check_card(model, saved.card)]
    return notes


def read_weights(path: Path) -> Saved:
    """The state in a file.

    Raises:
        InputError: the file is missing or damaged, or has no state.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".safetensors":
            more = _metadata(content)
            return Saved(load(content), more.get(CARD), more.get(RUN))
        loaded = torch.load(path, "cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"weights={str(path)!r} cannot be read: {error.strerror}. Check its path.") from error
    except Exception as error:  # what a reader raises on a damaged file is of many kinds
        raise InputError(
            f"weights={str(path)!r} is damaged, or not of weights alone ({_reason(error)}). "
            "Save the state alone: torch.save(model.state_dict(), path)."
        ) from error
    return _state_in(path, loaded)


def _reason(error: Exception) -> str:
    """The class that torch refuses to unpickle, if it is that; else the first line of the error."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))
    if refused:
        return f"it holds {refused[1]}, which is not unpickled, since that could run foreign code"
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def _metadata(content: bytes) -> dict[str, str]:
    """The metadata of a `.safetensors` file: it begins with eight bytes of length and a header in JSON."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]).get("__metadata__", {})


def _state_in(path: Path, loaded: Any) -> Saved:
    found = loaded
    while isinstance(found, Mapping):
        key = next((key for key in STATE_KEYS if isinstance(found.get(key), Mapping) and found[key]), None)
        if key is None:
            break
        found = found[key]
    check(isinstance(found, Mapping), f"weights={str(path)!r}: content", type(found).__name__, "a state dict")
    odd = [f"{key!r} ({type(key).__name__})" for key in found if not isinstance(key, str)]
    _refuse(path, "with keys that are no names", odd)
    tensors = any(isinstance(part, Tensor) for part in found.values())
    keys = _enumerate([_describe(key, part) for key, part in found.items()]) or "nothing"
    check(tensors, f"weights={str(path)!r}: keys", keys, f"tensors by name, alone or under {', '.join(STATE_KEYS)}")
    return Saved(found, loaded.get(CARD))


def _rename(path: Path, state: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state with the model's own prefixes in place of those in the file. Other keys stay as they are."""
    here = {plain_name(key): key for key in model.state_dict()}
    own = set(here.values())
    prefix = _prefix({plain_name(key) for key in state}, here)
    names = [key if key in own else here.get(plain_name(key).removeprefix(prefix), key) for key in state]
    _refuse(path, "twice there, with a prefix and without", [key for key, n in Counter(names).items() if n > 1])
    renamed = OrderedDict(zip(names, state.values(), strict=True))
    metadata = getattr(state, "_metadata", None)  # the versions of modules, by which they read older states
    if metadata is not None:
        places = {plain_name(name): name for name, _ in model.named_modules()}
        plain = {name: f"{plain_name(name)}.".removeprefix(prefix).removesuffix(".") for name in metadata}
        versions = {places.get(plain[name], name): version for name, version in metadata.items()}
        renamed._metadata = versions  # pyright: ignore[reportAttributeAccessIssue]
    return renamed


def _prefix(names: Collection[str], here: Collection[str]) -> str:
    """What stands before every name of the model there; nothing if it is there without, or behind several."""
    first = next(iter(here), "")
    found = {name.removesuffix(first) for name in names if name.endswith(f".{first}")}
    fits = [prefix for prefix in found if all(prefix + key in names for key in here)]
    return fits[0] if len(fits) == 1 and not set(here) <= set(names) else ""


def _differ(part: Tensor, here: Tensor) -> bool:
    return not isinstance(here, UninitializedParameter | UninitializedBuffer) and part.shape != here.shape


def _refuse(path: Path, how: str, keys: Iterable[str], more: str = "") -> None:
    keys = list(keys)
    if keys:
        raise InputError(
            f"weights={str(path)!r} are of another model: {how}: {_enumerate(keys)}{more}. Give those of this model."
        )


def _describe(key: str, part: Any) -> str:
    return key if isinstance(part, Tensor) else f"{key} ({type(part).__name__})"


def _enumerate(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")

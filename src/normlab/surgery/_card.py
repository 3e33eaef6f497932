"""The norm card: what a state dict does not say of a model's norms, to be kept beside its weights."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..choice import plain_name
from ..errors import InputError
from .modules import called, norms

CARD = "normlab.card"  # the key of a card in the metadata of a .safetensors file
NAMED = 4  # norms in a difference
ABSENT = "not there"

Card = dict[str, Any]


def card(model: nn.Module) -> Card:
    """What every norm of a model is, for JSON: what a state dict does not hold, and a digest of its statistics.

    A card has `{"norms": {name: entry}}`. An entry has `class`, and every setting of the module that is a number, a
    text, a switch, None or a tuple of these: `eps`, `momentum`, `affine`, `track_running_stats` and others. With
    running statistics it has `statistics`, 12 hexadecimal digits of SHA-256 over their values in float64, and
    `num_batches_tracked`. Modules that are no norms but have an `eps` or running statistics are in it, too. Names are
    without the prefixes of DataParallel and torch.compile.

    Example:
        >>> import normlab, torch
        >>> normlab.card(torch.nn.Sequential(torch.nn.GroupNorm(2, 8)))["norms"]["0"]
        {'class': 'torch GroupNorm', 'affine': True, 'eps': 1e-05, 'num_channels': 8, 'num_groups': 2}

    Args:
        model: any module.
    """
    return {"norms": _entries(model)}


def with_card(model: nn.Module, metadata: Mapping[str, str]) -> bytes:
    """The state of a model as `.safetensors`, with its norm card and this metadata. Tied weights are there twice."""
    state = {
        name: part.detach().clone(memory_format=torch.contiguous_format) for name, part in model.state_dict().items()
    }
    return save(state, metadata={CARD: json.dumps(card(model)), **metadata})


def check_card(model: nn.Module, card: Card | str) -> list[str]:
    """How the norms of a model differ from a card, in words, each with its cure; empty if they do not.

    Example:
        saved = json.dumps(normlab.card(model))  # beside the weights, as metadata["normlab.card"] in safetensors
        for difference in normlab.check_card(model, saved):
            print(difference)

    Args:
        model: with its weights loaded.
        card: what `card` gave, or that as JSON.

    Raises:
        InputError: it is no card.
    """
    saved, here = _norms_of(card), _entries(model)
    names: dict[str, list[str]] = {}  # by difference
    for name in (*saved, *(name for name in here if name not in saved)):
        for text in _differences(saved.get(name), here.get(name)):
            names.setdefault(text, []).append(name or "(the model)")
    return [f"{_enumerated(several)}: {text}" for text, several in names.items()]


def _carded(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Each norm, and whatever has running statistics or an eps, once."""
    found = {id(one.module): one for one in norms(model)}
    for name, module in model.named_modules():
        if found.pop(id(module), None) or _statistics(module) or any("eps" in key for key in _settings(module)):
            yield name, module
    for one in found.values():  # behind the module system
        yield one.name, one.module


def _entries(model: nn.Module) -> dict[str, dict[str, Any]]:
    """By plain name, with a number where another has that name: `bn` beside `module.bn`."""
    entries: dict[str, dict[str, Any]] = {}
    for name, module in _carded(model):
        plain = plain_name(name)
        again = sum(other == plain or other.startswith(f"{plain} (") for other in entries)
        entries[f"{plain} ({again + 1})" if again else plain] = _entry(module)
    return entries


def _entry(module: nn.Module) -> dict[str, Any]:
    entry = {"class": called(module), **_settings(module)}
    if statistics := _statistics(module):
        entry["statistics"] = _digest(statistics)
    counter = module._buffers.get("num_batches_tracked")
    if counter is not None and not counter.is_meta:
        entry["num_batches_tracked"] = int(counter)
    return entry


def _settings(module: nn.Module) -> dict[str, Any]:
    """Public attributes that JSON can hold, but for the mode."""
    public = {name: value for name, value in vars(module).items() if not name.startswith("_") and name != "training"}
    return {name: _plain(value) for name, value in sorted(public.items()) if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | np.number)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, np.number) else value


def _statistics(module: nn.Module) -> dict[str, Tensor]:
    return {name: part for name, part in module._buffers.items() if name.startswith("running_") and part is not None}


def _digest(tensors: dict[str, Tensor]) -> str | None:
    """A digest of names, shapes and values, the same in every precision that holds them; None without values."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta or is_lazy(tensor):
            return None
        sha.update(f"{name}{tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().to("cpu", torch.float64).contiguous().numpy().tobytes())
    return sha.hexdigest()[:12]


def _norms_of(card: Card | str) -> dict[str, dict[str, Any]]:
    try:
        loaded = json.loads(card) if isinstance(card, str) else card
    except ValueError as error:
        raise InputError(
            f"card: expected JSON that normlab.card made, got what is damaged ({error}). {_CURE}"
        ) from error
    entries = loaded.get("norms") if isinstance(loaded, Mapping) else None
    if not isinstance(entries, Mapping):
        raise InputError(f"card: expected {{'norms': …}} as of normlab.card, got {_short(loaded)}. {_CURE}")
    for name, entry in entries.items():
        if not (isinstance(entry, Mapping) and isinstance(entry.get("class"), str)):
            raise InputError(f"card: expected a dict with the class of {name!r}, got {_short(entry)}. {_CURE}")
    return {name: dict(entry) for name, entry in entries.items()}


_CURE = "Save the weights again with normlab.card(model), or load them without a card."


def _differences(saved: dict[str, Any] | None, here: dict[str, Any] | None) -> list[str]:
    if here is None:
        return [f"{(saved or {})['class']} when saved, not in this model. Build the model as it was saved."]
    if saved is None:
        return [f"{here['class']} here, not in the model that was saved. Build the model as it was saved."]
    changes = [
        _change(key, saved.get(key, ABSENT), here.get(key, ABSENT))
        for key in {**saved, **here}
        if key != "class" and saved.get(key, ABSENT) != here.get(key, ABSENT)
    ]
    if saved["class"] == here["class"]:
        return changes
    kind = f"{saved['class']} when saved, {here['class']} here. Build the model as it was saved, then convert it."
    return [kind, *(change for change in changes if ABSENT not in change)]


def _change(key: str, was: Any, now: Any) -> str:
    if key == "statistics":
        return "running statistics are others than those saved. Load the weights that belong to this card."
    if key == "num_batches_tracked":
        return f"{key} was {was} when saved, is {now} here. Load the weights that belong to this card."
    return f"{key} was {was} when saved, is {now} here, and no state dict has it. Set it as it was saved."


def _enumerated(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"

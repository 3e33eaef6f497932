"""What a batch and an output may look like: pairs, dicts, structures of tensors."""

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError, check

# The keys under which data sets keep the two parts of a batch.
INPUT_KEYS = ("image", "images", "input", "inputs", "x")
TARGET_KEYS = ("label", "labels", "target", "targets", "y")


def split_batch(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets of a batch.

    Args:
        batch: a tuple or list `(inputs, targets, *rest)`, whose rest is not used; or a dict with exactly one of
            `INPUT_KEYS` and exactly one of `TARGET_KEYS`.

    Raises:
        InputError: it is neither.
    """
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        return batch[0], batch[1]
    if not isinstance(batch, Mapping):
        came = f"{type(batch).__name__} of length {len(batch)}" if isinstance(batch, tuple | list) else type(batch)
        raise InputError(f"batches: expected (inputs, targets) or a dict, got {_name(came)}. {_CURE}")
    inputs, targets = ([key for key in keys if key in batch] for keys in (INPUT_KEYS, TARGET_KEYS))
    if len(inputs) == len(targets) == 1:
        return batch[inputs[0]], batch[targets[0]]
    raise InputError(
        f"batches: expected a dict with one of {', '.join(INPUT_KEYS)} and one of {', '.join(TARGET_KEYS)}, "
        f"got the keys {', '.join(map(repr, batch))}. {_CURE}"
    )


_CURE = 'Let the data set, or the collate_fn of its loader, give pairs: (sample["image"], sample["label"]).'


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else kind


def call_each(value: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """A copy of a structure in which everything that has `method` is replaced by what the method gives.

    It looks into tuples, lists, dicts and dataclasses; what is none of these, and has no such method, stays.
    """
    if isinstance(value, Tensor) or callable(getattr(value, method, None)):
        return getattr(value, method)(*arguments, **options)
    if isinstance(value, tuple | list):
        parts = [call_each(part, method, *arguments, **options) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, Mapping):
        new: Any = {} if type(value) is dict else copy.copy(value)  # torch's compiler cannot copy one
        for key in value:
            new[key] = call_each(value[key], method, *arguments, **options)
        return new
    if is_dataclass(value) and not isinstance(value, type):
        new = copy.copy(value)
        for field in fields(value):  # around the guard of a frozen one
            object.__setattr__(new, field.name, call_each(getattr(value, field.name), method, *arguments, **options))
        return new
    return value


def count_samples(inputs: Any, targets: Any) -> int:
    """How many samples a batch has: the length of its targets, or of its inputs where targets have no batch dimension.

    Raises:
        InputError: nothing in the batch has a length.
    """
    if isinstance(targets, Tensor) and targets.dim():  # what most are, at each step
        return len(targets)
    parts = [targets, inputs, *(part for both in (targets, inputs) for part in _inside(both))]
    tensors = [part for part in parts if isinstance(part, Tensor) and part.dim()]
    sized = tensors or [part for part in parts if isinstance(part, tuple | list)]
    what = f"inputs {type(inputs).__name__}, targets {type(targets).__name__}"
    check(bool(sized), "batches", what, "a tensor (N, …) among them, to count samples for a mean")
    return len(sized[0])


def _inside(part: Any) -> list[Any]:
    return list(part.values()) if isinstance(part, Mapping) else []

"""Norms by name: what the command line, the studies and the models build their layers from."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..errors import check, unknown
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .group import GroupNorm, InstanceNorm, LayerNorm
from .running import RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d


class Norm(NamedTuple):
    """A registered norm: `layers[d - 1]` builds one for d space dimensions from `num_features` and options."""

    layers: tuple[Callable[..., nn.Module], ...]
    summary: str


def _group_norm(num_features: int, num_groups: int = 8, **options: Any) -> GroupNorm:
    """Eight groups, or as many as divide the channels."""
    return GroupNorm(num_features, math.gcd(num_features, num_groups), **options)


NORMS: dict[str, Norm] = {
    "none": Norm((nn.Identity,) * 3, "no norm"),
    "batch": Norm((BatchNorm1d, BatchNorm2d, BatchNorm3d), "batch norm: each channel over this batch"),
    "group": Norm((_group_norm,) * 3, "group norm: each image by itself, in 8 groups of channels"),
    "layer": Norm((LayerNorm,) * 3, "layer norm: each image by itself, over channels and space"),
    "instance": Norm((InstanceNorm,) * 3, "instance norm: each channel of each image by itself"),
    "running": Norm(
        (RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d),
        "running batch norm: each channel over the batches so far, in training and evaluation alike",
    ),
}


def register(name: str, *layers: Callable[..., nn.Module], summary: str = "") -> None:
    """Add a norm under a new name: one builder for any number of space dimensions, or three for 1, 2 and 3."""
    check(name not in NORMS, "name", name, "a name that is not taken yet")
    check(len(layers) in (1, 3), "layers", layers, "one builder, or three: for 1, 2 and 3 space dimensions")
    NORMS[name] = Norm(layers if len(layers) == 3 else layers * 3, summary)


def build_norm(name: str, num_features: int, dims: int = 2, **options: Any) -> nn.Module:
    """A new layer of the norm `name`.

    Args:
        name: see `NORMS`.
        num_features: channels.
        dims: space dimensions of the input, 1 to 3.
        **options: for the layer's constructor.

    Raises:
        InputError: unknown `name`, with the nearest match, or `dims` out of range.
    """
    if name not in NORMS:
        raise unknown("norm", name, NORMS)
    check(dims in (1, 2, 3), "dims", dims, "1, 2 or 3")
    return NORMS[name].layers[dims - 1](num_features, **options)

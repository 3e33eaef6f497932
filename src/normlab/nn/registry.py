"""Norms by name: what the command line, the studies and the models build their layers from."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import check, unknown
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .convolution import (
    CenteredConv1d,
    CenteredConv2d,
    CenteredConv3d,
    WeightStandardizedConv1d,
    WeightStandardizedConv2d,
    WeightStandardizedConv3d,
)
from .dynamic_tanh import DynamicErf, DynamicTanh
from .evonorm import EvoNorm1dB0, EvoNorm2dB0, EvoNorm3dB0, EvoNormS0
from .filter_response import FilterResponseNorm
from .frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from .ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from .group import ChannelLayerNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .mabn import MovingAverageBatchNorm1d, MovingAverageBatchNorm2d, MovingAverageBatchNorm3d
from .online import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d
from .per_image import check_groups
from .renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .running import RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d
from .running_lesson import LessonRunningNorm1d, LessonRunningNorm2d, LessonRunningNorm3d
from .switchable import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d
from .sync import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Norm(NamedTuple):
    """A registered norm.

    Attributes:
        layers: `layers[d - 1]` builds one for d space dimensions from `num_features` and options.
        summary: what it is, in a line.
        activates: whether it is the activation too, so that a net puts it in the place of both.
        convs: `convs[d - 1]` builds the convolution that goes before it, as torch's of d space dimensions.
    """

    layers: tuple[Callable[..., nn.Module], ...]
    summary: str
    activates: bool = False
    convs: tuple[Callable[..., nn.Module], ...] = CONVS

    @property
    def averages(self) -> bool:
        """Whether its `momentum` is torch's: the weight of a new batch in the statistics, None for the mean of all."""
        layer = self.layers[0]
        return getattr(layer, "averages", isinstance(layer, type) and issubclass(layer, _BatchNorm))


# The channels of a group, at least, where an input may have no space: of one value is left β, of two a sign.
FEWEST = 4


def _in_groups(
    layer: Callable[..., nn.Module],
    num_features: int,
    num_groups: int | None = None,
    *options: Any,
    fewest: int = 1,
    **named: Any,
) -> nn.Module:
    """In `num_groups`; by default in eight or as many as divide the channels, of `fewest` channels at least."""
    return layer(num_features, check_groups(num_groups, num_features, fewest), *options, **named)


def _for_dims(layer: Callable[..., nn.Module]) -> tuple[Callable[..., nn.Module], ...]:
    """Builders in groups, for 1, 2 and 3 space dimensions."""
    mapped = partial(_in_groups, layer)
    return partial(_in_groups, layer, fewest=FEWEST), mapped, mapped


_group_norms = _for_dims(GroupNorm)

NORMS: dict[str, Norm] = {
    "none": Norm((nn.Identity,) * 3, "no norm"),
    # over the batches so far
    "running": Norm(
        (RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d),
        "running batch norm: each channel over the last images, in training too",
    ),
    "running_lesson": Norm(
        (LessonRunningNorm1d, LessonRunningNorm2d, LessonRunningNorm3d),
        "the lesson's running batch norm: gradient through this batch's share",
    ),
    "mabn": Norm(
        (MovingAverageBatchNorm1d, MovingAverageBatchNorm2d, MovingAverageBatchNorm3d),
        "moving-average batch norm: not centred, after centred convolutions",
        convs=(CenteredConv1d, CenteredConv2d, CenteredConv3d),
    ),
    "online": Norm(
        (OnlineNorm1d, OnlineNorm2d, OnlineNorm3d),
        "online norm: image by image, with the statistics of all images before",
    ),
    "renorm": Norm(
        (BatchRenorm1d, BatchRenorm2d, BatchRenorm3d),
        "batch renorm: batch norm, corrected towards its running statistics",
    ),
    # over this batch
    "batch": Norm((BatchNorm1d, BatchNorm2d, BatchNorm3d), "batch norm: each channel over this batch"),
    "sync": Norm(
        (SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d),
        "sync batch norm: each channel over this batch of every process",
    ),
    "ghost": Norm(
        (GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d),
        "ghost batch norm: batch norm of each virtual batch of 32 images",
    ),
    "frozen": Norm(
        (FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d),
        "frozen batch norm: each channel with constant statistics",
    ),
    "switchable": Norm(
        (SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d),
        "switchable norm: a learned mixture of instance, layer and batch norm",
    ),
    "evonorm_b0": Norm(
        (EvoNorm1dB0, EvoNorm2dB0, EvoNorm3dB0),
        "EvoNorm-B0: over the batch's or image's deviation; the activation too",
        activates=True,
    ),
    # each image by itself
    "group": Norm(_group_norms, "group norm: each image by itself, in 8 groups of channels"),
    "group_ws": Norm(
        _group_norms,
        "group norm after convolutions with standardised weights",
        convs=(WeightStandardizedConv1d, WeightStandardizedConv2d, WeightStandardizedConv3d),
    ),
    "layer": Norm((LayerNorm,) * 3, "layer norm: each image by itself, over channels and space"),
    "layer_channels": Norm((ChannelLayerNorm,) * 3, "layer norm over channels: each position of each image by itself"),
    "rms": Norm((RMSNorm,) * 3, "RMS norm: each position of each image over its channels, not centred"),
    "instance": Norm((InstanceNorm,) * 3, "instance norm: each channel of each image by itself"),
    "filter_response": Norm(
        (FilterResponseNorm,) * 3,
        "filter response norm: each channel of each image; the activation too",
        activates=True,
    ),
    "evonorm_s0": Norm(
        _for_dims(EvoNormS0),
        "EvoNorm-S0: each image by itself, in 8 groups; the activation too",
        activates=True,
    ),
    # no statistics
    "dynamic_tanh": Norm((DynamicTanh,) * 3, "dynamic tanh: tanh(αx), value by value"),
    "dynamic_erf": Norm((DynamicErf,) * 3, "dynamic erf: erf(αx + s), value by value"),
}


def register(
    name: str,
    *layers: Callable[..., nn.Module],
    summary: str = "",
    activates: bool = False,
    convs: Sequence[Callable[..., nn.Module]] = CONVS,
) -> None:
    """Add a norm under a new name: one builder for any number of space dimensions, or three for 1, 2 and 3.

    Args:
        name: not taken yet.
        *layers: see `Norm.layers`.
        summary: see `Norm`.
        activates: see `Norm`.
        convs: see `Norm`; torch's by default.

    Raises:
        InputError: the name is taken, or the number of builders is neither 1 nor 3, or that of convolutions not 3.
    """
    check(name not in NORMS, "name", name, "a name that is not taken yet")
    check(len(layers) in (1, 3), "layers", layers, "one builder, or three: for 1, 2 and 3 space dimensions")
    check(len(convs) == 3, "convs", convs, "three convolutions: for 1, 2 and 3 space dimensions")
    NORMS[name] = Norm(layers if len(layers) == 3 else layers * 3, summary, activates, tuple(convs))


def build_norm(name: str, num_features: int, dims: int = 2, **options: Any) -> nn.Module:
    """A new layer of the norm `name`.

    A norm in groups has eight, or fewer where the channels do not divide. With `dims` 1, where inputs may be (N, C), a
    group has four channels at least: one of a single value would give β for any input. `num_groups` of your own is
    taken as it is.

    Args:
        name: see `NORMS`.
        num_features: channels.
        dims: space dimensions of the input, 1 to 3.
        **options: for the layer's constructor.

    Raises:
        InputError: unknown `name`, with the nearest match, or `dims` or an option out of range.
    """
    if name not in NORMS:
        raise unknown("norm", name, NORMS)
    check(dims in (1, 2, 3), "dims", dims, "1, 2 or 3")
    return NORMS[name].layers[dims - 1](num_features, **options)

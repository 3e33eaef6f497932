"""Norms by name: the record that each norm's file leaves here, and `build_norm` to make a layer."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import check, unknown

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# What the statistics of a norm are taken over.
OVER = ("the last batches", "this batch", "each image", "each position", "nothing")


class Norm(NamedTuple):
    """What is true of a registered norm. Tables, lists and tests are made from it.

    Attributes:
        layers: `layers[d - 1]` builds one for d space dimensions from `num_features` and options.
        summary: what it is, in a line of the command line.
        activates: whether it is the activation too, so that a net puts it in the place of both.
        convs: `convs[d - 1]` builds the convolution that goes before it, as torch's of d space dimensions.
        over: what its statistics are taken over in training, one of `OVER`.
        about: what it is, in README's table.
        source: where it is from, in README's table.
        cost: how long a training step at batch 2 takes, about, where most norms take 1.
    """

    layers: tuple[Callable[..., nn.Module], ...]
    summary: str = ""
    activates: bool = False
    convs: tuple[Callable[..., nn.Module], ...] = CONVS
    over: str = "nothing"
    about: str = ""
    source: str = ""
    cost: float = 1.0

    @property
    def averages(self) -> bool:
        """Whether its `momentum` is torch's: the weight of a new batch in the statistics, None for the mean of all."""
        layer = self.layers[0]
        return getattr(layer, "averages", isinstance(layer, type) and issubclass(layer, _BatchNorm))


NORMS: dict[str, Norm] = {}


def register(name: str, *layers: Callable[..., nn.Module], **facts: Any) -> None:
    """Add a norm under a new name: one builder for any number of space dimensions, or three for 1, 2 and 3.

    Args:
        name: not taken yet.
        *layers: see `Norm.layers`.
        **facts: the other attributes of `Norm`, by name.

    Raises:
        InputError: the name is taken, or the number of builders is neither 1 nor 3, or that of convolutions not 3, or
            a fact is none of `Norm`.
    """
    check(name not in NORMS, "name", name, "a name that is not taken yet")
    check(len(layers) in (1, 3), "layers", layers, "one builder, or three: for 1, 2 and 3 space dimensions")
    for fact in facts:
        if fact not in Norm._fields[1:]:
            raise unknown("fact", fact, Norm._fields[1:])
    norm = Norm(layers if len(layers) == 3 else layers * 3, **facts)
    check(len(norm.convs) == 3, "convs", norm.convs, "three convolutions: for 1, 2 and 3 space dimensions")
    check(norm.over in OVER, "over", norm.over, ", ".join(OVER))
    NORMS[name] = norm._replace(convs=tuple(norm.convs))


def list_norms() -> list[tuple[str, str, str]]:
    """Name, what it is and source of each norm: the rows of README's table."""
    return [(name, norm.about, norm.source) for name, norm in NORMS.items()]


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

    Example:
        >>> build_norm("group", 12)
        GroupNorm(12, num_groups=4, eps=1e-05, affine=True)
    """
    if name not in NORMS:
        raise unknown("norm", name, NORMS)
    check(dims in (1, 2, 3), "dims", dims, "1, 2 or 3")
    return NORMS[name].layers[dims - 1](num_features, **options)


register("none", nn.Identity, summary="no norm", about="`torch.nn.Identity`")

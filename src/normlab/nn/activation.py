"""Activations that a norm can be one with: its kernels apply them while they write."""

from torch import Tensor

from ..errors import check
from ..kernels import ops

# What each makes of a value below 0, times this.
SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}


def check_activation(name: str | None) -> str | None:
    """`name`, or an InputError if it is none of `SLOPES`."""
    check(name in SLOPES, "activation", name, 'None, "relu" or "leaky_relu"')
    return name


def activate(y: Tensor, name: str | None) -> Tensor:
    """The activation of `y`, as an operator of its own."""
    return ops.activate(y, SLOPES[name])


def described(name: str | None) -> str:
    """For `extra_repr`: nothing without an activation."""
    return "" if name is None else f", activation={name!r}"

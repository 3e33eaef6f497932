"""Activations that a norm can be one with: its kernels apply them while they write."""

from torch import Tensor
from torch.nn.functional import leaky_relu, relu

from ..errors import check
from ..kernels import plain

# What each makes of a value below 0, times this.
SLOPES = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}


def check_activation(name: str | None) -> str | None:
    """`name`, or an InputError if it is none of `SLOPES`."""
    check(name in SLOPES, "activation", name, 'None, "relu" or "leaky_relu"')
    return name


def activate(y: Tensor, name: str | None, residual: Tensor | None = None) -> Tensor:
    """The activation of `y`, or of the sum with `residual`, as operators of their own."""
    return plain.activate(y if residual is None else y + residual, SLOPES[name])


def scripted_activation(y: Tensor, name: str | None) -> Tensor:
    """`activate`, in what TorchScript knows."""
    if name is None:
        return y
    return relu(y) if name == "relu" else leaky_relu(y, 0.01)


def described(name: str | None) -> str:
    """For `extra_repr`: nothing without an activation."""
    return "" if name is None else f", activation={name!r}"

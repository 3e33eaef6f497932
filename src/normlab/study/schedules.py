"""The schedules of a trial, by name: each makes the function that moves the learning rate.

The functions import torch, the names do not: the command line's help has to be quick.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..training.schedules import Schedule


def constant(lr: float) -> "Schedule":
    """The same rate throughout."""
    from ..training import schedules

    return schedules.constant(lr)


def one_cycle(lr: float) -> "Schedule":
    """Up from a tenth over the first quarter, then down to nothing."""
    from ..training import schedules

    return schedules.one_cycle(lr / 10, lr, 0.0)


def linear(lr: float) -> "Schedule":
    """Straight down to a fifth of the rate."""
    from ..training import schedules

    return schedules.linear(lr, lr / 5)


def polynomial(lr: float) -> "Schedule":
    """Down to nothing by the power 0.9 of what is left, as nnU-Net trains."""
    return lambda position: lr * (1 - position) ** 0.9


SCHEDULES: dict[str, Callable[[float], "Schedule"]] = {
    "constant": constant,
    "one-cycle": one_cycle,
    "linear": linear,
    "polynomial": polynomial,
}

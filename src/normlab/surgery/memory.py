"""What surgery remembers of a norm that it took out, on the norm in its place: for the way back."""

from dataclasses import dataclass

from torch import nn

from .places import MEMORY
from .probe import Typed


@dataclass
class Before:
    """Of the norm that was there.

    Attributes:
        momentum: its weight of a new batch, as in torch, where the norm in its place has none or another meaning.
        has_momentum: whether it had one at all; None is one too.
        eps: its own, where the norm in its place has another or none.
        module: the norm itself, if it is to come back as it was (`freeze`).
        learned: which of its parameters learned.
        typed: device and type of the norm in its place then.
    """

    momentum: float | None = None
    has_momentum: bool = False
    eps: float | None = None
    module: nn.Module | None = None
    learned: tuple[bool, ...] = ()
    typed: Typed = None


def remember(new: nn.Module, before: Before) -> None:
    """Keep it with the new norm; it is copied and pickled with it, and is no part of its state."""
    new.__dict__[MEMORY] = before


def remembered(module: nn.Module) -> Before | None:
    """What is remembered of the norm that was in this one's place."""
    return module.__dict__.get(MEMORY)

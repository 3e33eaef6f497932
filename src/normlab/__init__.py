"""Normalization layers for PyTorch that hold at any batch size, and the lab that proves it."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .surgery import convert, fold, freeze, recalibrate, sync, unfreeze, unsync

__all__ = ["convert", "fold", "freeze", "recalibrate", "sync", "unfreeze", "unsync"]


def __getattr__(name: str) -> Any:
    """What surgery offers, imported when it is asked for: the command line's help does without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import surgery

    return getattr(surgery, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

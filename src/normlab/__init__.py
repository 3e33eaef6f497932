"""Normalization layers for PyTorch that hold at any batch size, and the lab that proves it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .health import diagnose, watch
    from .surgery import card, check_card, convert, fold, freeze, is_norm, recalibrate, summary, sync, unfreeze, unsync

__all__ = [
    "card",
    "check_card",
    "convert",
    "diagnose",
    "fold",
    "freeze",
    "is_norm",
    "recalibrate",
    "summary",
    "sync",
    "unfreeze",
    "unsync",
    "watch",
]
_ROOMS = ("data", "health", "integrations", "models", "nn", "observe", "surgery", "training")


def __getattr__(name: str) -> Any:
    """What surgery and health offer, and the rooms, imported when asked for: the command line's help needs no torch."""
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import health, surgery

    return getattr(health if name in ("diagnose", "watch") else surgery, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})

"""Surgery: other norms in a model that exists, with a report of every module touched or left."""

from .convert import Conversion, convert
from .effect import kept_statistics
from .fold import fold
from .freeze import freeze, unfreeze
from .recalibrate import recalibrate
from .report import Report, Row
from .sync import sync, unsync

__all__ = [
    "Conversion",
    "Report",
    "Row",
    "convert",
    "fold",
    "freeze",
    "kept_statistics",
    "recalibrate",
    "sync",
    "unfreeze",
    "unsync",
]

"""Surgery: other norms in a model that exists, with a report of every module touched or left."""

from ._card import card, check_card
from ._convert import convert
from ._fold import fold
from ._freeze import freeze, unfreeze
from ._recalibrate import recalibrate
from ._summary import Summary, summary
from ._sync import sync, unsync
from .callbacks import FreezeNorms, Recalibrate, SaveBest
from .effect import kept_statistics
from .modules import is_norm
from .operation import Operation
from .report import Report, Row

__all__ = [
    "FreezeNorms",
    "Operation",
    "Recalibrate",
    "Report",
    "Row",
    "SaveBest",
    "Summary",
    "card",
    "check_card",
    "convert",
    "fold",
    "freeze",
    "is_norm",
    "kept_statistics",
    "recalibrate",
    "summary",
    "sync",
    "unfreeze",
    "unsync",
]

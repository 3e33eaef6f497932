"""Health: what is wrong with the norms of a model, at the batch it trains with, and what helps."""

from .diagnosis import Diagnosis, Finding, diagnose
from .faults import FAULTS
from .guard import Guard, watch
from .layer import Layer
from .measure import Output

__all__ = ["FAULTS", "Diagnosis", "Finding", "Guard", "Layer", "Output", "diagnose", "watch"]

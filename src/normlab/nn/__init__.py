"""The layers: drop-in norms for (N, C, *space) tensors, and `build_norm` to make one by its registered name."""

from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d
from .group import GroupNorm, InstanceNorm, LayerNorm
from .registry import NORMS, build_norm, register
from .running import RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d

__all__ = [
    "NORMS",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RunningBatchNorm1d",
    "RunningBatchNorm2d",
    "RunningBatchNorm3d",
    "build_norm",
    "register",
]

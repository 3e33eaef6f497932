"""The layers: norms for (N, C, *space) tensors, and `build_norm` to make one by its registered name."""

# isort: off
# In the order of `NORMS`: each file registers its norms.
from .registry import NORMS, Norm, build_norm, list_norms, register
from .running import RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d
from .running_instance import RunningInstanceNorm1d, RunningInstanceNorm2d, RunningInstanceNorm3d
from .running_lesson import LessonRunningNorm1d, LessonRunningNorm2d, LessonRunningNorm3d
from .mabn import MovingAverageBatchNorm1d, MovingAverageBatchNorm2d, MovingAverageBatchNorm3d
from .online import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d
from .renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d
from .batch import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormAct1d, BatchNormAct2d, BatchNormAct3d
from .sync import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from .ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d
from .frozen import FrozenBatchNorm1d, FrozenBatchNorm2d, FrozenBatchNorm3d
from .switchable import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d
from .evonorm import EvoNorm1dB0, EvoNorm2dB0, EvoNorm3dB0, EvoNormS0
from .group import ChannelLayerNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .filter_response import FilterResponseNorm, ThresholdedLinearUnit
from .dynamic_tanh import DynamicErf, DynamicTanh
from .convolution import (
    CenteredConv1d,
    CenteredConv2d,
    CenteredConv3d,
    WeightStandardizedConv1d,
    WeightStandardizedConv2d,
    WeightStandardizedConv3d,
)

# isort: on

__all__ = [
    "NORMS",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "BatchNormAct1d",
    "BatchNormAct2d",
    "BatchNormAct3d",
    "BatchRenorm1d",
    "BatchRenorm2d",
    "BatchRenorm3d",
    "CenteredConv1d",
    "CenteredConv2d",
    "CenteredConv3d",
    "ChannelLayerNorm",
    "DynamicErf",
    "DynamicTanh",
    "EvoNorm1dB0",
    "EvoNorm2dB0",
    "EvoNorm3dB0",
    "EvoNormS0",
    "FilterResponseNorm",
    "FrozenBatchNorm1d",
    "FrozenBatchNorm2d",
    "FrozenBatchNorm3d",
    "GhostBatchNorm1d",
    "GhostBatchNorm2d",
    "GhostBatchNorm3d",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "LessonRunningNorm1d",
    "LessonRunningNorm2d",
    "LessonRunningNorm3d",
    "MovingAverageBatchNorm1d",
    "MovingAverageBatchNorm2d",
    "MovingAverageBatchNorm3d",
    "Norm",
    "OnlineNorm1d",
    "OnlineNorm2d",
    "OnlineNorm3d",
    "RMSNorm",
    "RunningBatchNorm1d",
    "RunningBatchNorm2d",
    "RunningBatchNorm3d",
    "RunningInstanceNorm1d",
    "RunningInstanceNorm2d",
    "RunningInstanceNorm3d",
    "SwitchableNorm1d",
    "SwitchableNorm2d",
    "SwitchableNorm3d",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "ThresholdedLinearUnit",
    "WeightStandardizedConv1d",
    "WeightStandardizedConv2d",
    "WeightStandardizedConv3d",
    "build_norm",
    "list_norms",
    "register",
]

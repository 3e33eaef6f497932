"""The learner: one loop, ordered callbacks, schedules, metrics over samples; it trains any module."""

from .averaging import EMA
from .callbacks import (
    ChannelsLast,
    ClipGradients,
    Metrics,
    Recorder,
    ScheduleParameter,
    ToDevice,
    TransformInputs,
)
from .checkpoint import Checkpoint, load_checkpoint
from .distributed import Distributed
from .events import EVENTS, Callback, CancelBatch, CancelEpoch, CancelTrain
from .groups import parameter_groups
from .learner import Learner
from .logs import LogCSV, LogJSON, LogTensorBoard, LogWandb
from .metrics import accuracy, dice, mean_iou, mean_over_samples
from .profiling import Profile
from .progress import ShowProgress
from .stopping import EarlyStopping, StopAtNonFinite, StopWhenDiverged
from .trials import FindLearningRate, Overfit, overfit_one_batch

__all__ = [
    "EMA",
    "EVENTS",
    "Callback",
    "CancelBatch",
    "CancelEpoch",
    "CancelTrain",
    "ChannelsLast",
    "Checkpoint",
    "ClipGradients",
    "Distributed",
    "EarlyStopping",
    "FindLearningRate",
    "Learner",
    "LogCSV",
    "LogJSON",
    "LogTensorBoard",
    "LogWandb",
    "Metrics",
    "Overfit",
    "Profile",
    "Recorder",
    "ScheduleParameter",
    "ShowProgress",
    "StopAtNonFinite",
    "StopWhenDiverged",
    "ToDevice",
    "TransformInputs",
    "accuracy",
    "dice",
    "load_checkpoint",
    "mean_iou",
    "mean_over_samples",
    "overfit_one_batch",
    "parameter_groups",
]

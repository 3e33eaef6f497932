"""Batch norm over every process of a group, and back."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn import SyncBatchNorm2d
from ._convert import convert, converted
from .modules import Choice
from .operation import Operation


def sync(
    model: nn.Module,
    *,
    only: Choice | Iterable[Choice] | None = None,
    skip: Choice | Iterable[Choice] = (),
    inplace: bool = False,
    process_group: dist.ProcessGroup | None = None,
) -> Operation:
    """Put sync batch norm in the place of every batch norm; the same in evaluation.

    Args:
        model: of any modules.
        only: the norms to convert, see `convert`.
        skip: those to leave, likewise.
        inplace: change the model itself, not a copy.
        process_group: the processes to share statistics with; None for all there are.
    """
    options = {"process_group": process_group}
    return converted(model, "sync", only, skip, inplace, _other_than_batch, options=options)


def _other_than_batch(norm: nn.Module) -> str | None:
    return None if isinstance(norm, _BatchNorm) else "is no batch norm"


def unsync(model: nn.Module, *, inplace: bool = False) -> Operation:
    """Put batch norm in the place of every sync batch norm, torch's and ours: for one process, or a CPU.

    Args:
        model: of any modules.
        inplace: change the model itself, not a copy.
    """
    return convert(model, "batch", only=(nn.SyncBatchNorm, SyncBatchNorm2d), inplace=inplace)

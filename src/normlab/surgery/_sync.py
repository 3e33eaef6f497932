"""Batch norm over every process of a group, and back."""

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ._convert import converted
from .modules import Choice, registered_name
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
        skip: those to leave, in the same words.
        inplace: change the model itself, not a copy.
        process_group: the processes to share statistics with. By default torch's sync norms keep theirs, and others
            share with all.

    Raises:
        InputError: a choice meets no norm.
    """
    options = {} if process_group is None else {"process_group": process_group}
    return converted(model, "sync", only, skip, inplace, _other_than_batch, options=options)


def _other_than_batch(norm: nn.Module) -> str | None:
    is_batch = isinstance(norm, _BatchNorm) or registered_name(norm) in ("batch", "sync")
    return None if is_batch else "is no batch norm"


def unsync(model: nn.Module, *, inplace: bool = False) -> Operation:
    """Put batch norm in the place of every sync batch norm, torch's and ours: for one process, or a CPU.

    torch's takes any number of space dimensions, and so does the one in its place.

    Args:
        model: of any modules.
        inplace: change the model itself, not a copy.
    """
    return converted(model, "batch", None, (), inplace, _other_than_sync)


def _other_than_sync(norm: nn.Module) -> str | None:
    is_sync = isinstance(norm, nn.SyncBatchNorm) or registered_name(norm) == "sync"
    return None if is_sync else "is no sync batch norm"

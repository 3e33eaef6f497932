"""Batch norms that stay as they are while the rest of a model trains."""

from collections.abc import Iterable

from torch import nn

from ..nn import FrozenBatchNorm2d
from ._convert import built, converted
from .modules import Choice, called, copied, model_dims, norms, put, space_dims
from .operation import Operation
from .report import Report, Row


def freeze(
    model: nn.Module,
    *,
    only: Choice | Iterable[Choice] | None = None,
    skip: Choice | Iterable[Choice] = (),
    affine: bool = True,
    inplace: bool = False,
) -> Operation:
    """Put frozen batch norm in the place of every norm with running statistics: they are constant, in training too.

    It outlives `model.train()`: the mode has nothing to do with it. `unfreeze` puts back the norms that were there. The
    report names those that have seen no batch, whose statistics say nothing.

    Args:
        model: of any modules.
        only: the norms to freeze, see `convert`.
        skip: those to leave, likewise.
        affine: freeze γ and β too: their `requires_grad` becomes False.
        inplace: change the model itself, not a copy.
    """
    conversion = converted(model, "frozen", only, skip, inplace, _without_statistics)
    for found, new in conversion.replaced:
        assert isinstance(new, FrozenBatchNorm2d)
        new.was = found.module, [parameter.requires_grad for parameter in new.parameters()]
        conversion._learned += [(parameter, parameter.requires_grad) for parameter in new.parameters()]
        if affine:
            new.requires_grad_(False)
    return conversion


def _without_statistics(norm: nn.Module) -> str | None:
    return None if getattr(norm, "running_mean", None) is not None else "has no running statistics"


def unfreeze(model: nn.Module, *, inplace: bool = False) -> Operation:
    """Put back the norms that `freeze` took out, and a batch norm for frozen ones that came from elsewhere.

    γ, β and statistics are those of the frozen ones; what `freeze` kept from learning learns again.

    Args:
        model: of any modules.
        inplace: change the model itself, not a copy.
    """
    model = model if inplace else copied(model)
    dims, report, replaced = model_dims(model), Report(), []
    for found in norms(model):
        frozen = found.module
        if not isinstance(frozen, FrozenBatchNorm2d):
            continue
        if frozen.was is None:
            new = built(frozen, "batch", space_dims(frozen) or dims or 2, {})
        else:
            new, learned = frozen.was
            new.to(frozen.running_mean.device)
            new._parameters.update(frozen._parameters)
            for name, value in frozen.named_buffers():
                new.get_buffer(name).copy_(value)
            new.train(frozen.training)
            for parameter, learns in zip(new.parameters(), learned, strict=False):
                parameter.requires_grad_(learns)
        model = put(model, found, new)
        replaced.append((found, new))
        report.rows.append(Row(found.name, called(frozen), called(new), "the same in evaluation"))
    return Operation(model, report, replaced)

"""Batch norms that stay as they are while the rest of a model trains."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from ._convert import converted
from .build import Seen, built, is_frozen, note
from .memory import Before, remember, remembered
from .modules import Choice, Found, called, copied, norms, why_left
from .operation import Operation
from .probe import follow, model_dims, typed
from .report import Report, Row


def freeze(
    model: nn.Module,
    *,
    only: Choice | Iterable[Choice] | None = None,
    skip: Choice | Iterable[Choice] = (),
    affine: bool = True,
    inplace: bool = False,
) -> Operation:
    """Put frozen batch norm in the place of every norm with running statistics: constant, in training too.

    It outlives `model.train()`, for it does not depend on the mode. `unfreeze` puts back the norms that were there. The
    report names norms that have seen no batch: their statistics say nothing.

    Args:
        model: of any modules.
        only: the norms to freeze, see `convert`.
        skip: those to leave, in the same words.
        affine: freeze γ and β too: their `requires_grad` becomes False.
        inplace: change the model itself, not a copy.

    Raises:
        InputError: a choice meets no norm.
    """
    finish = partial(_stop_learning, affine=affine)
    return converted(model, "frozen", only, skip, inplace, partial(_why_not, affine=affine), finish=finish)


def _stop_learning(operation: Operation, affine: bool) -> None:
    for found, new in operation.replaced:
        parameters = list(new.parameters())
        learned = tuple(parameter.requires_grad for parameter in parameters)
        kept = remembered(new) or Before()
        remember(new, replace(kept, module=found.module, learned=learned, typed=typed(new)))
        for parameter, learns in zip(parameters, learned, strict=True):
            operation.on_undo(partial(parameter.requires_grad_, learns))
        if affine:
            new.requires_grad_(False)


def _why_not(norm: nn.Module, affine: bool) -> str | None:
    if getattr(norm, "running_mean", None) is None:
        return "has no running statistics"
    learns = affine and any(parameter.requires_grad for parameter in norm.parameters())
    return "is frozen already, but its γ and β go on learning" if learns and is_frozen(norm) else None


def unfreeze(model: nn.Module, *, inplace: bool = False) -> Operation:
    """Put back the norms that `freeze` took out, and a batch norm for frozen ones that came from elsewhere.

    They have the γ, β and statistics of the frozen ones. Parameters that `freeze` kept from learning learn again.
    Frozen batch norms of other libraries are known by what they do: constant in training, a scale and shift in
    evaluation.

    Args:
        model: of any modules.
        inplace: change the model itself, not a copy.
    """
    model = model if inplace else copied(model)
    dims, operation = model_dims(model) or 2, Operation(model, Report())
    with operation.all_or_nothing():
        for found in norms(model):
            if is_frozen(found.module):
                operation.report.rows.append(_thawed(operation, found, dims))
    return operation


def _thawed(operation: Operation, found: Found, dims: int) -> Row:
    """The row of one frozen norm, with another in its place."""
    frozen, before = found.module, remembered(found.module)
    reason = why_left(found)
    if reason is not None:
        return Row(found.name, called(frozen), None, reason)
    if before is None or before.module is None:
        new = built(frozen, "batch", Seen(), dims, {})
        says = note(frozen, new, "batch", Seen(), "the same in evaluation")
    else:
        new, says = before.module, "the same in evaluation"
        _take_over(operation, frozen, new, before)
    operation.put(found, new)
    return Row(found.name, called(frozen), called(new), says)


def _take_over(operation: Operation, frozen: nn.Module, new: nn.Module, before: Before) -> None:
    """What the frozen norm has, in the norm that it was made from."""
    parameters, buffers = dict(new._parameters), {name: part.clone() for name, part in new.named_buffers()}
    operation.on_undo(partial(_put_back, new, parameters, buffers))
    follow(new, before.typed, frozen)
    for name, parameter in frozen._parameters.items():
        if name in new._parameters:
            new._parameters[name] = parameter
    own = dict(new.named_buffers())
    there = {name: part for name, part in frozen.named_buffers() if name in own}
    if any(not torch.equal(part.to(own[name]), own[name]) for name, part in there.items()):
        new.load_state_dict(there, strict=False)
    new.train(frozen.training)
    for parameter, learns in zip(frozen.parameters(), before.learned, strict=False):
        operation.on_undo(partial(parameter.requires_grad_, parameter.requires_grad))
        parameter.requires_grad_(learns)


def _put_back(norm: nn.Module, parameters: dict, buffers: dict) -> None:
    norm._parameters.update(parameters)
    with torch.no_grad():
        for name, value in buffers.items():
            norm.get_buffer(name).copy_(value)

"""Another norm in the place of those that a model has."""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from ..errors import check, unknown
from ..nn import NORMS, build_norm
from .effect import Batches, Effect, Forward, evaluating, first_input
from .modules import (
    Choice,
    Found,
    called,
    channels,
    chosen,
    classes,
    copied,
    example,
    model_dims,
    norms,
    put,
    registered_name,
    space_dims,
    untouched,
    why_not,
)
from .operation import Groups, Operation
from .report import Report, Row

# Of torch.nn.Module: what is called around a module's own computation. Handles to remove them go on working.
HOOKS = (
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks", "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called", "_backward_pre_hooks", "_backward_hooks", "_is_full_backward_hook",
)  # fmt: skip


def convert(
    model: nn.Module,
    to: str = "running",
    *,
    only: Choice | Iterable[Choice] | None = None,
    skip: Choice | Iterable[Choice] = (),
    inplace: bool = False,
    optimizer: Optimizer | None = None,
    batches: Batches | None = None,
    forward: Forward = first_input,
    fit: bool = False,
    dims: int | None = None,
    **options: Any,
) -> Operation:
    """Put the norm `to` in the place of the norms of a model.

    γ and β stay the same parameters, so that an optimizer built before goes on with them; statistics, hooks, device,
    type and mode carry over, and momentum where it means the same. From batch norm to `running`, `frozen`, `sync`,
    `renorm` and back nothing changes in evaluation. To a norm of another kind, such as `group`, only γ and β carry
    over; with `batches` the report says how much that changes, and with `fit` γ and β become those that change it
    least.

    Args:
        model: of any modules. What cannot be converted is left, and the report says why.
        to: a registered norm, see `normlab list`.
        only: the norms to convert: a pattern of names (`"layer4.*"`), a class, a function of name and module that says
            whether, or several of them; all by default.
        skip: those to leave, likewise; none by default.
        inplace: change the model itself, not a copy.
        optimizer: of this model, with `inplace`: gets the parameters that are new and loses those that are gone.
        batches: inputs to measure the effect on, the more the better, in evaluation mode.
        forward: runs the model on one of `batches`; by default on the batch, or on the first of its parts.
        fit: choose γ and β by least squares, channel by channel, so that each new norm gives about what the old one did
            on `batches`.
        dims: space dimensions, for norms that do not say so by their class; by default those of the convolutions.
        **options: for the new layers' constructor.

    Raises:
        InputError: `to` is unknown, or an argument does not fit the others.
    """
    if to not in NORMS:
        raise unknown("to", to, NORMS)
    check(optimizer is None or inplace, "optimizer", optimizer, "that of the model itself, with inplace=True")
    check(not fit or batches is not None, "fit", fit, "False, unless there are batches")
    measure = None if batches is None else partial(Effect, batches=batches, forward=forward, fit=fit)
    return converted(model, to, only, skip, inplace, lambda _: None, optimizer, measure, dims, options)


def converted(
    model: nn.Module,
    to: str,
    only: Any,
    skip: Any,
    inplace: bool,
    refuse: Callable[[nn.Module], str | None],
    optimizer: Optimizer | None = None,
    measure: Callable[..., Effect] | None = None,
    dims: int | None = None,
    options: dict[str, Any] | None = None,
) -> Operation:
    """As `convert`, but for norms that `refuse` gives a reason to leave; `measure` makes the effect of what is new."""
    if not inplace:
        model = copied(model)
    dims, options = dims or model_dims(model), options or {}
    found = norms(model)
    reasons = [_reason(one, to, only, skip, dims) or refuse(one.module) for one in found]
    pairs = [
        (one, built(one.module, to, space_dims(one.module) or dims or 2, options))
        for one, reason in zip(found, reasons, strict=True)
        if reason is None
    ]
    new_of = {one.module: new for one, new in pairs}
    effect = None if measure is None else measure(model, new_of)
    report = Report(
        [
            Row(one.name, called(one.module), None, reason)
            if reason is not None
            else Row(
                one.name,
                called(one.module),
                called(new_of[one.module]),
                _note(one.module, new_of[one.module], to),
                None if effect is None else effect.of(one.module),
            )
            for one, reason in zip(found, reasons, strict=True)
        ]
    )
    groups = None if optimizer is None else Groups(optimizer)
    for one, new in pairs:
        model = put(model, one, new)
        if groups is not None:
            groups.exchange(one.module, new)
    if effect is not None:
        effect.apply()
        report.change = effect.of_model(model)
    return Operation(model, report, pairs, groups)


def _reason(found: Found, to: str, only: Any, skip: Any, dims: int | None) -> str | None:
    """Why a norm is left as it is, or None."""
    if not chosen(only, found) or (skip != () and chosen(skip, found)):
        return "not chosen"
    reason = why_not(found.module)
    if reason is not None:
        return reason
    layers = NORMS[to].layers
    name = registered_name(found.module)
    if name is not None and type(found.module) in classes(to):
        return f"is {to} already"
    if name is not None and NORMS[name].activates:
        return "is an activation too, which would be lost"
    activation = getattr(found.module, "activation", None)
    if activation is not None and "activation" not in inspect.signature(layers[0]).parameters:
        return f"is an activation too, {activation}, which {to} cannot be"
    if dims is None and space_dims(found.module) is None and len(classes(to)) > 1:
        return "does not say how many space dimensions it takes: give dims"
    return None


def built(old: nn.Module, to: str, dims: int, options: dict[str, Any]) -> nn.Module:
    """The new layer, with what carries over from the old one."""
    accepted = inspect.signature(NORMS[to].layers[dims - 1]).parameters
    options = dict(options)
    weight, bias = (getattr(old, name, None) for name in ("weight", "bias"))
    if "affine" in accepted:
        options.setdefault("affine", weight is not None)
    if getattr(old, "activation", None) is not None:
        options.setdefault("activation", old.activation)
    if "eps" in accepted and accepted["eps"].default == 1e-5:
        options.setdefault("eps", old.eps)
    if NORMS[to].averages and _averages(old) and (old.momentum or to == "batch"):  # None is the mean of all batches
        options.setdefault("momentum", old.momentum)
    if "track_running_stats" in accepted and isinstance(old, _BatchNorm):
        options.setdefault("track_running_stats", old.running_mean is not None)
    new = build_norm(to, channels(old), dims, **options)
    part = next(iter((*old.parameters(), *old.buffers())), None)
    if part is not None:
        new.to(part.device)
        if weight is not None:
            new.to(weight.dtype)
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and getattr(new, name, None) is not None:
            new._parameters[name] = parameter
    own = new.state_dict()
    statistics = {
        name: value for name, value in old.state_dict().items() if name in own and name in dict(old.named_buffers())
    }
    if "running_mean" in statistics:
        new.load_state_dict(statistics, strict=False)
    new.train(old.training)
    for hooks in HOOKS:
        setattr(new, hooks, getattr(old, hooks))
    return new


def _averages(norm: nn.Module) -> bool:
    name = registered_name(norm)
    return isinstance(norm, _BatchNorm) if name is None else NORMS[name].averages


def _note(old: nn.Module, new: nn.Module, to: str) -> str:
    """What carries over."""
    if isinstance(new, nn.Identity):
        return "γ, β and statistics are gone"
    notes = ["the same in evaluation" if _same(old, new) else _another(old, new)]
    if to == "frozen" and untouched(new):
        notes.append("its statistics, 0 and 1, are those of a layer that has seen no batch")
    if _averages(old) and getattr(new, "momentum", old.momentum) != old.momentum:
        notes.append(f"momentum is {new.momentum}, no longer {old.momentum}")
    extra = [name for name, _ in new.named_parameters() if name not in ("weight", "bias")]
    if extra:
        notes.append(f"has new parameters: {', '.join(extra)}")
    if NORMS[to].activates:
        notes.append("is an activation too, and the one after it stays")
    if NORMS[to].convs != NORMS["batch"].convs:
        notes.append("made to follow convolutions of another kind, which stay as they are")
    return "; ".join(notes)


def _another(old: nn.Module, new: nn.Module) -> str:
    kept = [symbol for symbol, name in (("γ", "weight"), ("β", "bias")) if _shared(old, new, name)]
    return "another function" + (f", with the same {' and '.join(kept)}" if kept else "")


def _shared(old: nn.Module, new: nn.Module, name: str) -> bool:
    return getattr(old, name, None) is not None and getattr(old, name) is getattr(new, name, None)


def _same(old: nn.Module, new: nn.Module) -> bool:
    """Whether both give the same in evaluation mode, for any input."""
    x = example(old, space_dims(old) or space_dims(new))
    with evaluating(nn.ModuleList([old, new])):
        y, other = (_output(module, x) for module in (old, new))
    return y is not None and other is not None and torch.allclose(y, other, rtol=1e-3, atol=1e-5 * float(y.abs().max()))


def _output(module: nn.Module, x: Tensor) -> Tensor | None:
    y = module.forward(x)  # without hooks
    return y if y.isfinite().all() else None

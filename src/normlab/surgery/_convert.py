"""Another norm in the place of those that a model has."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer

from ..errors import check, unknown
from ..nn import NORMS, GroupNorm
from .build import (
    FURTHER,
    TORCH,
    Seen,
    accepted_options,
    built,
    established,
    is_frozen,
    note,
    takes,
    values_a_statistic,
)
from .effect import Batches, Effect, Forward, first_input, looking, peeked
from .modules import Choice, Found, Selection, called, classes, copied, norms, registered_name, why_left
from .operation import Groups, Operation
from .parents import reader_of_statistics, reading_hook
from .probe import affine_dims, library, model_dims, on_meta, space_dims, version
from .report import Report, Row
from .trace import Trace


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

    γ and β stay the same parameters, so that an optimizer built before goes on with them. Statistics, hooks, device,
    type, mode and attributes carry over, and momentum where it means the same. A norm that never saw a batch begins
    fresh. Between batch norm and `running`, `frozen`, `sync` or `renorm` nothing changes in evaluation.
    `running_instance` takes over the statistics, and mixes each image's own with them as a new layer does. A norm of
    another kind, such as `group`, takes over γ and β alone. With `batches` the report says how much that changes. With
    `fit` γ and β become those that change it least.

    "The same in evaluation" stands in the report where both norms were run and gave the same. How the model uses a
    norm is seen only with `batches`. Without them the report says what was assumed.

    Args:
        model: of any modules. Norms that cannot be converted are left, and the report says why.
        to: a registered norm, see `normlab list`; or "torch" for torch's own layers, which load without normlab.
        only: the norms to convert: a pattern of names (`"layer4.*"`), a class, a function of name and module that says
            whether, or several of them; all by default.
        skip: those to leave, in the same words; none by default.
        inplace: change the model itself, not a copy.
        optimizer: of this model, with `inplace`: gets the parameters that are new and loses those that are gone.
        batches: inputs to measure the effect on, the more the better, in evaluation mode.
        forward: runs the model on one of `batches`; by default on the batch, or on the first of its parts.
        fit: choose γ and β by least squares, channel by channel, so that each new norm gives about what the old one did
            on `batches`.
        dims: space dimensions, for norms that do not say so by their class, and take any otherwise.
        **options: for the new layers' constructor.

    Raises:
        InputError: `to` is unknown, a choice meets no norm, or an argument does not fit the others. The model is as it
            was then, as after any other exception.
    """
    if to not in (*NORMS, TORCH):
        raise unknown("to", to, (*NORMS, TORCH))
    check(optimizer is None or inplace, "optimizer", optimizer, "that of the model itself, with inplace=True")
    check(not fit or batches is not None, "fit", fit, "False, unless there are batches")
    check(dims in (None, 1, 2, 3), "dims", dims, "1, 2 or 3, or None")
    _check_options(to, options)
    measure = None if batches is None else partial(_Measure, batches=batches, forward=forward, fit=fit)
    return converted(model, to, only, skip, inplace, lambda _: None, optimizer, measure, dims, options)


def _check_options(to: str, options: dict[str, Any]) -> None:
    """An InputError for an option that the new layers' constructor does not take."""
    check(to != TORCH or not options, "options", options, 'none with "torch", whose layers have those of the old ones')
    accepted = {} if to == TORCH else dict(accepted_options(to, 1))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values()):
        return
    for name in options:
        if name not in accepted or name == "num_features":
            raise unknown("option", name, [one for one in accepted if one != "num_features"])


class _Measure:
    """How the norms of a model are used on a first batch, and what others in their place change on all."""

    def __init__(self, model: nn.Module, found: list[Found], batches: Batches, forward: Forward, fit: bool):
        first, self._batches = peeked(batches)
        self._model, self._forward, self._fit = model, forward, fit
        self.trace = Trace(model, [one.module for one in found])
        with looking(model):
            self.trace.run(lambda: forward(model, first))

    def seen(self, norm: nn.Module) -> Seen:
        """What was seen of one norm's use."""
        inputs = [call.input for call in self.trace.calls[norm] if isinstance(call.input, Tensor)]
        dims = {x.dim() - 2 for x in inputs}
        values = min((x.shape[2:].numel() for x in inputs), default=None)
        return Seen(dims.pop() if len(dims) == 1 else None, values, next(iter(inputs), None))

    def why_not(self, norm: nn.Module, to: str) -> str | None:
        """Why its use allows no other norm in its place, or None."""
        outside = self.trace.outside.get(norm)
        if outside:
            return f"its tensors are used by {outside[0]} outside of it: what the model does with them is not known"
        inputs = [call.input for call in self.trace.calls[norm]]
        if not all(isinstance(x, Tensor) and not x.is_nested and x.dim() >= 2 for x in inputs):
            return "given something else than a tensor (N, C, *space)"
        if isinstance(norm, _InstanceNorm) and any(x.dim() == (space_dims(norm) or 0) + 1 for x in inputs):
            return "given single images, without a dimension of batches"
        taken = takes(*classes(to)) if to in NORMS else set()
        for call in self.trace.calls[norm]:
            if lost := [name for name in FURTHER if call.kwargs.get(name) is not None and name not in taken]:
                return f"given {lost[0]}=, which {to} norm does not take"
        return next((call.why_not_replaced for call in self.trace.calls[norm] if call.why_not_replaced), None)

    def note(self, norm: nn.Module) -> str | None:
        """What to say of a norm that was not run."""
        return None if self.trace.calls[norm] else "not run on the first batch: its use was not seen"

    def effect(self, new_of: dict[nn.Module, nn.Module]) -> Effect:
        """The effect of these norms in the place of those."""
        return Effect(self._model, new_of, self._batches, self._forward, self._fit)


def converted(
    model: nn.Module,
    to: str,
    only: Any,
    skip: Any,
    inplace: bool,
    refuse: Callable[[nn.Module], str | None],
    optimizer: Optimizer | None = None,
    measure: Callable[..., _Measure] | None = None,
    dims: int | None = None,
    options: dict[str, Any] | None = None,
    finish: Callable[[Operation], None] = lambda _: None,
) -> Operation:
    """As `convert`, but norms for which `refuse` gives a reason are left; `finish` is called at the end."""
    if not inplace:
        model = copied(model)
    found = norms(model)
    selection = Selection(only, skip, found)
    used = None if measure is None else measure(model, found)
    plan = _Plan(model, to, dims, options or {}, used)
    rows, pairs = [], []
    for one in found:
        reason = selection.why_not(one) or refuse(one.module) or plan.why_not(one)
        if reason is not None:
            rows.append(Row(one.name, called(one.module), None, reason))
            continue
        new = plan.built(one)
        pairs.append((one, new))
        rows.append(Row(one.name, called(one.module), called(new), plan.note(one, new)))
    effect = None if used is None else used.effect({one.module: new for one, new in pairs})
    if effect is not None:
        olds = iter([one.module for one, _ in pairs])
        rows = [row if row.became is None else _measured(row, next(olds), effect) for row in rows]
    return _carried_out(Operation(model, Report(rows)), pairs, optimizer, effect, finish)


def _measured(row: Row, old: nn.Module, effect: Effect) -> Row:
    """A row with what the batches said."""
    row = row.with_change(effect.of(old))
    return replace(row, note="; ".join([row.note, *effect.notes(old)]))


def _carried_out(
    operation: Operation,
    pairs: list[tuple[Found, nn.Module]],
    optimizer: Optimizer | None,
    effect: Effect | None,
    finish: Callable[[Operation], None],
) -> Operation:
    """All of it, or nothing."""
    with operation.all_or_nothing():
        if optimizer is not None:
            groups = Groups(optimizer)
            operation.on_undo(groups.restore)
            for one, new in pairs:
                groups.exchange(one.module, new)
        for one, new in pairs:
            operation.put(one, new)
        if effect is not None:
            for parameter, value in effect.apply():
                operation.on_undo(partial(_write_back, parameter, value, version(parameter)))
            operation.report.change = effect.of_model(operation.model)
        finish(operation)
    return operation


def _write_back(parameter: nn.Parameter, value: Tensor, written: int) -> None:
    """γ or β as it was before it was fitted, unless it has learned since."""
    if version(parameter) == written:
        with torch.no_grad():
            parameter.copy_(value)


class _Plan:
    """What becomes of each norm."""

    def __init__(self, model: nn.Module, to: str, dims: int | None, options: dict[str, Any], used: _Measure | None):
        self.to, self.options, self.used = to, options, used
        self.given, self.most = dims, model_dims(model)
        self._convolves_1d = any(isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) for module in model.modules())
        self._like = next((part for part in model.parameters() if part.is_floating_point()), None)
        self._readers = reader_of_statistics(model)

    def seen(self, found: Found) -> Seen:
        seen = Seen() if self.used is None else self.used.seen(found.module)
        if seen.dims is None and space_dims(found.module) is None:
            seen.dims = self.given
        if seen.like is None:
            seen.like = self._like
        return seen

    def why_not(self, found: Found) -> str | None:
        """Why a norm is left as it is, or None."""
        reason = why_left(found) or self._why_not_kind(found.module) or self._why_not_use(found)
        return reason or (None if self.used is None else self.used.why_not(found.module, self.to))

    def built(self, found: Found) -> nn.Module:
        return built(found.module, self.to, self.seen(found), self.most or 2, self.options)

    def note(self, found: Found, new: nn.Module) -> str:
        """What carries over, what was established and what assumed."""
        old, reader = found.module, self._readers(found)
        notes = [note(old, new, self.to, self.seen(found), established(old, new))]
        if reader is not None:
            there = "running_mean" in new._buffers
            goes_on = "that it goes on as before is assumed" if there else "it finds none in the new norm"
            notes.append(f"{reader} reads its statistics itself: {goes_on}")
        if self.used is not None and (not_run := self.used.note(old)):
            notes.append(not_run)
        if found.held.beside:
            notes.append(f"replaced in {', '.join(place.name for place in found.held.beside)} too")
        return "; ".join(notes)

    def _why_not_kind(self, norm: nn.Module) -> str | None:
        name, to = registered_name(norm), self.to
        if name is not None and to in NORMS and type(norm) in classes(to):
            return f"is {to} already"
        if to == TORCH:
            return self._why_not_torch(norm)
        if to == "frozen" and is_frozen(norm):
            return "is frozen already, by a class of its own"
        if name is not None and NORMS[name].activates:
            return "is an activation too, which would be lost"
        activation = getattr(norm, "activation", None) if library(type(norm)) else None
        if activation is not None and "activation" not in accepted_options(to, 1):
            return f"is an activation too, {activation}, which {to} cannot be"
        return None

    def _why_not_torch(self, norm: nn.Module) -> str | None:
        if type(norm).__module__.startswith("torch.") and not isinstance(norm, nn.SyncBatchNorm):
            return "is torch's already"
        grouped = isinstance(norm, GroupNorm)
        if not grouped and "running_mean" not in norm._buffers:
            return "torch has no such norm"
        if not grouped and not affine_dims(norm) and not on_meta(norm):
            return "torch has no such norm: in evaluation it is no scale and shift"
        if not grouped and space_dims(norm) is None and self.given is None and self.used is None:
            return "does not say how many space dimensions it takes: give dims or batches"
        return None

    def _why_not_use(self, found: Found) -> str | None:
        """Why its use, as far as it is known, does not allow this norm, or None."""
        norm, seen = found.module, self.seen(found)
        if self.to in NORMS and (hook := reading_hook(norm, classes(self.to))):
            return f"its hook {hook} reads statistics, which {self.to} norm has not"
        if self.used is None and (reader := self._readers(found, in_forward=True)):
            return f"{reader} reads its statistics itself, and may never call it: give batches to see what it does"
        if self.to not in ("instance", "layer", "group", "group_ws", "layer_channels"):
            return None
        values = values_a_statistic(norm, self.to, seen)
        assumed = self.to == "instance" and seen.values is None and self._convolves_1d
        if values == 1 and not assumed:
            return f"{self.to} norm would put out β whatever the input: it has one value to take statistics of"
        return None

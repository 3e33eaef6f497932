"""Running statistics measured anew: those of the images themselves, not of a moving average."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputError, check
from .effect import Batches, Forward, first_input, looking, peeked
from .modules import Choice, Selection, called, norms
from .moments import Moments
from .operation import Operation
from .probe import check_made, library, statistics_kind
from .report import Report, Row
from .trace import input_of

FEWEST = 32  # values a channel from which on their mean and variance are taken for those of all
Mask: TypeAlias = Callable[[Any], Tensor]


def recalibrate(
    model: nn.Module,
    batches: Batches,
    *,
    forward: Forward = first_input,
    mask: Mask | None = None,
    only: Choice | Iterable[Choice] | None = None,
    skip: Choice | Iterable[Choice] = (),
    progress: bool = False,
) -> Operation:
    """Measure the mean and variance of what each norm is given, over all batches together, and keep them as its own.

        μ = Σ x / n          σ² = Σ (x − μ)² / (n − 1)          over all batches and space, per channel, in float64

    Every batch goes through the model once, in evaluation mode. So its size does not matter: one image is enough. Each
    norm uses the statistics of the images so far. So the norms behind it are given what they will be given later; its
    old statistics may be far off. The first images leave an error of 0.01 deviations for a thousand images and a net
    of 13 norms. One batch of all images leaves none. Statistics that are not finite become 0 and 1 at first.

    A norm gets statistics of its own kind. Instance norm gets the means of the images' own means and variances. Moving
    average batch norm gets the mean square. Frozen norms stay as they are.

    Args:
        model: changed: the buffers `running_mean`, `running_var` and `num_batches_tracked` of its norms.
        batches: gone through once; a thousand images and more are enough.
        forward: runs the model on one of `batches`; by default on the batch, or on the first of its parts.
        mask: gives for a batch which positions count: (N, *space), true where there is data, not padding. Norms that
            are given another number of positions get the nearest ones.
        only: the norms to measure, see `convert`.
        skip: those to leave, in the same words.
        progress: show a bar.

    Returns:
        The model, and for every norm how far its mean and deviation moved.

    Raises:
        InputError: there are no batches, a norm is given inf or NaN, or a choice meets no norm; the statistics are as
            they were then, as after any other exception.

    Source: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3, where it is done in training mode, with
    batches that are large enough.
    """
    check_made(model)
    found = norms(model)
    selection = Selection(only, skip, found)
    reasons = {one.module: selection.why_not(one) or _why_not(one.module) for one in found}
    measured = {one.module: statistics_kind(one.module) or "" for one in found if reasons[one.module] is None}
    names = {one.module: one.name for one in found}
    operation = Operation(model, Report())
    with operation.all_or_nothing():
        before = {norm: [part.clone() for part in _statistics(norm)] for norm in measured}
        operation.on_undo(partial(_write_back, before))
        for norm in measured:
            mean, var, *_ = _statistics(norm)
            if not _finite(mean, var):
                mean.zero_()
                var.fill_(1)
        moments = _Measuring(measured, names, forward, mask).over(model, _shown(batches, progress))
        for norm, found_moments in moments.items():
            _write(found_moments, norm, names[norm])
    for one in found:
        row = Row(one.name, called(one.module), None, reasons[one.module] or "not run")
        if one.module in moments:
            moved = _moved(before[one.module], _statistics(one.module))
            row = Row(one.name, called(one.module), called(one.module), moved)
        operation.report.rows.append(row)
    return operation


class _Measuring:
    """Gathers what norms are given, while each goes on with the statistics of what it was given so far."""

    def __init__(self, kinds: dict[nn.Module, str], names: dict[nn.Module, str], forward: Forward, mask: Mask | None):
        self._kinds, self._names, self._forward, self._mask_of = kinds, names, forward, mask
        self._moments: dict[nn.Module, Moments] = {}
        self._mask: Tensor | None = None
        self._fewest: dict[nn.Module, int] = {}  # where there are fewer than FEWEST values in all

    def over(self, model: nn.Module, batches: Iterable[Any]) -> dict[nn.Module, Moments]:
        """Go through the batches, for every norm that runs."""
        first, others = [], peeked(batches)[1]
        handles = [norm.register_forward_pre_hook(self._see, with_kwargs=True) for norm in self._kinds]
        try:
            with looking(model):
                for batch in others:
                    first.append(batch)
                    self._run(model, batch)
                    if all(so_far.count >= FEWEST for so_far in self._moments.values()):
                        break
                # Once more, for those that were given what the old statistics of the norms before them had made.
                self._fewest = {norm: min(FEWEST, max(so_far.count, 1)) for norm, so_far in self._moments.items()}
                self._moments.clear()
                for batch in chain(first, others):
                    self._run(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return self._moments

    def _run(self, model: nn.Module, batch: Any) -> None:
        self._mask = None if self._mask_of is None else self._mask_of(batch)
        self._forward(model, batch)

    def _see(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        if not isinstance(x, Tensor) or x.is_nested or x.dim() < 2:
            kind = type(x).__name__
            raise InputError(f"{self._names[norm]}: expected a tensor (N, C, *space) to measure, got {kind}. Skip it.")
        so_far = self._moments.setdefault(norm, Moments(self._kinds[norm]))
        own = kwargs.get("mask") if library(type(norm)) else None  # a foreign one may mean anything
        so_far.add(x, scaled_mask(own if isinstance(own, Tensor) else self._mask, x))
        if so_far.count >= self._fewest.get(norm, FEWEST):
            _write(so_far, norm, self._names[norm])


def scaled_mask(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """A mask (N, *space) for the positions of `x`, (N, C, *space); None where there is none, or no space.

    Raises:
        InputError: it is for another number of images, or of other dimensions.
    """
    if mask is None or x.dim() == 2:
        return None
    fits = mask.dim() == x.dim() - 1 and len(mask) == len(x)
    check(fits, "mask", tuple(mask.shape), f"(N, *space) for an input of shape {tuple(x.shape)}")
    if mask.shape[1:] != x.shape[2:]:
        scaled = nn.functional.interpolate(mask[:, None].float(), size=x.shape[2:], mode="nearest")
        mask = scaled[:, 0]
    return mask.bool()


def _write(moments: Moments, norm: nn.Module, name: str) -> None:
    accepted = "inputs that reach this norm without an infinite value or NaN"
    check(_finite(moments.mean, moments.squares), "batches", name, accepted)
    mean, var, *batches = _statistics(norm)
    new_mean, new_var = moments.as_kept()
    with torch.no_grad():
        mean.copy_(new_mean.reshape(mean.shape))
        var.copy_(new_var.reshape(var.shape))
    for count in batches:
        count.fill_(moments.batches)


def _write_back(before: dict[nn.Module, list[Tensor]]) -> None:
    with torch.no_grad():
        for norm, parts in before.items():
            for part, value in zip(_statistics(norm), parts, strict=True):
                part.copy_(value)


def _why_not(norm: nn.Module) -> str | None:
    own = {name: part for name, part in norm.named_buffers(recurse=False) if part is not None}
    if not any(name.startswith("running_") for name in own):
        return "has no running statistics"
    if isinstance(norm, torch.jit.ScriptModule):
        return "compiled by TorchScript: what it is given cannot be seen"
    kind = statistics_kind(norm) if {"running_mean", "running_var"} <= set(own) else None
    if kind == "constant":
        return "frozen: its statistics are constants"
    return None if kind is not None else "keeps statistics of another kind than mean and variance of a channel"


def _statistics(norm: nn.Module) -> list[Tensor]:
    """Mean, variance and, where it has one, the counter."""
    own = dict(norm.named_buffers(recurse=False))
    return [own[name] for name in ("running_mean", "running_var", "num_batches_tracked") if name in own]


def _finite(*parts: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in parts)


def _moved(before: list[Tensor], after: list[Tensor]) -> str:
    """How far, in the words of the report."""
    (old_mean, old_var, *_), (mean, var, *_) = before, after
    if not _finite(old_mean, old_var):
        return "was not finite"
    deviation = var.clamp(min=torch.finfo(var.dtype).tiny).sqrt()
    far = ((mean - old_mean).abs() / deviation).median().item()
    ratio = (old_var.clamp(min=0).sqrt() / deviation).median().item()
    return f"mean moved by {far:.2g} deviations; the deviation was {ratio:.2g} of what it is (medians of channels)"


def _shown(batches: Batches, progress: bool) -> Iterable[Any]:
    if not progress:
        return batches
    from rich.progress import track

    return track(batches, description="recalibrating")

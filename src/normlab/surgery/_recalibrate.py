"""Running statistics measured anew: those of the images themselves, not of a moving average."""

from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check
from .effect import Batches, Forward, evaluating, first_input
from .modules import Choice, Found, called, chosen, norms
from .moments import Moments
from .report import Report, Row

FEWEST = 32  # values a channel from which on their mean and variance are taken for those of all


def recalibrate(
    model: nn.Module,
    batches: Batches,
    *,
    forward: Forward = first_input,
    only: Choice | Iterable[Choice] | None = None,
    skip: Choice | Iterable[Choice] = (),
    progress: bool = False,
) -> Report:
    """Measure the mean and variance of what each norm is given, over all batches together, and keep them as its own.

        μ = Σ x / n          σ² = Σ (x − μ)² / (n − 1)          over all batches and space, per channel, in float64

    Every batch goes through the model once, in evaluation mode, so its size does not matter, down to one image. Each
    norm has the statistics of the images so far while it goes on, so that the norms behind it are given what they will
    be: those that it had before may be far off, and would have them measure something else. The error that is left, of
    the first images' statistics, is .01 deviations for a thousand images and a net of 13 norms; of one batch of all
    images there is none. Statistics that are not finite become 0 and 1 at first.

    Args:
        model: changed: the buffers `running_mean`, `running_var` and `num_batches_tracked` of its norms.
        batches: gone through once; a thousand images and more are enough.
        forward: runs the model on one of `batches`; by default on the batch, or on the first of its parts.
        only: the norms to measure, see `convert`.
        skip: those to leave, likewise.
        progress: show a bar.

    Returns:
        For every norm how far its mean and deviation moved.

    Raises:
        InputError: there are no batches, or a norm is given inf or NaN; the statistics are as they were then.

    Source: Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3, where it is done in training mode, with
    batches that are large enough.
    """
    measured, report = [], Report()
    for found in norms(model):
        reason = _reason(found, only, skip)
        if reason is None:
            measured.append(found)
        else:
            report.rows.append(Row(found.name, called(found.module), None, reason))
    before = {found.module: [part.clone() for part in _statistics(found.module)] for found in measured}
    for found in measured:
        mean, var, *_ = _statistics(found.module)
        if not _finite(mean, var):
            mean.zero_()
            var.fill_(1)
    try:
        moments = _measure(model, measured, _shown(batches, progress), forward)
        for found in measured:
            if found.module in moments:
                _write(moments[found.module], found)
    except BaseException:  # all or none
        for module, parts in before.items():
            for part, value in zip(_statistics(module), parts, strict=True):
                part.copy_(value)
        raise
    for found in measured:
        ran, kind = found.module in moments, called(found.module)
        note = _moved(before[found.module], _statistics(found.module)) if ran else "not run"
        report.rows.append(Row(found.name, kind, kind if ran else None, note))
    return report


def _measure(
    model: nn.Module, measured: list[Found], batches: Iterable[Any], forward: Forward
) -> dict[nn.Module, Moments]:
    moments: dict[nn.Module, Moments] = {}
    found_of = {found.module: found for found in measured}

    def see(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        so_far = moments.setdefault(norm, Moments())
        so_far.add(inputs[0])
        if so_far.count >= FEWEST:
            _write(so_far, found_of[norm])

    handles = [found.module.register_forward_pre_hook(see) for found in measured]
    first, others = [], iter(batches)
    try:
        with evaluating(model):
            for batch in others:
                first.append(batch)
                forward(model, batch)
                if all(so_far.count >= FEWEST for so_far in moments.values()):
                    break
            check(bool(first), "batches", batches, "at least one batch")
            # Once more, for those that were given what the old statistics of the norms before them had made.
            moments.clear()
            for batch in chain(first, others):
                forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return moments


def _write(moments: Moments, found: Found) -> None:
    accepted = "inputs that reach this norm without an infinite value or NaN"
    check(_finite(moments.mean, moments.squares), "batches", found.name, accepted)
    mean, var, *batches = _statistics(found.module)
    mean.copy_(moments.mean)
    var.copy_(moments.squares / max(moments.count - 1, 1))
    for count in batches:
        count.fill_(moments.batches)


def _reason(found: Found, only: Any, skip: Any) -> str | None:
    if not chosen(only, found) or (skip != () and chosen(skip, found)):
        return "not chosen"
    own = dict(found.module.named_buffers(recurse=False))
    return None if {"running_mean", "running_var"} <= set(own) else "has no running statistics"


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

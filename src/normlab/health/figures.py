"""What was seen of a norm, in figures."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..nn.running import RunningBatchNorm
from ..surgery.build import is_frozen
from ..surgery.modules import called, never_updated
from ..surgery.moments import Moments
from ..surgery.probe import is_affine
from .layer import Layer
from .watched import Watched, mean_and_var

OFF = 1e-3  # of the mean |γ|; the median is 0 where half of them are off


def figures(
    watched: Watched,
    name: str,
    frozen_by_mode: bool,
    model_learns: bool,
    optimized: set[int] | None,
    closes: bool,
    turn: float | None,
    first: bool,
) -> Layer:
    """The figures of a norm, from all that was seen of it.

    Args:
        watched: what was seen.
        name: of the norm in its model.
        frozen_by_mode: it alone is in evaluation mode.
        model_learns: a parameter of the model does.
        optimized: ids of the parameters that the optimizer has; None without one.
        closes: a rectifier follows.
        turn: of the weight before it.
        first: it is the first that is given maps, which still show how images differ.
    """
    norm, mean, var = watched.norm, *mean_and_var(watched.norm)
    if not watched.given.count and not watched.reasons:
        watched.say("not run in evaluation" if watched.calls_in_training else "not run by these batches")
    parameters = [part for part in norm.parameters(recurse=False)]
    learned = [part for part in parameters if part.requires_grad]
    updates, momentum = _updates(norm), _momentum(norm)
    finite = _all_finite(mean, var) and (var is None or bool((var >= 0).all()))
    sound = finite and _all_finite(*parameters)
    running = None
    if sound and mean is not None and var is not None:
        running = mean.double().flatten(), var.double().flatten()
    half = mean is not None and mean.element_size() < 4
    constant, silent, closed = _shares(watched, closes)
    initial = (1 - momentum) ** updates if updates and momentum else None
    offset = typical_offset = unbiased_offset = None
    if running and watched.given.count and _is_of_statistics(watched):
        offset, typical_offset = _offset(watched, watched.given, *running)
        if initial is not None and initial < 1 and watched.calls_in_training:
            unbiased = running[0] / (1 - initial), ((running[1] - initial) / (1 - initial)).clamp(min=0)
            unbiased_offset, _ = _offset(watched, watched.calls_in_training[0], *unbiased)
    has_statistics = mean is not None or bool(watched.by_batch)
    off, (share, just_loaded) = _off(norm), _share(norm)
    lag = None
    if share is not None and running and watched.calls_in_training:
        _, lag = _offset(watched, watched.calls_in_training[0], *running)
    return Layer(
        name,
        called(norm),
        channels=len(watched.given.mean) if watched.given.count else None,
        values=watched.values if has_statistics else None,
        noise=_noise(watched) if has_statistics else None,
        offset=offset,
        typical_offset=typical_offset,
        unbiased_offset=unbiased_offset,
        gap=watched.gaps.overall,
        typical_gap=watched.gaps.typical,
        constant=constant,
        off=None if off is None else float(off.double().mean()),
        closed=closed,
        silent=silent,
        updates=updates,
        momentum=momentum,
        still_initial=initial,
        untouched=never_updated(norm),
        finite_statistics=finite,
        finite_parameters=_all_finite(*parameters),
        finite_inputs=watched.finite,
        statistics_type=str(mean.dtype).removeprefix("torch.") if mean is not None and half else None,
        by_batch=bool(watched.by_batch),
        single=watched.single,
        frozen_by_mode=frozen_by_mode and mean is not None,
        half_frozen=bool(parameters) and not learned and model_learns and watched.moves,
        disagreement=_disagreement(watched),
        unlearned=optimized is not None and any(id(part) not in optimized for part in learned),
        turn=turn,
        share=share,
        lag=lag,
        unsettled=turn / share if turn is not None and share and just_loaded else None,
        contrast=_contrast(watched) if first else None,
        passed_by=mean is not None and watched.blind is None and not (isinstance(norm, _BatchNorm) or is_frozen(norm)),
        unmeasured="; ".join(watched.reasons) or None,
    )


def _is_of_statistics(watched: Watched) -> bool:
    """Whether evaluation is by the running statistics alone."""
    return is_affine(watched.norm) if watched.plain else bool(watched.follows)


def _updates(norm: nn.Module) -> int | None:
    found = getattr(norm, "num_batches_tracked", None)
    return int(found) if isinstance(found, int) or (isinstance(found, Tensor) and found.numel() == 1) else None


def _momentum(norm: nn.Module) -> float | None:
    found = getattr(norm, "momentum", None)
    return float(found) if isinstance(found, (int, float)) and 0 <= found <= 1 else None


def _share(norm: nn.Module) -> tuple[float | None, bool]:
    """The share of a batch in a running norm's statistics, and whether no batch has adapted it yet."""
    if not isinstance(norm, RunningBatchNorm):
        return None, False
    return float(norm.share), never_updated(norm) is False and not bool(norm.innovation.any())


def _contrast(watched: Watched) -> float | None:
    own = torch.cat(watched.images, 1)
    varies = watched.given.var > _eps(watched.norm)
    if own.shape[1] < 2 or not varies.any():
        return None
    return float((own.var(1, correction=0).sum(0) / watched.given.var)[varies].mean())


def _noise(watched: Watched) -> float | None:
    squares = []
    for call, mean, var in watched.batches:
        deviation, varies = call.var.sqrt(), call.var > 0
        found = ((mean - call.mean) / deviation) ** 2 + (var.sqrt() / deviation - 1) ** 2
        squares += [found[varies]] if call.batches > 1 else []
    return _root_mean(torch.cat(squares)) if squares else None


def _offset(watched: Watched, given: Moments, mean: Tensor, var: Tensor) -> tuple[float | None, float | None]:
    """How far what it is given is from a mean and variance: over all channels, and the median."""
    if given.count == 0:
        return None, None
    # Of the batches here, and of those in a moving average: the square of its weights, summed.
    momentum = _momentum(watched.norm) or 0.0
    open_still = (_noise(watched) or 0.0) ** 2 * (1 / given.batches + momentum / (2 - momentum))
    eps = _eps(watched.norm)
    deviation = (var + eps).sqrt()
    varies = (given.var > eps) | (var > eps)
    found = ((given.mean - mean) / deviation) ** 2 + ((given.var + eps).sqrt() / deviation - 1) ** 2
    found = found[varies]
    if found.numel() == 0:
        return None, None
    overall, typical = (max(float(part) - open_still, 0.0) ** 0.5 for part in (found.mean(), found.median()))
    return overall, typical


def _shares(watched: Watched, closes: bool) -> tuple[float | None, float | None, float | None]:
    """The shares of channels that are constant, silent and closed."""
    if watched.given.count < 2 or watched.largest is None:
        return None, None, None
    constant = watched.given.var <= _eps(watched.norm)
    closed = (watched.largest <= 0) & ~constant
    off = _off(watched.norm)
    off = torch.zeros_like(constant) if off is None or off.shape != constant.shape else off
    silent = (watched.put_out.var <= 1e-10 * watched.given.var) & ~constant & ~off & ~(closed if closes else off)
    shares = [float(part.double().mean()) for part in (constant, silent, closed)]
    return shares[0], shares[1], shares[2] if closes else None


def _disagreement(watched: Watched) -> float | None:
    several = [moments for moments in watched.calls if moments.count]
    if len(several) < 2:
        return None
    deviation = torch.stack([moments.var for moments in several]).mean(0).sqrt()
    varies = deviation > 0
    means = torch.stack([moments.mean for moments in several])[:, varies]
    return _root_mean(((means.amax(0) - means.amin(0)) / deviation[varies]) ** 2)


def _all_finite(*parts: Tensor | None) -> bool:
    return all(part is None or bool(part.isfinite().all()) for part in parts)


def _off(norm: nn.Module) -> Tensor | None:
    """Which γ are nothing beside the others, or all of them 0."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor) or weight.numel() == 0 or not weight.is_floating_point():
        return None
    size = weight.detach().abs().flatten().double()
    return size < OFF * size.mean() if size.any() else size == 0


def _eps(norm: nn.Module) -> float:
    found = getattr(norm, "eps", None)
    return float(found) if isinstance(found, (int, float)) else 0.0


def _root_mean(squares: Tensor) -> float | None:
    return float(squares.mean()) ** 0.5 if squares.numel() else None

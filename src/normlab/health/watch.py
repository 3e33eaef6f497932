"""What one norm is given and puts out, gathered batch by batch, and what that says of it in figures."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..surgery.modules import OTHERS, called, never_updated
from ..surgery.moments import Moments
from ..surgery.probe import is_affine
from .layer import Layer

OFF = 1e-3  # of the median |γ|


class Ratio:
    """Root mean square of a difference, over the deviation of the first, of (C, values) each."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, 1, dtype=torch.float64)

    def add(self, one: Tensor, other: Tensor) -> None:
        one, other = one.detach().double(), other.detach().double()
        parts = torch.ones_like(one), one, one**2, (one - other) ** 2
        self._sums = self._sums + torch.stack([part.sum(1) for part in parts]).cpu()

    @property
    def overall(self) -> float | None:
        """Of all values; None of none."""
        count, total, squares, changes = self._sums.sum(1).tolist()
        if count == 0:
            return None
        deviation = max(squares / count - (total / count) ** 2, 0) ** 0.5
        change = (changes / count) ** 0.5
        return change / deviation if deviation > 0 else (0.0 if change == 0 else math.inf)

    @property
    def typical(self) -> float | None:
        """The median of the channels that vary; None without any."""
        count, total, squares, changes = self._sums
        var = squares / count - (total / count) ** 2
        varies = var > 0
        return float((changes / count / var)[varies].sqrt().median()) if varies.any() else None


class Watched:
    """One norm: what it is given and puts out."""

    def __init__(self, norm: nn.Module):
        self.norm = norm
        self.by_channel = not isinstance(norm, OTHERS)
        self.given, self.put_out = Moments(), Moments()
        self.calls: list[Moments] = []  # of the first, second, … call in a pass
        self.calls_in_training: list[Moments] = []
        self.batches: list[tuple[Moments, Tensor, Tensor]] = []  # of which call; mean and variance
        self.gaps = Ratio()
        self.largest: Tensor | None = None
        self.values: int | None = None
        self.finite = True
        self.by_batch: bool | None = None
        self.single = self.moves = False
        self._call = 0
        self._expected: Any = None

    def begin_pass(self) -> None:
        self._call = 0

    def evaluated(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self._look(x)
        if not self.by_channel or not torch.is_tensor(y) or x.dim() < 2 or x.numel() == 0:
            return
        self._next(self.calls).add(x)
        self.given.add(x)
        self.put_out.add(y)
        largest = _channels(y).amax(1)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if self.by_batch is None and len(args) == 1 and not kwargs and x.numel() > 2 * x.shape[1] and len(x) > 1:
            without_last, largest = norm.forward(x[:-1]), float(y.abs().max())
            if math.isfinite(largest):
                self.by_batch = not torch.allclose(without_last, y[:-1], rtol=1e-3, atol=1e-3 * largest)

    def begins_training(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        self._look(x)
        if not norm.training or not self.by_channel or x.dim() < 2 or x.numel() == 0:
            self._expected = None
            return
        call = self._next(self.calls_in_training)
        moments = call.add(x)
        if moments is not None:
            self.batches.append((call, *moments))
        count = x.numel() // x.shape[1]
        self.values = count if self.values is None else min(self.values, count)
        norm.training = False
        with torch.no_grad():
            self._expected = norm.forward(*args, **kwargs)
        self._before = _statistics(norm)
        if count == 1 and type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward):
            self.single = True  # it would raise: let it go on in evaluation mode
        else:
            norm.training = True

    def trained(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        if self._expected is None:
            return
        norm.training = True
        self.gaps.add(_channels(y), _channels(self._expected))
        self.moves |= any(not torch.equal(*pair) for pair in zip(self._before, _statistics(norm), strict=True))

    def _next(self, calls: list[Moments]) -> Moments:
        if self._call == len(calls):
            calls.append(Moments())
        self._call += 1
        return calls[self._call - 1]

    def _look(self, x: Tensor) -> None:
        self.finite &= bool(x.isfinite().all())

    def layer(
        self,
        name: str,
        frozen_by_mode: bool,
        model_learns: bool,
        optimized: set[int] | None,
        closes: bool,
        turn: float | None,
    ) -> Layer:
        """All of it in figures."""
        norm, mean, var = self.norm, *_mean_and_var(self.norm)
        parameters = [part for part in norm.parameters(recurse=False)]
        learned = [part for part in parameters if part.requires_grad]
        updates, momentum = getattr(norm, "num_batches_tracked", None), getattr(norm, "momentum", None)
        updates = None if updates is None else int(updates)
        finite = _all_finite(mean, var) and (var is None or bool((var >= 0).all()))
        sound = finite and _all_finite(*parameters)
        running = (mean.double(), var.double()) if sound and mean is not None and var is not None else None
        half = mean is not None and mean.element_size() < 4
        constant, silent, closed = self._shares(closes)
        initial = (1 - momentum) ** updates if updates and momentum else None
        offset = typical_offset = unbiased_offset = None
        if running and is_affine(norm):
            offset, typical_offset = self._offset(self.given, *running)
            if initial is not None and initial < 1 and self.calls_in_training:
                unbiased = running[0] / (1 - initial), ((running[1] - initial) / (1 - initial)).clamp(min=0)
                unbiased_offset, _ = self._offset(self.calls_in_training[0], *unbiased)
        has_statistics = mean is not None or bool(self.by_batch)
        noise = self._noise() if has_statistics else None
        return Layer(
            name,
            called(norm),
            channels=len(self.given.mean) if self.given.count else None,
            values=self.values if has_statistics else None,
            noise=noise,
            offset=offset,
            typical_offset=typical_offset,
            unbiased_offset=unbiased_offset,
            gap=self.gaps.overall,
            typical_gap=self.gaps.typical,
            constant=constant,
            off=None if (off := _off(norm)) is None else float(off.double().mean()),
            closed=closed,
            silent=silent,
            updates=updates,
            momentum=momentum,
            still_initial=initial,
            untouched=never_updated(norm),
            finite_statistics=finite,
            finite_parameters=_all_finite(*parameters),
            finite_inputs=self.finite,
            statistics_type=str(mean.dtype).removeprefix("torch.") if mean is not None and half else None,
            by_batch=bool(self.by_batch),
            single=self.single,
            frozen_by_mode=frozen_by_mode and mean is not None,
            half_frozen=bool(parameters) and not learned and model_learns and self.moves,
            disagreement=self._disagreement(),
            unlearned=optimized is not None and any(id(part) not in optimized for part in learned),
            turn=turn,
        )

    def _noise(self) -> float | None:
        squares = []
        for call, mean, var in self.batches:
            deviation, varies = call.var.sqrt(), call.var > 0
            found = ((mean - call.mean) / deviation) ** 2 + (var.sqrt() / deviation - 1) ** 2
            squares += [found[varies]] if call.batches > 1 else []
        return _root_mean(torch.cat(squares)) if squares else None

    def _offset(self, given: Moments, mean: Tensor, var: Tensor) -> tuple[float | None, float | None]:
        """Of what it is given from a mean and variance: over all channels, and the median."""
        if given.count == 0:
            return None, None
        # Of the batches here, and of those in a moving average: the square of its weights, summed.
        momentum = getattr(self.norm, "momentum", None) or 0.0
        open_still = (self._noise() or 0.0) ** 2 * (1 / given.batches + momentum / (2 - momentum))
        eps = _eps(self.norm)
        deviation = (var + eps).sqrt()
        varies = (given.var > eps) | (var > eps)
        found = ((given.mean - mean) / deviation) ** 2 + ((given.var + eps).sqrt() / deviation - 1) ** 2
        found = found[varies]
        if found.numel() == 0:
            return None, None
        overall, typical = (max(float(part) - open_still, 0.0) ** 0.5 for part in (found.mean(), found.median()))
        return overall, typical

    def _shares(self, closes: bool) -> tuple[float | None, float | None, float | None]:
        """Of channels that are constant, silent and closed."""
        if self.given.count < 2 or self.largest is None:
            return None, None, None
        constant = self.given.var <= _eps(self.norm)
        closed = (self.largest <= 0) & ~constant
        off = _off(self.norm)
        off = torch.zeros_like(constant) if off is None or off.shape != constant.shape else off
        silent = (self.put_out.var <= 1e-10 * self.given.var) & ~constant & ~off & ~(closed if closes else off)
        shares = [float(part.double().mean()) for part in (constant, silent, closed)]
        return shares[0], shares[1], shares[2] if closes else None

    def _disagreement(self) -> float | None:
        several = [moments for moments in self.calls if moments.count]
        if len(several) < 2:
            return None
        deviation = torch.stack([moments.var for moments in several]).mean(0).sqrt()
        varies = deviation > 0
        means = torch.stack([moments.mean for moments in several])[:, varies]
        return _root_mean(((means.amax(0) - means.amin(0)) / deviation[varies]) ** 2)


def _channels(x: Tensor) -> Tensor:
    """(N, C, *space) as (C, values)."""
    return x.detach().transpose(0, 1).flatten(1)


def _mean_and_var(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    return getattr(norm, "running_mean", None), getattr(norm, "running_var", None)


def _statistics(norm: nn.Module) -> list[Tensor]:
    return [part.clone() for part in _mean_and_var(norm) if part is not None]


def _all_finite(*parts: Tensor | None) -> bool:
    return all(part is None or bool(part.isfinite().all()) for part in parts)


def _off(norm: nn.Module) -> Tensor | None:
    """Which γ are nothing beside the others, or all of them 0."""
    weight = getattr(norm, "weight", None)
    if weight is None or weight.numel() == 0:
        return None
    size = weight.detach().abs().flatten().double()
    return size < OFF * size.median() if size.any() else size == 0


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "eps", None) or 0.0)


def _root_mean(squares: Tensor) -> float | None:
    return float(squares.mean()) ** 0.5 if squares.numel() else None

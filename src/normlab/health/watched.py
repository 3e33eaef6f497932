"""What one norm is given and puts out, gathered batch by batch."""

import itertools
import math
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

from ..surgery.moments import Moments
from ..surgery.trace import input_of
from .foreign import Unmeasured, channel_dim, follows_statistics, is_plain, output_like, run, why_opaque

CALLS = itertools.count(1)
SHOWS_CONTRAST = 64  # a map of so few values or more says by its mean how bright the image is


class Ratio:
    """Root mean square of the difference of two tensors (C, values), over the deviation of the first."""

    def __init__(self) -> None:
        self._sums = torch.zeros(4, 1, dtype=torch.float64)

    def add(self, one: Tensor, other: Tensor) -> None:
        one, other = one.detach().double(), other.detach().double()
        parts = torch.ones_like(one), one, one**2, (one - other) ** 2
        self._sums = self._sums + torch.stack([part.sum(1) for part in parts]).cpu()

    @property
    def overall(self) -> float | None:
        """Over all values; None if there were none."""
        count, total, squares, changes = self._sums.sum(1).tolist()
        if count == 0:
            return None
        deviation = max(squares / count - (total / count) ** 2, 0) ** 0.5
        change = (changes / count) ** 0.5
        return change / deviation if deviation > 0 else (0.0 if change == 0 else math.inf)

    @property
    def typical(self) -> float | None:
        """The same for each channel that varies, the median of them; None without any."""
        count, total, squares, changes = self._sums
        var = squares / count - (total / count) ** 2
        varies = var > 0
        return float((changes / count / var)[varies].sqrt().median()) if varies.any() else None


def looks(method: Callable[..., None]) -> Callable[..., None]:
    """A hook that never fails: what it cannot look at becomes a reason."""

    @wraps(method)
    def look(self: "Watched", norm: nn.Module, args: Any, kwargs: dict[str, Any], *output: Any) -> None:
        if self.blind is None:
            try:
                method(self, norm, args, kwargs, *output)
            except Unmeasured as reason:
                self.say(str(reason))
            except (RuntimeError, NotImplementedError) as error:  # of tensors of other kinds: quantized, sparse, nested
                self.say(f"what it is given cannot be looked at: {str(error).splitlines()[0]}")

    return look


class Seen(NamedTuple):
    """What a norm is given in a call.

    Attributes:
        x: the tensor.
        args: all of it, by position. Foreign norms may write into it, so these are copies for them.
        kwargs: by keyword.
        dim: that holds its channels.
        mask: (N, *space), true where a value counts; None for all.
    """

    x: Tensor
    args: Any
    kwargs: dict[str, Any]
    dim: int
    mask: Tensor | None

    def rows(self, part: Tensor) -> Tensor:
        """A tensor of the same shape as (C, values)."""
        flat = part.detach().movedim(self.dim, 0).flatten(1)
        return flat if self.mask is None else flat[:, self.mask.flatten()]


class Watched:
    """One norm: what it is given and puts out.

    Attributes:
        blind: why nothing of it can be seen; None if it can.
        reasons: why figures are missing.
    """

    def __init__(self, norm: nn.Module):
        self.norm = norm
        self.blind = why_opaque(norm)
        self.reasons = [] if self.blind is None else [self.blind]
        self.plain = is_plain(norm)
        self.given, self.put_out = Moments(), Moments()
        self.calls: list[Moments] = []  # of the first, second, … call in a pass
        self.calls_in_training: list[Moments] = []
        self.batches: list[tuple[Moments, Tensor, Tensor]] = []  # of which call; mean and variance
        self.images: list[Tensor] = []  # mean and deviation of each image's channels, (2, N, C)
        self.first_pass_at = 0  # its place among all norms by the time of their first call
        self.gaps = Ratio()
        self.largest: Tensor | None = None
        self.values: int | None = None
        self.finite = True
        self.by_batch: bool | None = None
        self.follows: bool | None = None
        self.single = self.moves = False
        self._dims: dict[int, int] = {}  # that holds the channels, by the number of dimensions
        self._call = 0
        self._seen: Seen | None = None
        self._expected: Tensor | None = None
        self._refused = False

    def say(self, reason: str) -> None:
        """A reason, once."""
        if reason not in self.reasons:
            self.reasons.append(reason)

    def begin_pass(self) -> None:
        self._call, self._seen, self._expected, self._refused = 0, None, None, False

    @looks
    def begins(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before it runs in evaluation mode."""
        self._seen = seen = self._look(args, kwargs)
        if seen is None:
            return
        values = seen.rows(seen.x)
        self._next(self.calls).add(values.T)
        self.given.add(values.T)
        if seen.dim == 1 and seen.x.dim() > 2 and seen.mask is None and seen.x[0, 0].numel() >= SHOWS_CONTRAST:
            self.first_pass_at = self.first_pass_at or next(CALLS)
            maps = seen.x.detach().double().flatten(2)
            self.images.append(torch.stack([maps.mean(2), maps.std(2, correction=0)]))

    @looks
    def evaluated(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After that."""
        seen = self._seen
        if seen is None:
            return
        y = output_like(output, seen.x)
        rows = seen.rows(y)
        self.put_out.add(rows.T)
        largest = rows.amax(1)
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        if self.follows is None and not self.plain and all(part is not None for part in mean_and_var(norm)):
            self.follows = follows_statistics(norm, seen.args, seen.kwargs, seen.x, y)
            if not self.follows:
                self.say("offset: it computes with more than (x − μ) / √(σ² + eps) of its running statistics")
        if self.by_batch is None:
            self.by_batch = self._by_batch(seen, y)

    @looks
    def begins_training(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before it runs in training mode."""
        self._expected, self._refused = None, False
        self._seen = seen = self._look(args, kwargs)
        if seen is None or not norm.training:
            self._seen = None
            return
        call = self._next(self.calls_in_training)
        values = seen.rows(seen.x)
        moments = call.add(values.T)
        if moments is not None:
            self.batches.append((call, *moments))
        count = values.shape[1]
        self.values = count if self.values is None else min(self.values, count)
        self._before = _statistics(norm)
        if count == 1 and self._refuses(seen):
            self.single = self._refused = True
            norm.training = False  # it would raise: let it go on in evaluation mode
        self._expected = seen.rows(output_like(run(norm, seen.args, seen.kwargs), seen.x))

    def trained(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After that."""
        if self._refused:
            norm.training = True
        self._compare(norm, args, kwargs, output)

    @looks
    def _compare(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._seen is None:
            return
        after = _statistics(norm)
        self.moves |= any(not torch.equal(*pair) for pair in zip(self._before, after, strict=True))
        if self._expected is not None:
            self.gaps.add(self._seen.rows(output_like(output, self._seen.x)), self._expected)

    def _refuses(self, seen: Seen) -> bool:
        """Whether it raises, in training mode, for one value a channel."""
        if self.plain:
            return type(self.norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        try:
            run(self.norm, seen.args, seen.kwargs, training=True)
        except Unmeasured:
            return True
        return False

    def _by_batch(self, seen: Seen, y: Tensor) -> bool | None:
        """Whether what it puts out for the other images depends on the last one."""
        x = seen.x
        if seen.dim == 0 or x.numel() <= 2 * x.shape[seen.dim] or len(x) < 2:
            return None
        count, largest = len(x), float(y.abs().max())
        shorter = tree_map(lambda leaf: leaf[:-1] if _is_of(leaf, count) else leaf, (seen.args, seen.kwargs))
        without_last = output_like(run(self.norm, *shorter), x[:-1])
        if not math.isfinite(largest):
            return None
        return not torch.allclose(without_last, y[:-1], rtol=1e-3, atol=1e-3 * largest)

    def _next(self, calls: list[Moments]) -> Moments:
        if self._call == len(calls):
            calls.append(Moments())
        self._call += 1
        return calls[self._call - 1]

    def _look(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Seen | None:
        """What it is given, or None if that is empty."""
        x = input_of(args, kwargs)
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.is_nested or x.layout is not torch.strided:
            raise Unmeasured(f"given {_kind(x)}, not a dense tensor of floating point")
        if not self.plain:
            args, kwargs = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs))
            x = input_of(args, kwargs)
        self.finite &= bool(x.isfinite().all())
        if x.dim() < 2:
            raise Unmeasured(f"given a tensor of shape {tuple(x.shape)}, without channels")
        if x.numel() == 0:
            return None
        if x.dim() not in self._dims:
            self._dims[x.dim()] = channel_dim(self.norm, args, kwargs, x)
        dim, mask = self._dims[x.dim()], kwargs.get("mask")
        counted = isinstance(mask, Tensor) and dim == 1 and mask.shape == (len(x), *x.shape[2:])
        return Seen(x, args, kwargs, dim, mask if counted else None)


def mean_and_var(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Its running statistics, as far as it has them as tensors."""
    mean, var = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
    return mean if isinstance(mean, Tensor) else None, var if isinstance(var, Tensor) else None


def _statistics(norm: nn.Module) -> list[Tensor]:
    return [part.clone() for part in mean_and_var(norm) if part is not None]


def _is_of(leaf: Any, count: int) -> bool:
    """Whether it has a part for each of `count` images."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == count


def _kind(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    if value.is_nested:
        return "a nested tensor"
    return f"a {str(value.layout).removeprefix('torch.')} tensor of {str(value.dtype).removeprefix('torch.')}"

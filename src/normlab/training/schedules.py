"""Schedules: functions from a position in 0..1 (of the whole fit) to the value of a hyper-parameter."""

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..errors import InputError, check, check_no_class, is_real

Schedule = Callable[[float], float]


def linear(start: float, end: float) -> Schedule:
    """Start + p (end − start)."""
    _check_ends(start, end)
    return partial(_linear, start, end)


def cosine(start: float, end: float) -> Schedule:
    """Start + (1 − cos πp) (end − start) / 2."""
    _check_ends(start, end)
    return partial(_cosine, start, end)


def constant(start: float, end: float | None = None) -> Schedule:
    """`start`, wherever; `end` is there so that all four are made alike."""
    _check_ends(start, start if end is None else end)
    return partial(_constant, start)


def exponential(start: float, end: float) -> Schedule:
    """Start · (end / start)^p; both above 0."""
    _check_ends(start, end)
    check(start > 0, "start", start, "a number above 0")
    check(end > 0, "end", end, "a number above 0")
    return partial(_exponential, start, end)


def combine(shares: Sequence[float], schedules: Sequence[Schedule]) -> Schedule:
    """Schedules one after the other, each running from 0 to 1 over its own share of the positions.

    Args:
        shares: one a schedule, none negative, summing to 1.
        schedules: as many.

    Raises:
        InputError: the shares do not fit, a schedule is no function of a position, or, when called, the position is
            outside 0..1.
    """
    for name, several in (("shares", shares), ("schedules", schedules)):
        check(isinstance(several, Sequence), name, several, "a list")
    for number, schedule in enumerate(schedules):
        check_schedule(f"schedules[{number}]", schedule)
    check(all(map(is_real, shares)), "shares", list(shares), "numbers")
    check(len(shares) == len(schedules) > 0, "shares", list(shares), f"{len(schedules)} numbers, one a schedule")
    check(all(share >= 0 for share in shares), "shares", list(shares), "numbers from 0")
    check(math.isclose(sum(shares), 1, abs_tol=1e-6), "shares", list(shares), "numbers that sum to 1")
    return partial(_combined, tuple(shares), tuple(schedules))


def one_cycle(start: float, high: float, end: float, warm_up: float = 0.25) -> Schedule:
    """From `start` up to `high` over the share `warm_up`, then down to `end`, both by half a cosine."""
    check(is_real(warm_up) and 0 <= warm_up <= 1, "warm_up", warm_up, "a number from 0 to 1")
    return combine([warm_up, 1 - warm_up], [cosine(start, high), cosine(high, end)])


def check_schedule(argument: str, schedule: Any) -> None:
    """A schedule can be called with a position.

    Raises:
        InputError: it is a number, a class, or needs something else.
    """
    number = is_real(schedule)
    cure = f"Write schedules.constant({schedule})." if number else ""
    check_no_class(argument, schedule)
    check(callable(schedule), argument, schedule, "a function of the position 0..1", cure)
    try:
        inspect.signature(schedule).bind(0.0)
    except TypeError as error:
        name = getattr(schedule, "__name__", type(schedule).__name__)
        raise InputError(
            f"{argument}: expected a function of the position 0..1 alone, got {name} ({error}). "
            f"Give what it makes, as schedules.linear(0.1, 0.0)."
        ) from error
    except ValueError:  # it does not say what it takes
        return


def _check_ends(start: float, end: float) -> None:
    for name, value in (("start", start), ("end", end)):
        check(is_real(value), name, value, "a number")


# Functions of the module rather than closures, so that a schedule can be sent to another process.
def _linear(start: float, end: float, position: float) -> float:
    return start + position * (end - start)


def _cosine(start: float, end: float, position: float) -> float:
    return start + (1 - math.cos(math.pi * position)) * (end - start) / 2


def _constant(start: float, position: float) -> float:
    return start


def _exponential(start: float, end: float, position: float) -> float:
    return start * (end / start) ** position


def _combined(shares: tuple[float, ...], schedules: tuple[Schedule, ...], position: float) -> float:
    check(-1e-6 <= position <= 1 + 1e-6, "position", position, "a number from 0 to 1")
    begin = 0.0
    last = max(i for i, share in enumerate(shares) if share > 0)
    for i, (share, schedule) in enumerate(zip(shares, schedules, strict=True)):
        if share > 0 and (position < begin + share or i == last):
            return schedule(min(max((position - begin) / share, 0.0), 1.0))
        begin += share
    raise AssertionError("the last share ends the positions")

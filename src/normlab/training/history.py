"""Figures of the history, by names such as `valid.loss`."""

from collections.abc import Sequence
from typing import Any

from ..errors import InputError, check, unknown

MODES = ("min", "max")


def flat(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the history with `valid.loss` in place of `{"valid": {"loss": …}}`."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        part = {f"{name}.{key}": figure for key, figure in value.items()} if isinstance(value, dict) else {name: value}
        found.update(part)
    return found


def figures(history: Sequence[dict[str, Any]], metric: str, where: str) -> list[float]:
    """The figure of each epoch.

    Raises:
        InputError: the history has none, or not this one; `where` says who asks.
    """
    if not history:
        raise InputError(f"{where}: the history is empty. Put Metrics() among the callbacks.")
    rows = [flat(row) for row in history]
    for row in rows:
        if metric not in row:
            raise unknown(f"{where}: metric", metric, [name for name in row if "." in name])
    return [float(row[metric]) for row in rows]


def check_metric(metric: Any, mode: Any) -> None:
    """What a callback is told to watch.

    Raises:
        InputError: it is no name, or nothing says which way is better.
    """
    check(isinstance(metric, str), "metric", metric, "a name such as 'valid.loss'")
    check(mode in MODES, "mode", mode, "'min' where less is better, 'max' where more is")

"""What the picture and the page share: the lines of their charts, how these look and where the axes end."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.ticker import MaxNLocator

from ..colours import COLOURS, PALETTE
from .record import Record
from .summary import UP_TO_ONE, Group, best, is_number, printable, show, title_of, values_of, varying
from .verdicts import interval_of

MARKERS = {  # matplotlib's letter and the same shape as an SVG path
    "o": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0 -10 0z",
    "s": "M-4.5 -4.5h9v9h-9z",
    "^": "M0 -6L5.5 4.5H-5.5z",
    "D": "M0 -6L6 0L0 6L-6 0z",
    "v": "M0 6L5.5 -4.5H-5.5z",
    "P": "M-2 -5.5h4v3.5h3.5v4h-3.5v3.5h-4v-3.5h-3.5v-4h3.5z",
    "p": "M0 -6L5.7 -1.9L3.5 4.9H-3.5L-5.7 -1.9z",
}
DASHES = {"-": "", "--": "7 4", ":": "2 3", "-.": "8 3 2 3"}
LAYER_FIGURES = {"mean": "mean", "deviation": "deviation", "near_zero": "share near zero"}  # in records, and in words
SMALLEST_ERROR = 1e-4  # an axis of errors ends here
DECADES = 5  # of an axis of losses, at the most
NEAR_ONE = 0.8  # from here a metric up to one has an axis of errors
LOG_FROM = 30  # the largest value is so many times the smallest where an axis is logarithmic
LARGEST = 1e300  # no axis ends beyond
LABELS = 8  # of an axis, at about the most
MOST_LINES = 1000  # runs whose losses and layers are all drawn; a browser takes seconds for more
BEST_LINES = 500  # runs of the best settings that are drawn in place of more


@dataclass(frozen=True)
class Axis:
    """An upright axis: its ticks, and how high a value is.

    Attributes:
        title: what is measured.
        kind: `linear`; `log`; or `error`, the logarithm of one minus the value, which parts 0.95 from 0.98.
        low: the lowest value.
        high: the highest value.
        ticks: values, each with its label.
    """

    title: str
    kind: Literal["linear", "log", "error"]
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]

    def share(self, value: float) -> float:
        """How high `value` is: 0 at `low` and below, 1 at `high` and above."""
        return float(self.shares(np.array(value)))

    def shares(self, values: np.ndarray) -> np.ndarray:
        """How high each of some values is."""
        scale = {"linear": np.asarray, "log": np.log, "error": lambda x: -np.log(1 - x)}[self.kind]
        low, high, x = (scale(one) for one in (self.low, self.high, np.clip(values, self.low, self.high)))
        return (x - low) / (high - low)


@dataclass(frozen=True)
class Series:
    """One line of a chart: a norm, perhaps with some settings, at its best in all others."""

    label: str
    colour: str
    marker: str
    dash: str
    groups: tuple[Group, ...]

    def best(self, batch_size: int) -> Group | None:
        """The best group at this batch size."""
        return best(group for group in self.groups if group.settings["batch_size"] == batch_size)


def series_of(groups: Sequence[Group], apart: bool = True) -> list[Series]:
    """The lines of the charts: a norm has one colour and marker, its variants differ in the dash.

    Args:
        groups: of a study.
        apart: a line for each of the settings that vary, but for batch size and learning rate; else one for each norm.
    """
    others = [name for name in varying(groups) if apart and name not in ("norm", "batch_size", "lr")]
    norms = values_of(groups, "norm")
    styles = _styles(norms)
    variants = sorted({tuple((name, group.settings[name]) for name in others) for group in groups}, key=str)
    series = []
    for norm, (variant, dash) in itertools.product(norms, zip(variants, itertools.cycle(DASHES), strict=False)):
        shared = {"norm": norm, **dict(variant)}
        members = tuple(group for group in groups if shared.items() <= group.settings.items())
        if members:
            label = ", ".join([norm, *(f"{title_of(name)} {show(name, value)}" for name, value in variant)])
            series.append(Series(label, *styles[norm], dash, members))
    return series


def _styles(norms: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each norm: always the same for those of `COLOURS`, the least used of both for others."""
    known = dict(zip(COLOURS, zip(COLOURS.values(), itertools.cycle(MARKERS), strict=False), strict=True))
    styles = {norm: known[norm] for norm in norms if norm in known}
    for norm in norms:
        if norm not in known:
            styles[norm] = _least_used(list(styles.values()))
    return styles


def _least_used(styles: list[tuple[str, str]]) -> tuple[str, str]:
    """The pair of colour and marker that is in `styles` least often; of those, colour first, then marker."""
    colours, markers = zip(*styles, strict=True) if styles else ((), ())
    pairs = itertools.product(PALETTE, MARKERS)
    return min(pairs, key=lambda pair: (styles.count(pair), colours.count(pair[0]), markers.count(pair[1])))


def metric_axis(groups: Sequence[Group]) -> Axis:
    """The axis of the metric that judges; of an error where a metric of `UP_TO_ONE` comes near one."""
    names = sorted({group.metric for group in groups})
    title = " or ".join(names)
    means = [group.value.mean for group in groups if group.value]
    edges = [edge for group in groups for edge in interval_of(group) or () if is_number(edge)]
    if means and max(means) >= NEAR_ONE and set(names) <= set(UP_TO_ONE):
        errors = [max(1 - value, SMALLEST_ERROR) for value in means + edges]
        # An interval may reach beyond 1, which no logarithmic axis shows: it ends at a third of the least error.
        least = max(min(1 - max(means), 1.0) / 3, SMALLEST_ERROR)
        ticks = _log_ticks(max(min(errors), least), min(max(errors), 1.0), (1, 2, 3, 5, 7))
        return Axis(title, "error", 1 - ticks[-1], 1 - ticks[0], _labelled([1 - tick for tick in reversed(ticks)]))
    return _axis(title, means + edges or [0.0, 1.0], LOG_FROM)


def loss_axis(groups: Sequence[Group]) -> Axis:
    """The axis of training losses, up to five times what they usually begin with: those that diverge go beyond."""
    curves = [np.array(one.curve["loss"], dtype=float) for one in drawn_runs(groups)]
    curves = [curve[np.isfinite(curve)] for curve in curves]
    curves = [curve for curve in curves if len(curve)] or [np.ones(1)]
    losses, first = np.concatenate(curves), float(np.median([curve[0] for curve in curves]))
    most = max(5 * first, losses.min()) if first > 0 else losses.max()
    least = most / 10**DECADES if losses.min() >= 0 and most > 0 else losses.min()
    ends = np.clip([losses.min(), losses.max()], least, most).tolist()
    return _axis("training loss", ends, 2)


def layer_axes(groups: Sequence[Group]) -> dict[str, Axis]:
    """An axis for each of `LAYER_FIGURES` that runs kept; runs that diverged may go beyond it."""
    records = drawn_runs(groups)
    kept = [layers_of(record) for record in records if record.status == "finished"]
    kept = kept or [layers_of(record) for record in records]
    values = {
        figure: [one for found in kept for one in found.get(figure, {}).values() if is_number(one)]
        for figure in LAYER_FIGURES
    }
    return {figure: _axis(LAYER_FIGURES[figure], known, LOG_FROM) for figure, known in values.items() if known}


def drawn_runs(groups: Sequence[Group]) -> list[Record]:
    """The runs whose losses and layers are drawn: all, or those of the best settings where there are too many."""
    if sum(len(group.records) for group in groups) <= MOST_LINES:
        return [record for group in groups for record in group.records]
    sizes = values_of(groups, "batch_size")
    leaders = [group for line in series_of(groups) for size in sizes if (group := line.best(size))]
    each = max(1, BEST_LINES // len(leaders))
    return [record for group in leaders for record in group.records[:each]]


def layers_of(record: Record) -> dict[str, dict[str, float | None]]:
    """Of the activations that a run kept, by figure and layer, the last value that is finite."""
    kept = record.more.get("activations")
    found = {}
    for figure in LAYER_FIGURES:
        series = kept.get(figure) if isinstance(kept, dict) else None
        if isinstance(series, dict) and series:
            found[figure] = {
                str(layer): next((one for one in reversed(values) if is_number(one)), None)
                for layer, values in series.items()
            }
    return found


def warmth_of(groups: Sequence[Group], axis: Axis) -> Callable[[Group], float]:
    """How a map shades a group: from 0, the worst of those that train, to 1, the best; 0 without a result."""
    places = [axis.share(group.value.mean) for group in groups if group.value and group.trains]
    ends = min(places, default=0.0), max(places, default=0.0)
    worst, top = reversed(ends) if groups[0].lower else ends

    def warmth(group: Group) -> float:
        if group.value is None or not group.trains:
            return 0.0
        return 1.0 if worst == top else (axis.share(group.value.mean) - worst) / (top - worst)

    return warmth


def lost_of(group: Group) -> int:
    """How many runs diverged or failed."""
    return len(group.diverged_at) + len(group.errors)


def cut(text: str, length: int) -> str:
    """The text with what cannot be printed replaced, and not longer than `length`."""
    text = printable(text)
    return text if len(text) <= length else text[: length - 1] + "…"


def _axis(title: str, values: list[float], log_from: float) -> Axis:
    """An axis around `values`: logarithmic if all are above zero and the largest is `log_from` times the smallest."""
    low, high = max(min(values), -LARGEST), min(max(values), LARGEST)
    if low > 1 / LARGEST and high / low >= log_from:
        ticks = _log_ticks(low, high, (1, 2, 5))
        return Axis(title, "log", ticks[0], ticks[-1], _labelled(ticks))
    if low == high:
        low, high = low - 0.1 * (abs(low) or 1), high + 0.1 * (abs(high) or 1)
    ticks = [float(tick) for tick in MaxNLocator(LABELS - 1, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    return Axis(title, "linear", ticks[0], ticks[-1], _labelled(ticks))


def _log_ticks(low: float, high: float, digits: tuple[int, ...]) -> list[float]:
    """The `digits` times a power of ten, from just below `low` to just above `high`; the powers alone if many."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    if len(powers) > DECADES + 3:
        digits = (1,)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    below = max(tick for tick in ticks if tick < low * (1 - 1e-9))
    above = min(tick for tick in ticks if tick >= high and tick > below)
    return [tick for tick in ticks if below <= tick <= above]


def _labelled(ticks: list[float]) -> tuple[tuple[float, str], ...]:
    """Ticks with their labels, all or each second or third."""
    every = math.ceil(len(ticks) / (2 * LABELS))
    return tuple((tick, f"{tick:.6g}") for tick in ticks[::every])

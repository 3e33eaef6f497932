"""What the picture and the page share: the lines of their charts, how these look and where the axes end."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ..colours import PALETTE
from ..nn import NORMS
from .summary import Group, best, is_number, show, title_of, values_of, varying

COLOURS = {  # a norm's record says which is its own
    name: PALETTE[place]
    for place, name in sorted((norm.colour, name) for name, norm in NORMS.items() if norm.colour is not None)
}
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
SMALLEST = 1e-4  # the logarithmic axes end here
LARGEST_LOSS = 10.0


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


def series_of(groups: list[Group], apart: bool = True) -> list[Series]:
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


def error_ticks(groups: list[Group]) -> list[float]:
    """The ticks of an axis of 1 − accuracy; it ends at the first and the last."""
    return _ticks((1 - group.value.mean for group in groups if group.value), 1.0, (1, 2, 3, 5, 7))


def loss_ticks(groups: list[Group]) -> list[float]:
    """The ticks of an axis of training losses; it ends at the first and the last."""
    losses = (loss for group in groups for record in group.records for _, loss in record.losses)
    return _ticks((loss for loss in losses if is_number(loss)), LARGEST_LOSS, (1, 2, 5))


def _ticks(values: Iterable[float], largest: float, digits: tuple[int, ...]) -> list[float]:
    """The `digits` times a power of ten, from just below `values` to just above."""
    within = [round(min(max(value, SMALLEST), largest), 6) for value in values] or [largest]
    ticks = [round(digit * 10.0**power, 5) for power in range(-5, 2) for digit in digits]
    below = max(tick for tick in ticks if tick < min(within))
    above = min(tick for tick in ticks if tick >= max(within))
    return [tick for tick in ticks if below <= tick <= above]

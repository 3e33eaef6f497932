"""A diagnosis as a picture: what each norm's statistics and channels do, and the verdicts below."""

import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..colours import PALETTE
from .faults import FAR
from .layer import Layer

MEASURES = {"noise": ("o", "noise of a batch"), "offset": ("s", "offset of running statistics"), "gap": ("D", "gap")}
SHARES = {"constant": "constant", "closed": "closed by a rectifier", "silent": "constant after it"}
LEAST, MOST = 1e-2, 1e3  # of the axis of deviations
LINE, MARGIN = 0.165, 1.8  # inches: of text; of titles and axis
MOST_ROWS = 150


def draw(layers: Sequence[Layer], lines: Sequence[str]) -> Figure:
    """The figure, with `lines` below; of a large model only the first 150 norms."""
    layers = layers[:MOST_ROWS]
    text = "\n".join(part for line in lines for part in textwrap.wrap(line, 125, subsequent_indent="   ") or [""])
    height, below = max(len(layers), 4) * 0.24 + MARGIN, text.count("\n") * LINE + 0.5
    names = [f"{layer.name or 'model'}  {layer.kind}" for layer in layers]
    width = max(11, 9.5 + 0.08 * max(map(len, names), default=0))
    figure = Figure(figsize=(width, height + below), layout="constrained")
    above, under = figure.subfigures(2, 1, squeeze=False, height_ratios=[height, below]).flat
    left, right = above.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    _draw_deviations(left, layers)
    _draw_shares(right, layers)
    left.set_yticks(range(len(layers)), names, fontsize=8)
    left.set_ylim(max(len(layers), 1) - 0.5, -0.5)
    under.text(0.01, 0.98, text, va="top", ha="left", fontsize=9, family="monospace")
    return figure


def _draw_deviations(axes: Axes, layers: Sequence[Layer]) -> None:
    axes.axvspan(FAR, MOST, color="#f4e3d7", zorder=0)
    for color, (name, (marker, label)) in zip(PALETTE, MEASURES.items(), strict=False):
        known = [(getattr(layer, name), y) for y, layer in enumerate(layers) if getattr(layer, name) is not None]
        x = [min(max(value, LEAST), MOST) for value, _ in known]
        axes.plot(x, [y for _, y in known], marker, color=color, ms=5, alpha=0.8, label=label)
    axes.set(xscale="log", xlim=(LEAST * 0.8, MOST * 1.25), xlabel="deviations (what is outside is drawn at the edge)")
    axes.grid(True, axis="both", alpha=0.25)
    _head(axes, "Statistics")


def _draw_shares(axes: Axes, layers: Sequence[Layer]) -> None:
    start = [0.0] * len(layers)
    for color, (name, label) in zip(PALETTE, SHARES.items(), strict=False):
        width = [getattr(layer, name) or 0.0 for layer in layers]
        axes.barh(range(len(layers)), width, left=start, color=color, label=label)
        start = [a + b for a, b in zip(start, width, strict=True)]
    axes.set(xlim=(0, 1), xlabel="share of channels")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.grid(True, axis="x", alpha=0.25)
    _head(axes, "Channels")


def _head(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, pad=22)
    axes.legend(
        frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderpad=0.2, borderaxespad=0.2,
        columnspacing=1, handlelength=1,
    )  # fmt: skip

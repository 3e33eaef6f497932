"""Figures of what was recorded; each function returns a matplotlib Figure, and needs no display."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from ..errors import check
from .activations import ActivationStats

FIRST = 10
FEW = 10  # lines that matplotlib gives colours of their own
# Rises in lightness, also to the colour-blind; grey is where there is nothing to show.
COLOURMAP = matplotlib.colormaps["viridis"].with_extremes(bad="lightgrey")
FAINTEST = 1e-4


def plot_activations(stats: ActivationStats) -> Figure:
    """The lesson's four plots: means and deviations of each layer over the first ten and over all training batches."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    looked_at = "batches" if stats.every == 1 else "batches looked at"
    for row, (what, series) in enumerate((("mean", stats.means), ("standard deviation", stats.deviations))):
        for column, last in enumerate((FIRST, None)):
            axis = axes[row][column]
            if len(series) > FEW:
                axis.set_prop_cycle(color=COLOURMAP(np.linspace(0, 0.95, len(series))))
            for name, values in series.items():
                axis.plot(stats.steps[:last], values[:last], label=name, linewidth=1)
            span = f"first {FIRST} {looked_at}" if last else "all batches"
            axis.set(title=f"{what}, {span}", xlabel="training batch", ylabel=f"{what} of the output")
    lines, names = axes[0][0].get_legend_handles_labels()
    columns = math.ceil(len(names) / 30)
    figure.legend(lines, names, loc="outside right upper", title="layer", ncols=columns, fontsize="small")
    return figure


def plot_histograms(stats: ActivationStats) -> Figure:
    """The colour picture: a panel for each module, with a histogram of its output as a column for each batch looked at.

    Colour is the share of the finite values, on a log scale. Grey is a batch without any. The outer bins also hold what
    is beyond the axis.

    Raises:
        InputError: nothing is recorded.
    """
    histograms = _shown(stats, stats.histograms)
    columns = min(len(histograms), 4)
    rows = math.ceil(len(histograms) / columns)
    figure = Figure(figsize=(1.5 + 3 * columns, 0.6 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    colours = LogNorm(FAINTEST, 1)
    for axis, (name, counts) in zip(axes.flat, histograms.items(), strict=False):
        totals = np.where(counts.any(1), counts.sum(1), np.nan)
        shares = np.maximum(counts.T / totals, FAINTEST)
        extent = (*_span(stats), -stats.limit, stats.limit)
        axis.imshow(shares, norm=colours, cmap=COLOURMAP, aspect="auto", origin="lower", extent=extent)
        axis.set_title(_title(stats, name), fontsize="medium")
        axis.label_outer()
    for axis in axes.flat[len(histograms) :]:
        axis.remove()
    for axis in axes.flat[max(len(histograms) - columns, 0) : len(histograms)]:
        axis.tick_params(labelbottom=True)
    figure.supxlabel("training batch")
    figure.supylabel("output")
    scale = ScalarMappable(colours, COLOURMAP)
    figure.colorbar(scale, ax=figure.axes, label="share of the values", extend="min", aspect=12 * rows, extendfrac=0.02)
    return figure


def plot_near_zero(stats: ActivationStats) -> Figure:
    """The share of each module's output near zero: a row of colours for each module, a column for each batch looked at.

    The row at the top is next to the input. Grey is a batch without finite values.

    Raises:
        InputError: nothing is recorded.
    """
    shares = _shown(stats, stats.near_zero)
    figure = Figure(figsize=(8, 1.4 + 0.25 * len(shares)), layout="constrained")
    axis = figure.subplots()
    extent = (*_span(stats), len(shares) - 0.5, -0.5)
    finite = [counts.any(1) for counts in _shown(stats, stats.histograms).values()]
    image = axis.imshow(
        np.where(finite, list(shares.values()), np.nan), vmin=0, vmax=1, cmap=COLOURMAP, aspect="auto", extent=extent
    )
    axis.set_yticks(range(len(shares)), [_title(stats, name) for name in shares])
    axis.set(title=f"outputs nearer to zero than {stats.limit / stats.bins:.2g}", xlabel="training batch")
    figure.colorbar(image, label="share of the values", aspect=max(10, len(shares)))
    return figure


def plot_losses(losses: Sequence[float], skip_last: int = 0) -> Figure:
    """Loss of each training batch."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    draw_losses(axis, losses, skip_last)
    return figure


def draw_losses(axis: Axes, losses: Sequence[float], skip_last: int = 0) -> None:
    """The same into an axis."""
    shown = losses[: len(losses) - skip_last]
    axis.plot(range(1, len(shown) + 1), shown, linewidth=0.8)
    axis.set(xlabel="training batch", ylabel="loss")


def draw_rates(axis: Axes, rates: Sequence[float]) -> None:
    """Learning rate of each training batch."""
    axis.plot(range(1, len(rates) + 1), rates)
    axis.set(xlabel="training batch", ylabel="learning rate")


def draw_loss_over_rate(axis: Axes, rates: Sequence[float], losses: Sequence[float], skip_last: int = 0) -> None:
    """Loss over the learning rate on a log scale: what a learning rate finder is read from."""
    n = len(losses) - skip_last
    axis.plot(rates[:n], losses[:n])
    axis.set(xscale="log", xlabel="learning rate", ylabel="loss")


def plot_training(losses: Sequence[float], rates: Sequence[float]) -> Figure:
    """Loss and learning rate over the training batches, beside each other."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_losses(left, losses)
    draw_rates(right, rates)
    return figure


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write the figure as PNG, beside first and then renamed."""
    beside = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(beside, dpi=dpi, format="png")
    beside.replace(path)


def _shown(stats: ActivationStats, series: dict[str, Any]) -> dict[str, Any]:
    skipped = stats.skipped
    shown = {name: values for name, values in series.items() if name not in skipped}
    check(bool(stats.steps and shown), "stats", stats, "statistics of one training batch at least")
    return shown


def _span(stats: ActivationStats) -> tuple[float, float]:
    """Where the batches begin and end: each stands for those from it to the next one looked at."""
    return stats.steps[0] - 0.5, stats.steps[-1] + stats.every - 0.5


def _title(stats: ActivationStats, name: str) -> str:
    kind = type(stats.modules[name]).__name__
    return name if name.endswith(kind) else f"{name} {kind}".strip()

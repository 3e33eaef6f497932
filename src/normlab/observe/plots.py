"""Figures of what was recorded; each function returns a matplotlib Figure, and needs no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .activations import ActivationStats

FIRST = 10


def plot_activations(stats: ActivationStats) -> Figure:
    """The lesson's four plots: means and deviations of each layer over the first ten and over all training batches."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    axes = figure.subplots(2, 2)
    for row, (what, series) in enumerate((("mean", stats.means), ("standard deviation", stats.deviations))):
        for column, last in enumerate((FIRST, None)):
            axis = axes[row][column]
            _lines(axis, {name: values[:last] for name, values in series.items()})
            span = f"first {FIRST} batches" if last else "all batches"
            axis.set(title=f"{what}, {span}", xlabel="training batch", ylabel=f"{what} of the output")
    lines, names = axes[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside right upper", title="layer")
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


def _lines(axis: Axes, series: Mapping[str, Sequence[float]]) -> None:
    for name, values in series.items():
        axis.plot(range(1, len(values) + 1), values, label=name, linewidth=1)

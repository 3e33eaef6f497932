"""A study as a picture: accuracy against batch size, and the training loss of the best runs."""

import io
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from PIL import Image

from ..files import write_whole
from .charts import LARGEST_LOSS, SMALLEST, Series, error_ticks, loss_ticks, series_of
from .record import Record
from .summary import conditions_of, is_number, summarize, values_of, varying


def write_png(records: Iterable[Record], path: str | Path, *, apart: bool = True) -> None:
    """Draw accuracy against batch size, at each norm's best learning rate, and the training loss of those runs.

    The accuracy is drawn by its error on a logarithmic scale: 0.95 and 0.98 lie apart, and 0.1 is still there. Runs
    that diverged are crosses.

    Args:
        records: of a study.
        path: of the picture.
        apart: a line for each of the other settings that vary; else one for each norm, at the best of them all.

    Raises:
        InputError: there are no records, or `path` cannot be written.
    """
    groups = summarize(records)
    series, sizes = series_of(groups, apart), values_of(groups, "batch_size")
    columns = min(len(sizes), 4)
    rows = math.ceil(len(sizes) / columns)
    figure = Figure(figsize=(11, 5.2 + 2.3 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[5.2, 0.3 + 2.3 * rows]).flat
    chosen = {"lr"} if apart else set(varying(groups)) - {"norm", "batch_size"}
    at_best = (
        f", at each norm's best {'learning rate' if apart else 'setting'}" if chosen & set(varying(groups)) else ""
    )
    above.suptitle(f"Validation accuracy{at_best}", x=0.01, ha="left", weight="bold")
    _draw_accuracy(above.subplots(), series, sizes)
    below.suptitle("Training loss of the same runs (×: diverged)", x=0.01, ha="left", weight="bold")
    panels = below.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, size in itertools.zip_longest(panels.flat, sizes):
        if size:
            _draw_curves(axes, series, size)
        else:
            axes.set_axis_off()
    figure.supxlabel(conditions_of(groups), fontsize=8, color="#555555")
    save_figure(figure, Path(path))


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in 256 colours, which a chart does not exceed by much: a third of the bytes."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=130)
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    write_whole(path, small.getvalue())


def _draw_accuracy(axes: Axes, series: list[Series], sizes: list[int]) -> None:
    ticks = error_ticks([group for line in series for group in line.groups])
    low, high = ticks[0], ticks[-1]
    strip = (high / low) ** 0.06  # half the height of the strip for runs without a result
    lost = any(group.diverged_at or group.errors for line in series for group in line.groups)
    for number, line in enumerate(series):
        shift = 0.4 * ((number + 0.5) / len(series) - 0.5)
        found = [(place + shift, line.best(size)) for place, size in enumerate(sizes)]
        points = [(x, group) for x, group in found if group]
        errors = [_error(group.value.mean) if group.value else math.nan for _, group in points]
        deviations = [group.value.std or 0.0 if group.value else 0.0 for _, group in points]
        axes.errorbar(
            [x for x, _ in points], errors, yerr=deviations, label=line.label.replace("$", r"\$"), color=line.colour,
            marker=line.marker, linestyle=line.dash, markersize=6, linewidth=1.5, capsize=3, elinewidth=1,
        )  # fmt: skip
        for x, group in points:
            count = len(group.diverged_at) + len(group.errors)
            if count:
                axes.plot(x, high * strip, marker="x", color=line.colour, markersize=7, markeredgewidth=2)
            if 0 < count < len(group.records):
                axes.annotate(f"{count}/{len(group.records)}", (x, high * strip), (0, -13), textcoords="offset points",
                              ha="center", fontsize=7, color=line.colour)  # fmt: skip
    axes.set_ylim(high * strip**2 if lost else high, low)
    axes.set_yscale("log")
    labels = [f"{1 - tick:g}" for tick in ticks]
    if lost:
        axes.axhspan(high, high * strip**2, color="#eeeeee", zorder=0)
        ticks, labels = [*ticks, high * strip], [*labels, "no result"]
    axes.set_yticks(ticks, labels)
    axes.set_yticks([], minor=True)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("batch size")
    axes.set_ylabel("accuracy (error on a log scale)")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _plain(axes)


def _draw_curves(axes: Axes, series: list[Series], size: int) -> None:
    ticks = loss_ticks([group for line in series for group in line.groups])
    for line in series:
        group = line.best(size)
        for record in group.records if group else ():
            points = [(x, min(max(y, SMALLEST), LARGEST_LOSS)) for x, y in record.losses if is_number(y)]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), color=line.colour, linestyle=line.dash, linewidth=1.1, alpha=0.8)
            if record.status == "diverged":
                axes.plot(*points[-1], marker="x", color=line.colour, markersize=7, markeredgewidth=2, clip_on=False)
    axes.set_title(f"batch size {size}", fontsize=10)
    axes.set_ylim(ticks[0], ticks[-1])
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("step")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _error(accuracy: float) -> float:
    return max(1 - accuracy, SMALLEST)

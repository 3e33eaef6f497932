"""A study as pictures: the metric against batch size, the maps of rates, training losses, activations by layer."""

import io
import itertools
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter
from PIL import Image

from ..errors import check
from ..files import write_whole
from .charts import (
    Axis,
    Series,
    cut,
    drawn_runs,
    layer_axes,
    layers_of,
    loss_axis,
    lost_of,
    metric_axis,
    series_of,
    warmth_of,
)
from .record import Record
from .summary import Group, conditions_of, is_number, show, summarize, values_of, varying
from .verdicts import conclusions, interval_of, method_of

FORMATS = ("png", "svg", "pdf")
STRIP = 0.12  # height of the strip for runs without a result, of the chart's
SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,  # names may have a $
    "svg.hashsalt": "normlab",  # the same file each time
    "pdf.fonttype": 42,  # journals refuse the outlines of type 3
}
MOST = 50  # curves of a setting; more cannot be told apart
MOST_SAID = 8  # batch sizes of which the caption says what is told apart
DPI = 130
WIDTH = 7.0  # inches, of a page's two columns


def write_png(records: Iterable[Record], path: str | Path, *, apart: bool = True) -> None:
    """Draw the metric against batch size, at each norm's best learning rate, and the training loss of those runs.

    A metric near one is drawn by its error on a logarithmic scale: 0.95 and 0.98 lie apart, and 0.1 is still there.
    Bars are 95 % intervals of the mean. Runs that diverged are crosses. The caption says what is told apart.

    Args:
        records: of a study.
        path: of the picture.
        apart: a line for each of the other settings that vary; else one for each norm, at the best of them all.

    Raises:
        InputError: there are no records, or `path` cannot be written.
    """
    draw_png(summarize(records), path, apart)


def draw_png(groups: Sequence[Group], path: str | Path, apart: bool = True) -> None:
    """The picture of `write_png`, of groups."""
    with _settings():
        said = [conditions_of(groups), *conclusions(groups)[:MOST_SAID], method_of(groups)]
        caption = [line for text in said for line in textwrap.wrap(cut(text, 400), 190)]
        heights = [5.2, _curves_height(groups, 11)]
        figure = Figure(figsize=(11, sum(heights) + 0.15 * len(caption)), layout="constrained")
        above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=heights).flat
        _draw_metric(above, groups, apart)
        _draw_curves(below, groups, apart)
        figure.supxlabel("\n".join(caption), fontsize=8, color="#555555", x=0.01, ha="left")
        save_figure(figure, Path(path))


def write_figures(records: Iterable[Record], folder: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write each figure of a study for itself, as a paper needs them. Equal records give equal files.

    The figures are `metric`, against batch size; `rates`, a map of learning rates for each norm, if several were
    tried; `curves`, the training losses; `layers`, the activations by layer, if the runs kept them.

    Args:
        records: of a study.
        folder: of the files; it is made if it is not there.
        formats: of `png`, `svg` and `pdf`.

    Returns:
        The files, such as `metric.svg`.

    Raises:
        InputError: there are no records, a format is another one, or the folder cannot be written.

    Example:
        >>> from normlab.study.store import RunStore
        >>> write_figures(RunStore("runs/study/runs.jsonl").read(), "paper/figures", ["pdf"])  # doctest: +SKIP
    """
    for one in formats:
        check(one in FORMATS, "formats", one, ", ".join(FORMATS))
    groups = summarize(records)
    figures: dict[str, tuple[float, Callable[[Figure, Sequence[Group]], None]]] = {
        "metric": (3.6, _draw_metric),
        "curves": (_curves_height(groups, WIDTH), _draw_curves),
    }
    if len(values_of(groups, "lr")) > 1:
        figures["rates"] = _rates_height(groups), _draw_rates
    if layer_axes(groups):
        figures["layers"] = 0.5 + 2.0 * len(values_of(groups, "batch_size")), _draw_layers
    paths = []
    for name, (height, draw) in figures.items():
        with _settings(), matplotlib.rc_context({"font.size": 8, "lines.markersize": 4.5}):
            figure = Figure(figsize=(WIDTH, height), layout="constrained")
            draw(figure, groups)
            for one in formats:
                paths.append(Path(folder) / f"{name}.{one}")
                save_figure(figure, paths[-1])
    return paths


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as its name ends: png, svg or pdf. A PNG has 256 colours, which makes a third of the bytes."""
    kind = path.suffix.removeprefix(".")
    content = io.BytesIO()
    with _settings():
        if kind in ("svg", "pdf"):
            # No date: the same figure is the same file.
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}[kind]
            figure.savefig(content, format=kind, dpi=DPI, metadata=metadata)
        else:
            figure.set_dpi(DPI)
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            full = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
            full.quantize(256, dither=Image.Dither.NONE).save(content, "PNG", optimize=True)
    write_whole(path, content.getvalue())


@contextmanager
def _settings() -> Iterator[None]:
    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # names in other scripts
        yield


def _title(figure: Figure | SubFigure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", weight="bold")


def _draw_metric(figure: Figure | SubFigure, groups: Sequence[Group], apart: bool = True) -> None:
    axis, series, sizes = metric_axis(groups), series_of(groups, apart), values_of(groups, "batch_size")
    axes = figure.subplots()
    lost = False
    for number, line in enumerate(series):
        shift = 0.6 * ((number + 0.5) / len(series) - 0.5)
        found = [(place + shift, line.best(size)) for place, size in enumerate(sizes)]
        points = [(x, group) for x, group in found if group]
        lost = lost or any(lost_of(group) for _, group in points)
        _draw_line(axes, line, points, axis)
    axes.set_ylim(-STRIP if lost else 0, 1)
    ticks, labels = [axis.share(tick) for tick, _ in axis.ticks], [label for _, label in axis.ticks]
    if lost:
        axes.axhspan(-STRIP, 0, color="#eeeeee", zorder=0)
        ticks, labels = [*ticks, -STRIP / 2], [*labels, "no result"]
    axes.set_yticks(ticks, labels)
    axes.set_xlim(-0.6, len(sizes) - 0.4)
    axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
    axes.set_xlabel("batch size")
    scale = {"error": " (error on a log scale)", "log": " (log scale)", "linear": ""}[axis.kind]
    less = ", less is better" if groups[0].lower else ""
    axes.set_ylabel(f"{cut(axis.title, 40)}{scale}{less}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _plain(axes)
    _title(figure, f"Validation {cut(axis.title, 40)}{_at_best(groups, apart)}")


def _draw_line(axes: Axes, line: Series, points: list[tuple[float, Group]], axis: Axis) -> None:
    means = [axis.share(group.value.mean) if group.value else math.nan for _, group in points]
    ends = [
        [axis.share(end) for end in interval] if (interval := interval_of(group)) else [mean, mean]
        for mean, (_, group) in zip(means, points, strict=True)
    ]
    # Of equal values, the ends and the mean may differ by a rounding error, either way.
    bars = [[max(mean - low, 0.0) for mean, (low, _) in zip(means, ends, strict=True)],
            [max(high - mean, 0.0) for mean, (_, high) in zip(means, ends, strict=True)]]  # fmt: skip
    axes.errorbar(
        [x for x, _ in points], means, yerr=bars, label=cut(line.label, 40), color=line.colour,
        marker=line.marker, linestyle=line.dash, linewidth=1.5, capsize=3, elinewidth=1,
    )  # fmt: skip
    for x, group in points:
        if group.stopped and group.value:
            place = x, axis.share(group.value.mean)
            axes.annotate(group.made, place, (0, 7), textcoords="offset points", ha="center", fontsize=7)
        if lost_of(group):
            axes.plot(x, -STRIP / 2, marker="x", color=line.colour, markersize=7, markeredgewidth=2)
        if 0 < lost_of(group) < len(group.records):
            axes.annotate(
                f"{lost_of(group)}/{len(group.records)}", (x, -STRIP / 2), (0, -13), textcoords="offset points",
                ha="center", fontsize=7, color=line.colour,
            )  # fmt: skip


def _curves_height(groups: Sequence[Group], width: float) -> float:
    return 0.4 + 2.3 * math.ceil(len(values_of(groups, "batch_size")) / _columns(groups, width))


def _columns(groups: Sequence[Group], width: float) -> int:
    return min(len(values_of(groups, "batch_size")), round(width / 2.6))


def _draw_curves(figure: Figure | SubFigure, groups: Sequence[Group], apart: bool = True) -> None:
    axis, series, sizes = loss_axis(groups), series_of(groups, apart), values_of(groups, "batch_size")
    drawn = {record.key for record in drawn_runs(groups)}
    columns = _columns(groups, figure.get_figure(root=True).get_figwidth())
    panels = figure.subplots(math.ceil(len(sizes) / columns), columns, sharey=True, squeeze=False)
    for axes, size in itertools.zip_longest(panels.flat, sizes):
        if not size:
            axes.set_axis_off()
            continue
        for line in series:
            group = line.best(size)
            if group:
                _draw_losses(axes, line, group, axis, drawn)
        axes.set_title(f"batch size {size}", fontsize="medium")
        axes.autoscale_view()
        _set_axis(axes, axis)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("step")
    _title(figure, f"Training loss{_at_best(groups, apart)} (×: diverged)")
    if isinstance(figure, Figure):
        _legend(figure, series)


def _draw_losses(axes: Axes, line: Series, group: Group, axis: Axis, drawn: set[str]) -> None:
    curves = {record.key: _curve(record, axis) for record in group.records[:MOST] if record.key in drawn}
    style: dict[str, Any] = {"color": line.colour, "linestyle": line.dash, "linewidth": 1.1, "alpha": 0.8}
    axes.add_collection(LineCollection([curve for curve in curves.values() if len(curve)], **style))
    lost = {record.key for record in group.records if record.status == "diverged"}
    for key, curve in curves.items():
        if key in lost and len(curve):
            axes.plot(*curve[-1], marker="x", color=line.colour, markersize=7, markeredgewidth=2, clip_on=False)


def _curve(record: Record, axis: Axis) -> np.ndarray:
    """The points of the training loss, those that are not finite left out."""
    losses = np.array(record.curve["loss"], dtype=float)
    points = np.column_stack([record.curve["step"], axis.shares(losses)])
    return points[np.isfinite(losses)]


def _rates_height(groups: Sequence[Group]) -> float:
    rows = math.ceil(len(series_of(groups)) / 2)
    return 0.4 + rows * (0.55 + 0.34 * len(values_of(groups, "lr")))


def _draw_rates(figure: Figure, groups: Sequence[Group]) -> None:
    series, sizes, rates = series_of(groups), values_of(groups, "batch_size"), values_of(groups, "lr")
    axis = metric_axis(groups)
    warmth = warmth_of(groups, axis)
    panels = figure.subplots(math.ceil(len(series) / 2), min(len(series), 2), squeeze=False)
    for axes, line in itertools.zip_longest(panels.flat, series):
        if not line:
            axes.set_axis_off()
            continue
        for group in line.groups:
            x, y = sizes.index(group.settings["batch_size"]), rates.index(group.settings["lr"])
            lost = "" if group.value else "///"
            axes.add_patch(Rectangle(
                (x - 0.5, y - 0.5), 1, 1, facecolor=("#0072B2", 0.6 * warmth(group)), edgecolor="#bbbbbb", hatch=lost,
                linewidth=0.5,
            ))  # fmt: skip
            axes.text(x, y, _cell(group), ha="center", va="center", fontsize=6)
        axes.set_xlim(-0.5, len(sizes) - 0.5)
        axes.set_ylim(-0.5, len(rates) - 0.5)
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.set_yticks(range(len(rates)), [show("lr", rate) for rate in rates])
        axes.set_xlabel("batch size")
        axes.set_ylabel("learning rate")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(cut(line.label, 40), fontsize="medium")
    _title(figure, f"Validation {cut(axis.title, 40)}: mean and 95 % interval (×: diverged or failed)")


def _cell(group: Group) -> str:
    mean = f"{group.value.mean:#.3g}" if group.value else ""
    lost = f" ×{lost_of(group)}" if lost_of(group) else ""
    ends = "\n{:#.3g} to {:#.3g}".format(*interval) if (interval := interval_of(group)) else ""
    stopped = f"\nstopped, {group.made}" if group.stopped else ""
    return f"{mean}{lost}{ends}{stopped}".strip()


def _draw_layers(figure: Figure, groups: Sequence[Group]) -> None:
    axes_of, series, sizes = layer_axes(groups), series_of(groups), values_of(groups, "batch_size")
    panels = figure.subplots(len(sizes), len(axes_of), sharex=True, squeeze=False)
    for row, size in zip(panels, sizes, strict=True):
        for axes, (figure_name, axis) in zip(row, axes_of.items(), strict=True):
            for line in series:
                group = line.best(size)
                for record in group.records[:MOST] if group else ():
                    values = list(layers_of(record).get(figure_name, {}).values())
                    heights = [axis.share(value) if is_number(value) else math.nan for value in values]
                    axes.plot(heights, color=line.colour, linestyle=line.dash, linewidth=1.1, alpha=0.8)
            axes.set_title(f"batch size {size}: {axis.title}", fontsize="medium")
            _set_axis(axes, axis)
    names = max(
        (list(one) for group in groups for record in group.records for one in layers_of(record).values()), key=len
    )
    for axes in panels[-1]:
        axes.set_xticks(range(len(names)), [cut(name, 16) for name in names], rotation=45, ha="right")
        axes.set_xlabel("layer")
    _title(figure, f"Activations at the end of training{_at_best(groups, True)}")
    _legend(figure, series)


def _legend(figure: Figure, series: list[Series]) -> None:
    lines = [Line2D([], [], color=line.colour, ls=line.dash) for line in series]  # pyright: ignore
    figure.legend(lines, [cut(line.label, 40) for line in series], loc="outside right upper", frameon=False)


def _at_best(groups: Sequence[Group], apart: bool) -> str:
    """Says that the best of several settings are shown, if there are several."""
    chosen = {"lr"} if apart else set(varying(groups)) - {"norm", "batch_size"}
    return f", at each norm's best {'learning rate' if apart else 'setting'}" if chosen & set(varying(groups)) else ""


def _set_axis(axes: Axes, axis: Axis) -> None:
    axes.set_ylim(0, 1)
    axes.set_yticks([axis.share(tick) for tick, _ in axis.ticks], [label for _, label in axis.ticks])
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

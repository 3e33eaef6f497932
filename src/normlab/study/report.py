"""Shows a study: a table for the terminal, a picture, and one page that needs nothing but itself."""

import contextlib
import io
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from .store import Record
from .summary import SETTINGS, Group, best, final, is_number, latest, sort_key, summarize, varying

STATUSES = ("finished", "diverged", "failed")
TITLES = {"batch_size": "batch size", "lr": "learning rate"}
COLOURS = {  # told apart by the colour-blind, on white and on black
    "running": "#0072B2",
    "batch": "#D55E00",
    "group": "#009E73",
    "layer": "#CC79A7",
    "instance": "#C80046",
    "rms": "#2F9BDB",
    "renorm": "#8844DD",
    "none": "#8A8A8A",
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
    """One line of a chart: a norm, with the settings that vary other than batch size and learning rate."""

    label: str
    colour: str
    marker: str
    dash: str
    groups: tuple[Group, ...]

    def best(self, batch_size: int) -> Group | None:
        """The group with the best learning rate at this batch size."""
        return best(group for group in self.groups if group.settings["batch_size"] == batch_size)


def terminal_table(records: Iterable[Record]) -> Table:
    """Validation accuracy, norms and learning rates down, batch sizes across; the best of each column stands out.

    Raises:
        InputError: there are no records.
    """
    groups = _groups(records)
    names = ["norm", *(name for name in varying(groups) if name not in ("norm", "batch_size"))]
    leaders = {
        size: best(group for group in groups if group.settings["batch_size"] == size)
        for size in _values(groups, "batch_size")
    }
    table = Table(caption=_conditions(groups), caption_justify="left")
    for name in names:
        table.add_column(TITLES.get(name, name))
    for size in leaders:
        table.add_column(f"batch {size}", justify="right")
    rows: dict[tuple, dict[int, Group]] = {}
    for group in groups:
        rows.setdefault(tuple(group.settings[name] for name in names), {})[group.settings["batch_size"]] = group
    for values in sorted(rows, key=lambda values: [sort_key(value) for value in values]):
        titles = [Text(_show(name, value)) for name, value in zip(names, values, strict=True)]
        table.add_row(*titles, *(_cell(rows[values].get(size), leader) for size, leader in leaders.items()))
    return table


def write_png(records: Iterable[Record], path: str | Path) -> None:
    """Draw accuracy against batch size, at each norm's best learning rate, and the training loss of those runs.

    The accuracy is drawn by its error on a logarithmic scale, so that .95 and .98 lie apart and .1 is still there.
    Runs that diverged are crosses.

    Raises:
        InputError: there are no records, or `path` cannot be written.
    """
    groups = _groups(records)
    series, sizes = _series(groups), _values(groups, "batch_size")
    columns = min(len(sizes), 4)
    rows = math.ceil(len(sizes) / columns)
    figure = Figure(figsize=(11, 5.2 + 2.3 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, squeeze=False, height_ratios=[5.2, 0.3 + 2.3 * rows]).flat
    at_best = ", at each norm's best learning rate" if len(_values(groups, "lr")) > 1 else ""
    above.suptitle(f"Validation accuracy{at_best}", x=0.01, ha="left", weight="bold")
    _draw_accuracy(above.subplots(), series, sizes)
    below.suptitle("Training loss of the same runs (×: diverged)", x=0.01, ha="left", weight="bold")
    panels = below.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, size in itertools.zip_longest(panels.flat, sizes):
        if size:
            _draw_curves(axes, series, size)
        else:
            axes.set_axis_off()
    figure.supxlabel(_conditions(groups), fontsize=8, color="#555555")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    _replace(Path(path), buffer.getvalue())


def write_html(records: Iterable[Record], path: str | Path, title: str, command: str) -> None:
    """Write the whole study as one page that loads nothing: tables, charts, every run, and how to repeat it.

    Args:
        records: as a `RunStore` keeps them.
        path: of the page.
        title: its heading.
        command: the command line that makes these runs again.

    Raises:
        InputError: there are no records, or `path` cannot be written.
    """
    records = latest(records)
    groups = _groups(records)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    statuses = Counter(record["status"] for record in records)
    names = varying(groups) or ["norm"]
    page = environment.get_template("report.html.j2").render(
        title=title,
        command=command,
        conditions=_conditions(groups),
        counts=", ".join(f"{statuses[status]} {status}" for status in STATUSES if statuses[status]),
        columns=[TITLES.get(name, name) for name in names],
        rows=[[*(_show(name, group.settings[name]) for name in names), group.outcome] for group in groups],
        seeds=_seeds(groups),
        environments=sorted({_environment(record) for record in records}),
        data=_page_data(groups),
    )
    _replace(Path(path), page.encode())


def _groups(records: Iterable[Record]) -> list[Group]:
    groups = summarize(records)
    if not groups:
        raise InputError("There is nothing to report: no run has ended yet.")
    return groups


def _series(groups: list[Group]) -> list[Series]:
    """The lines of the charts: a norm has one colour and marker, its variants differ in the dash."""
    others = [name for name in varying(groups) if name not in ("norm", "batch_size", "lr")]
    norms = _values(groups, "norm")
    styles = _styles(norms)
    variants = sorted({tuple((name, group.settings[name]) for name in others) for group in groups}, key=str)
    series = []
    for norm, (variant, dash) in itertools.product(norms, zip(variants, itertools.cycle(DASHES), strict=False)):
        shared = {"norm": norm, **dict(variant)}
        members = tuple(group for group in groups if shared.items() <= group.settings.items())
        if members:
            label = ", ".join([norm, *(f"{TITLES.get(name, name)} {_show(name, value)}" for name, value in variant)])
            series.append(Series(label, *styles[norm], dash, members))
    return series


def _styles(norms: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each norm: always the same for those of `COLOURS`, what is left for others."""
    markers = itertools.cycle(MARKERS)
    styles = {norm: (colour, next(markers)) for norm, colour in COLOURS.items()}
    left = itertools.cycle([colour for norm, colour in COLOURS.items() if norm not in norms] or COLOURS.values())
    return {norm: styles.get(norm) or (next(left), next(markers)) for norm in norms}


def _draw_accuracy(axes: Axes, series: list[Series], sizes: list[int]) -> None:
    ticks = _error_ticks([group for line in series for group in line.groups])
    low, high = ticks[0], ticks[-1]
    strip = (high / low) ** 0.06  # half the height of the strip for runs without a result
    lost = any(group.diverged_at or group.errors for line in series for group in line.groups)
    for number, line in enumerate(series):
        shift = 0.4 * ((number + 0.5) / len(series) - 0.5)
        found = [(place + shift, line.best(size)) for place, size in enumerate(sizes)]
        points = [(x, group) for x, group in found if group]
        errors = [_error(group.accuracy.mean) if group.accuracy else math.nan for _, group in points]
        deviations = [group.accuracy.std or 0.0 if group.accuracy else 0.0 for _, group in points]
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
    ticks = _loss_ticks([group for line in series for group in line.groups])
    for line in series:
        group = line.best(size)
        for record in group.records if group else ():
            points = [(x, min(max(y, SMALLEST), LARGEST_LOSS)) for x, y in _curve(record) if is_number(y)]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), color=line.colour, linestyle=line.dash, linewidth=1.1, alpha=0.8)
            if record["status"] == "diverged":
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


def _page_data(groups: list[Group]) -> dict[str, Any]:
    """What the page's script draws, kept small: each list of steps is there once, and numbers are rounded."""
    steps: dict[tuple[int, ...], int] = {}
    rows, runs = [], []
    for line in _series(groups):
        for group in line.groups:
            runs += [_run(record, len(rows), steps) for record in group.records]
            rows.append(_row(group, line))
    filters = ["norm", "batch_size", "lr", *(n for n in varying(groups) if n not in ("norm", "batch_size", "lr"))]
    return {
        "filters": [{"name": n, "title": TITLES.get(n, n), "values": _values(groups, n)} for n in filters],
        "groups": rows,
        "runs": runs,
        "steps": list(steps),
        "error_ticks": _error_ticks(groups),
        "loss_ticks": _loss_ticks(groups),
    }


def _row(group: Group, line: Series) -> dict[str, Any]:
    return {
        "settings": group.settings,
        "series": line.label,
        "colour": line.colour,
        "shape": MARKERS[line.marker],
        "dash": DASHES[line.dash],
        "seeds": [record["settings"]["seed"] for record in group.records],
        "accuracy": _digits(group.accuracy.mean) if group.accuracy else None,
        "deviation": _digits(group.accuracy.std) if group.accuracy else None,
        "loss": _digits(group.loss.mean) if group.loss else None,
        "milliseconds": _digits(1000 * group.seconds_per_step) if group.seconds_per_step else None,
        "diverged_at": group.diverged_at,
        "errors": group.errors,
        "trains": group.trains,
        "score": group.score,
        "outcome": group.outcome,
    }


def _run(record: Record, group: int, steps: dict[tuple[int, ...], int]) -> dict[str, Any]:
    points = _curve(record)
    return {
        "group": group,
        "seed": record["settings"]["seed"],
        "status": record["status"],
        "diverged_at": record.get("diverged_at_step"),
        "error": record.get("error"),
        "accuracy": _digits(final(record, "accuracy")),
        "loss": _digits(final(record, "loss")),
        "by_epoch": [_digits((epoch.get("valid") or {}).get("accuracy")) for epoch in record.get("epochs") or []],
        "parameters": record.get("parameters"),
        "steps": record.get("steps"),
        "seconds": _digits(record.get("seconds")),
        "finished_at": record.get("finished_at"),
        "versions": _versions(record),
        "curve_steps": steps.setdefault(tuple(x for x, _ in points), len(steps)),
        "curve": [_digits(y, 3) for _, y in points],
    }


def _conditions(groups: list[Group]) -> str:
    """The settings that all runs share, and their seeds, in a line."""
    names = [name for name in SETTINGS if name not in (*varying(groups), "norm", "batch_size")]
    shared = [f"{TITLES.get(name, name)} {_show(name, groups[0].settings[name])}" for name in names]
    many = any(len(group.records) > 1 for group in groups)
    return "; ".join([*shared, _seeds(groups)]) + (". Mean ± sample standard deviation." if many else ".")


def _seeds(groups: list[Group]) -> str:
    seeds = sorted({record["settings"]["seed"] for group in groups for record in group.records})
    return ("seeds " if len(seeds) > 1 else "seed ") + ", ".join(map(str, seeds))


def _environment(record: Record) -> str:
    machine = record.get("machine") or {}
    return f"{machine.get('cpu', 'unknown processor')}, threads {machine.get('threads', '?')}; {_versions(record)}"


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in (record.get("versions") or {}).items())


def _curve(record: Record) -> list[tuple[int, float | None]]:
    curve = record.get("curve") or {"step": [], "loss": []}
    return list(zip(curve["step"], curve["loss"], strict=True))


def _values(groups: list[Group], name: str) -> list[Any]:
    return sorted({group.settings[name] for group in groups}, key=sort_key)


def _cell(group: Group | None, leader: Group | None) -> Text:
    if group is None:
        return Text("–", style="dim")
    if group is leader and group.trains:
        return Text(group.outcome, style="bold green")
    return Text(group.outcome, style="" if group.trains else "red")


def _show(name: str, value: Any) -> str:
    if value is None:
        return "all" if name == "images" else "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _error(accuracy: float) -> float:
    return max(1 - accuracy, SMALLEST)


def _error_ticks(groups: list[Group]) -> list[float]:
    return _ticks((1 - group.accuracy.mean for group in groups if group.accuracy), 1.0, (1, 2, 3, 5, 7))


def _loss_ticks(groups: list[Group]) -> list[float]:
    losses = (loss for group in groups for record in group.records for _, loss in _curve(record))
    return _ticks((loss for loss in losses if is_number(loss)), LARGEST_LOSS, (1, 2, 5))


def _ticks(values: Iterable[float], largest: float, digits: tuple[int, ...]) -> list[float]:
    """The `digits` times a power of ten, from just below `values` to just above."""
    within = [round(min(max(value, SMALLEST), largest), 6) for value in values] or [largest]
    ticks = [round(digit * 10.0**power, 5) for power in range(-5, 2) for digit in digits]
    below = max(tick for tick in ticks if tick < min(within))
    above = min(tick for tick in ticks if tick >= max(within))
    return [tick for tick in ticks if below <= tick <= above]


def _digits(value: float | None, digits: int = 5) -> float | None:
    return float(f"{value:.{digits}g}") if is_number(value) else None


def _replace(path: Path, content: bytes) -> None:
    """Write beside, then rename, so that a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose another folder.") from error

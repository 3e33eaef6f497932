"""A study as one page that needs nothing but itself: tables, charts, every run, and how to repeat it."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader

from ..files import write_whole
from .charts import DASHES, MARKERS, Series, error_ticks, loss_ticks, series_of
from .record import Record, Status
from .summary import (
    Group,
    conditions_of,
    is_number,
    latest,
    seeds_of,
    show,
    summarize,
    title_of,
    values_of,
    varying,
)


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
    groups = summarize(records)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    statuses = Counter(record.status for record in records)
    names = varying(groups) or ["norm"]
    page = environment.get_template("report.html.j2").render(
        title=title,
        command=command,
        conditions=conditions_of(groups),
        counts=", ".join(f"{statuses[status]} {status}" for status in get_args(Status) if statuses[status]),
        columns=[title_of(name) for name in names],
        rows=[[*(show(name, group.settings[name]) for name in names), group.outcome] for group in groups],
        seeds=seeds_of(groups),
        environments=sorted({_environment(record) for record in records}),
        data=_page_data(groups),
    )
    write_whole(Path(path), page.encode())


def _page_data(groups: list[Group]) -> dict[str, Any]:
    """What the page's script draws, kept small: each list of steps is there once, and numbers are rounded."""
    steps: dict[tuple[int, ...], int] = {}
    rows, runs = [], []
    for line in series_of(groups):
        for group in line.groups:
            runs += [_run(record, len(rows), steps) for record in group.records]
            rows.append(_row(group, line))
    filters = ["norm", "batch_size", "lr", *(n for n in varying(groups) if n not in ("norm", "batch_size", "lr"))]
    return {
        "filters": [{"name": n, "title": title_of(n), "values": values_of(groups, n)} for n in filters],
        "groups": rows,
        "runs": runs,
        "steps": list(steps),
        "error_ticks": error_ticks(groups),
        "loss_ticks": loss_ticks(groups),
    }


def _row(group: Group, line: Series) -> dict[str, Any]:
    return {
        "settings": group.settings,
        "series": line.label,
        "colour": line.colour,
        "shape": MARKERS[line.marker],
        "dash": DASHES[line.dash],
        "seeds": [record.settings["seed"] for record in group.records],
        "accuracy": _digits(group.value.mean) if group.value else None,
        "deviation": _digits(group.value.std) if group.value else None,
        "loss": _digits(group.loss.mean) if group.loss else None,
        "milliseconds": _digits(1000 * group.seconds_per_step) if group.seconds_per_step else None,
        "diverged_at": group.diverged_at,
        "errors": group.errors,
        "trains": group.trains,
        "score": group.score,
        "outcome": group.outcome,
    }


def _run(record: Record, group: int, steps: dict[tuple[int, ...], int]) -> dict[str, Any]:
    points = record.losses
    return {
        "group": group,
        "seed": record.settings["seed"],
        "status": record.status,
        "diverged_at": record.diverged_at_step,
        "error": record.error,
        "accuracy": _digits(record.final("accuracy")),
        "loss": _digits(record.final("loss")),
        "by_epoch": [_digits(accuracy) for accuracy in record.by_epoch("accuracy")],
        "parameters": record.parameters,
        "steps": record.steps,
        "seconds": _digits(record.seconds),
        "finished_at": record.finished_at,
        "versions": _versions(record),
        "curve_steps": steps.setdefault(tuple(x for x, _ in points), len(steps)),
        "curve": [_digits(y, 3) for _, y in points],
    }


def _environment(record: Record) -> str:
    cpu, threads = record.machine.get("cpu", "unknown processor"), record.machine.get("threads", "?")
    return f"{cpu}, threads {threads}; {_versions(record)}"


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())


def _digits(value: float | None, digits: int = 5) -> float | None:
    return float(f"{value:.{digits}g}") if is_number(value) else None

"""A study as one page that needs nothing but itself: tables, charts, every run, and how to repeat it."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_args

from jinja2 import Environment, FileSystemLoader

from ..files import write_whole
from .charts import (
    DASHES,
    LARGEST,
    MARKERS,
    MOST_LINES,
    Axis,
    Series,
    drawn_runs,
    layer_axes,
    layers_of,
    loss_axis,
    metric_axis,
    series_of,
    warmth_of,
)
from .plan import Trial
from .record import Record, Status
from .summary import (
    Group,
    conditions_of,
    is_number,
    seeds_of,
    show,
    summarize,
    title_of,
    values_of,
    varying,
)
from .verdicts import Verdict, compare_groups, conclusions, interval_of, method_of

ALWAYS = ("norm", "batch_size", "lr")  # settings that the page filters by, with those that vary
ALWAYS_SAID = (*ALWAYS, "seed")  # in a command
AGAINST = "against the best"
SCALES = {
    "error": "The scale is logarithmic in the error, one minus the value: small differences near 1 can be seen.",
    "log": "The scale is logarithmic.",
    "linear": "",
}

Steps = dict[tuple[int, ...], int]
Names = dict[tuple[str, ...], int]


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
    write_whole(Path(path), make_html(summarize(records), title, command).encode(errors="replace"))


def make_html(
    groups: Sequence[Group], title: str, command: str, *, counts: Mapping[Any, int] | None = None, live: str = ""
) -> str:
    """The page that `write_html` writes.

    Args:
        groups: of the study.
        title: its heading.
        command: the command line that makes these runs again.
        counts: how many runs are in each state, where some have not ended; by default those of `records`.
        live: the state of the store, as its ETag, where the page asks the address it came from for news: see `watch`.
    """
    axis = metric_axis(groups)
    records = [record for group in groups for record in group.records]
    stopped = [record for group in groups for record in group.stopped]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "page"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    names = varying(groups) or ["norm"]
    verdicts = {id(verdict.group): verdict for verdict in compare_groups(groups) if verdict.rivals}
    data = _page_data(groups, axis, verdicts)
    return environment.get_template("report.html.j2").render(
        title=title,
        command=command,
        conditions=conditions_of(groups),
        counts=", ".join(f"{count} {state}" for state, count in (counts or _counts(records + stopped)).items()),
        live=bool(live),
        metric=axis.title,
        less=any(group.lower for group in groups),
        scale=SCALES[axis.kind],
        many_rates=len(values_of(groups, "lr")) > 1,
        few_lines=len(records) > MOST_LINES,
        has_layers=bool(data["layer_axes"]),
        columns=[*(title_of(name) for name in names), axis.title, AGAINST],
        rows=[
            [*(show(name, group.settings[name]) for name in names), group.outcome, _words(verdicts.get(id(group)))]
            for group in groups
        ],
        conclusions=conclusions(groups),
        method=method_of(groups),
        seeds=seeds_of(groups),
        environments=sorted({_environment(record) for record in records}),
        some_stopped=bool(stopped),
        data={**data, "live": live},
    )


def command_of(trial: Trial) -> str:
    """The command line that makes one run again, with its activations and weights.

    Args:
        trial: the settings of the run.

    Returns:
        The command; empty for the run of a `task`, which its own study makes.

    Example:
        >>> command_of(Trial(norm="group", batch_size=1, lr=0.1, clip=1.0, seed=3))
        'normlab train --norm group --batch-size 1 --lr 0.1 --clip 1.0 --seed 3'
    """
    if trial.task is not None:
        return ""
    words = ["normlab", "train"]
    said = [name for name in ALWAYS_SAID if name != "seed"]
    others = [
        field.name for field in fields(Trial)
        if field.name not in (*ALWAYS_SAID, "task") and getattr(trial, field.name) != field.default
    ]  # fmt: skip
    for name in (*said, *others, "seed"):
        value = getattr(trial, name)
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        else:
            words += [option, *(value if isinstance(value, tuple) else [str(value)])]
    return shlex.join(words)


def _counts(records: list[Record]) -> dict[str, int]:
    found = Counter(record.status for record in records)
    return {status: found[status] for status in get_args(Status) if found[status]}


def _page_data(groups: Sequence[Group], axis: Axis, verdicts: dict[int, Verdict]) -> dict[str, Any]:
    """What the page's script draws, kept small: each list of steps is there once, and numbers are rounded."""
    steps: Steps = {}
    layers: Names = {}
    axes, warmth = layer_axes(groups), warmth_of(groups, axis)
    others = list(dict.fromkeys(name for group in groups for name in _other_metrics(group)))
    filters = {name: values_of(groups, name) for name in (*ALWAYS, *(n for n in varying(groups) if n not in ALWAYS))}
    rows, runs = [], []
    series = series_of(groups)
    drawn, frames = {record.key for record in drawn_runs(groups)}, _frames(list(verdicts.values()))
    places = _places(groups)
    for line in series:
        for group in line.groups:
            for record in (*group.records, *group.stopped):
                run = _run(record, len(rows), others)
                if record.key in drawn:
                    run |= _lines(record, steps, layers, list(axes))
                runs.append(run)
            row = _row(group, line, filters) | {"warmth": _digits(warmth(group), 3)}
            if places:
                row |= {"score": places[id(group)], "made": group.made}
            if id(group) in verdicts:
                row |= {"verdict": verdicts[id(group)].words, "frame": frames.get(id(group), "")}
            rows.append(row)
    return {
        "filters": [
            {"name": name, "title": title_of(name), "values": [_value(name, value) for value in values]}
            for name, values in filters.items()
        ],
        "axis": asdict(axis),
        "lower": groups[0].lower,
        "loss_axis": asdict(loss_axis(groups)),
        "layer_axes": [asdict(one) for one in axes.values()],
        "others": others,
        "groups": rows,
        "runs": runs,
        "steps": list(steps),
        "layers": list(layers),
    }


def _words(verdict: Verdict | None) -> str:
    return verdict.words if verdict else "–"


def _frames(verdicts: list[Verdict]) -> dict[int, str]:
    """Frames of the map, by group: `told` if it alone is the best beyond chance, `alike` for those that may be it."""
    frames = {}
    for first in (verdict for verdict in verdicts if verdict.group is verdict.against):
        rivals = [verdict for verdict in verdicts if verdict.against is first.group]
        alike = [verdict for verdict in rivals if not verdict.apart]
        frames |= {id(verdict.group): "told" if len(alike) == 1 else "alike" for verdict in alike}
    return frames


def _places(groups: Sequence[Group]) -> dict[int, int]:
    """Where some settings were stopped: the places of all by rank, the best highest; the page chooses by them."""
    if not any(group.stopped for group in groups):
        return {}
    return {id(group): place for place, group in enumerate(sorted(reversed(groups), key=lambda group: group.rank))}


def _value(name: str, value: Any) -> dict[str, Any]:
    """A setting's value, and the same in words."""
    plain = value if isinstance(value, str | int | float) else None
    return {"value": plain if isinstance(plain, str) or is_number(plain) else None, "text": show(name, value)}


def _row(group: Group, line: Series, filters: dict[str, list[Any]]) -> dict[str, Any]:
    return {
        "places": {name: values.index(group.settings[name]) for name, values in filters.items()},
        "series": line.label,
        "colour": line.colour,
        "shape": MARKERS[line.marker],
        "dash": DASHES[line.dash],
        "seeds": [record.settings.get("seed", 0) for record in group.records],
        "value": _digits(group.value.mean) if group.value else None,
        "interval": [_digits(end) for end in interval] if (interval := interval_of(group)) else None,
        "loss": _digits(group.loss.mean) if group.loss else None,
        "milliseconds": _digits(1000 * group.seconds_per_step) if group.seconds_per_step else None,
        "diverged_at": group.diverged_at,
        "errors": group.errors,
        "trains": group.trains,
        "score": _digits(max(group.score, -LARGEST), 12),
        "outcome": group.outcome,
        "command": command_of(Trial(**group.settings)).rpartition(" --seed ")[0],  # the page adds the seed of a run
    }


def _run(record: Record, group: int, others: Sequence[str]) -> dict[str, Any]:
    threads = record.machine.get("threads")
    return {
        "key": record.key,
        "group": group,
        "seed": record.settings.get("seed", 0),
        "status": f"stopped: {record.error}" if record.status == "stopped" else record.status,
        "diverged_at": record.diverged_at_step,
        "error": record.error,
        "value": _digits(record.result),
        "others": [_digits(record.final(name)) for name in others],
        "loss": _digits(record.final("loss")),
        "by_epoch": [_digits(value) for value in record.by_epoch(record.metric)],
        "parameters": record.parameters,
        "steps": record.steps,
        "seconds": _digits(record.seconds),
        "finished_at": record.finished_at,
        "versions": _versions(record),
        "threads": threads if isinstance(threads, int) else None,
    }


def _lines(record: Record, steps: Steps, layers: Names, figures: list[str]) -> dict[str, Any]:
    """What is drawn of a run alone: its losses, and its layers if it kept them."""
    points, found = record.losses, layers_of(record)
    lines: dict[str, Any] = {
        "steps_at": steps.setdefault(tuple(x for x, _ in points), len(steps)),
        "curve": [_digits(y, 3) for _, y in points],
    }
    if found:
        names = tuple(next(iter(found.values())))
        lines["layers_at"] = layers.setdefault(names, len(layers))
        lines["layers"] = [[_digits(found.get(figure, {}).get(name), 3) for name in names] for figure in figures]
    return lines


def _other_metrics(group: Group) -> list[str]:
    return [name.rpartition(":")[2] for name in group.settings["metrics"][1:]]


def _environment(record: Record) -> str:
    cpu, threads = record.machine.get("cpu", "unknown processor"), record.machine.get("threads", "?")
    return f"{cpu}, threads {threads}; {_versions(record)}"


def _versions(record: Record) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.versions.items())


def _digits(value: float | None, digits: int = 5) -> float | None:
    return float(f"{value:.{digits}g}") if is_number(value) else None

"""A study for other programs and for papers: CSV, Parquet, a LaTeX table; and several stores made one."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import InputError, check, unknown
from ..files import write_whole
from .lines import seal
from .plan import PLAN, Trial
from .record import Record
from .store import RunStore, lock_folder
from .summary import Group, conditions_of, latest, show, sort_key, summarize, title_of, varying
from .verdicts import CASE, STOPPED, compare_groups, interval_of

RUNS = "runs.jsonl"
UNMADE = ("failed", "stopped")
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {letter: f"\\{letter}" for letter in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}"}
NOTE = (
    r"Mean with its 95\,\% interval over the seeds. Bold: the best mean of a column; $\dagger$: the best setting of "
    "another norm, not told apart from it by paired tests with Holm's correction."
)


def export(records: Iterable[Record], path: str | Path) -> Path:
    """Write the records of a study to a file whose suffix says how.

    `.csv` and `.parquet` have a line for each run, see `rows`; Parquet needs the extra `export`. `.tex` is a table for
    LaTeX with the package booktabs, see `latex_table`.

    Args:
        records: of trials; of several with the same key the last one counts.
        path: of the file, which is replaced.

    Returns:
        The path.

    Raises:
        InputError: there are no records, the suffix is another, the extra is missing, or the file cannot be written.
    """
    path, runs = Path(path), latest(records)
    make = {".csv": _csv, ".parquet": _parquet, ".tex": lambda runs: latex_table(runs).encode()}.get(path.suffix)
    if make is None:
        raise unknown("suffix", path.suffix, (".csv", ".parquet", ".tex"))
    check(bool(runs), "records", [], "one record or more")
    write_whole(path, make(runs))
    return path


def rows(records: Iterable[Record]) -> list[dict[str, Any]]:
    """A dict for each run, all with the same keys: the settings, what came of it, the last figures, where and when.

    The figures of the last epoch are `train_loss`, `valid_accuracy` and so on. None stands for what is not known.
    """
    table = []
    for record in records:
        settings = vars(Trial.from_dict(record.settings))
        settings = {name: ", ".join(one) if isinstance(one, tuple) else one for name, one in settings.items()}
        last = record.epochs[-1] if record.epochs else {}
        figures = {
            f"{part}_{name}": value for part in ("train", "valid") for name, value in (last.get(part) or {}).items()
        }
        machine = {name: record.machine.get(name) for name in ("cpu", "threads")}
        names = ("steps", "seconds", "parameters", "diverged_at_step", "error", "finished_at")
        known = {name: getattr(record, name) for name in names}
        result = {"status": record.status, "metric": record.metric, "value": record.result}
        table.append({"key": record.key, **settings, **result, **figures, **known, **machine})
    columns = dict.fromkeys(name for row in table for name in row)
    return [{name: row.get(name) for name in columns} for row in table]


def latex_table(records: Iterable[Record]) -> str:
    """A table for a paper: norms and other settings down, batch sizes across, each with mean and interval.

    Raises:
        InputError: there are no records.
    """
    groups = summarize(records)
    apart = varying(groups)
    down = ["norm", *(name for name in apart if name != "norm" and name not in CASE)]
    across = [name for name in CASE if name in apart and name != "batch_size"] + ["batch_size"]
    marks = {id(one.group): one for one in compare_groups(groups)}
    cells: dict[tuple, dict[tuple, str]] = {}
    for group in groups:
        row, column = (tuple(group.settings[name] for name in names) for names in (down, across))
        verdict = marks.get(id(group))
        best = verdict is not None and verdict.group is verdict.against and group.trains
        alike = verdict is not None and verdict.group is not verdict.against and verdict.word == "not told apart"
        cells.setdefault(row, {})[column] = _cell(group, best, alike)
    columns = _in_order({column for row in cells.values() for column in row})
    heads = [title_of(name) for name in down] + [
        ", ".join(_named(name, value) for name, value in zip(across, column, strict=True)) for column in columns
    ]
    lines = [_line(map(_escape, heads))]
    lines += [
        _line([_escape(show(name, value)) for name, value in zip(down, row, strict=True)] + found)
        for row in _in_order(cells)
        for found in [[cells[row].get(column, "--") for column in columns]]
    ]
    metric = _escape(groups[0].metric)
    conditions = conditions_of(groups).partition(" Mean ")[0]  # what is said of deviations is of another table
    stopped = f" {STOPPED}" if any(group.stopped for group in groups) else ""
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{Validation {metric}. {NOTE}{stopped} {_escape(conditions)}}}",
            rf"\begin{{tabular}}{{{'l' * len(down)}{'r' * len(columns)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def merge(folders: Sequence[str | Path], out: str | Path) -> list[Record]:
    """Make one store of several, such as those of the machines that shared a study. What `out` holds already stays.

    A run that is in several folders comes once. A failed run gives way to one that ended, and so does a stopped one.
    The folders stay as they are.
    If they have one plan among them, that is the plan of the merged store too.

    Args:
        folders: each with the runs of a study.
        out: the folder of the merged store, which is made if it is not there.

    Returns:
        The records of the merged store.

    Raises:
        InputError: a folder has no runs; a run ended otherwise in another folder; or `out` is in use.
    """
    out = Path(out)
    places = [Path(folder) for folder in folders]
    for place in places:
        check((place / RUNS).is_file(), "folder", str(place), f"a folder with {RUNS}")
    with lock_folder(out):
        found: dict[str, tuple[Record, Path]] = {}
        conflicts = []
        for place in dict.fromkeys([out, *places]):
            for record in latest(RunStore(place / RUNS).read()):
                before = found.get(record.key)
                if before is None or (before[0].status in UNMADE and record.status not in UNMADE):
                    found[record.key] = record, place
                elif record.status not in UNMADE and _outcome(before[0]) != _outcome(record):
                    conflicts.append(_conflict(before[0], before[1], record, place))
        if conflicts:
            more = f"\n  and {len(conflicts) - 5} more" if len(conflicts) > 5 else ""
            named = "\n  ".join(conflicts[:5])
            raise InputError(
                f"{len(conflicts)} runs ended otherwise in another folder:\n  {named}{more}\n"
                "Nothing was written. Leave one of the folders out."
            )
        records = [record for record, _ in found.values()]
        write_whole(out / RUNS, b"".join(seal(record.to_json()) for record in records))
        plans = {(place / PLAN).read_bytes() for place in places if (place / PLAN).is_file()}
        if len(plans) == 1 and not (out / PLAN).exists():
            write_whole(out / PLAN, plans.pop())
    return records


def _outcome(record: Record) -> Any:
    """What two equal runs have in common, wherever they were made."""
    figures = [{name: epoch.get(name) for name in ("epoch", "train", "valid")} for epoch in record.epochs]
    return record.settings, record.status, record.diverged_at_step, figures, record.curve


def _conflict(one: Record, place: Path, other: Record, elsewhere: Path) -> str:
    names = dict.fromkeys((*one.made_by, *other.made_by)) if one.made_by and other.made_by else ()
    apart = [name for name in names if one.made_by.get(name) != other.made_by.get(name)]
    why = f" (they differ in {', '.join(apart)})" if apart else ""
    values = [record.status if record.result is None else f"{record.result:.4f}" for record in (one, other)]
    return f"run {one.key}: {values[0]} in {place}, {values[1]} in {elsewhere}{why}"


def _csv(records: Sequence[Record]) -> bytes:
    table, text = rows(records), io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]))
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode(errors="replace")


def _parquet(records: Sequence[Record]) -> bytes:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError("Parquet needs pyarrow: pip install 'normlab[export]'; or write a .csv.") from None
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows(records)), buffer)
    return buffer.getvalue()


def _cell(group: Group, best: bool, alike: bool) -> str:
    """Mean and interval, or in words why there is none; then how many runs did not finish."""
    count = len(group.records)
    stopped = [f"stopped after {group.made}"] if group.stopped else []
    rest = [
        f"{number} of {count} {word}"
        for number, word in ((len(group.diverged_at), "diverged"), (len(group.errors), "failed"))
        if number
    ] + stopped
    if group.value is None:
        return _escape(", ".join(rest) or f"no {group.metric}")
    ends = interval_of(group)
    text = f"{group.value.mean:.4f}" + (f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else "")
    text = rf"\textbf{{{text}}}" if best else rf"{text}$^\dagger$" if alike else text
    return text + (f" ({', '.join(rest)})" if rest else "")


def _named(name: str, value: Any) -> str:
    return f"batch {value}" if name == "batch_size" else f"{title_of(name)} {show(name, value)}"


def _in_order(keys: Iterable[tuple]) -> list[tuple]:
    return sorted(keys, key=lambda key: [sort_key(value) for value in key])


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"


def _escape(text: str) -> str:
    """The text for LaTeX: its signs that mean something there, and no line ends."""
    plain = re.sub(r"\s+", " ", text).replace("±", "+/-")
    return "".join(SPECIAL.get(letter, letter) for letter in plain)

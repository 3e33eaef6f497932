"""What a study found: the runs of its plan in a folder, and the table, the picture and the page made of them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..files import write_whole
from .charts import drawn_runs
from .picture import draw_png
from .record import Record
from .report import make_html
from .store import RunStore
from .summary import Group, summarize
from .table import make_table
from .verdicts import conclusions

PLAIN: Any = {"markup": False, "highlight": False, "soft_wrap": True}  # a path is printed as it is


def complete_groups(store: RunStore, outcomes: Iterable[Record]) -> list[Group]:
    """The groups of some runs. Only the runs that are drawn have a curve and activations; the others' are not read.

    Args:
        store: of the runs.
        outcomes: the runs that count, of `store.outcomes()`.

    Raises:
        InputError: the store cannot be read, or there are no runs.
    """
    groups = summarize(outcomes)
    whole = {one.key: one for one in store.complete(drawn_runs(groups))}
    return [replace(group, records=tuple(whole.get(one.key, one) for one in group.records)) for group in groups]


def report(groups: Sequence[Group], folder: Path, console: Console, command: str = "") -> None:
    """Show the table and what it says, and write picture and page beside the runs."""
    console.print(make_table(groups))
    for line in conclusions(groups):
        console.print(line, highlight=False, markup=False)
    draw_png(groups, folder / "comparison.png")
    write_whole(folder / "report.html", make_html(groups, "Norms compared", command).encode(errors="replace"))
    console.print(f"runs     {folder / 'runs.jsonl'}", **PLAIN)
    console.print(f"picture  {folder / 'comparison.png'}", **PLAIN)
    console.print(f"page     {folder / 'report.html'}", **PLAIN)

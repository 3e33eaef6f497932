"""A study as a table for the terminal."""

from collections.abc import Iterable

from rich.table import Table
from rich.text import Text

from .record import Record
from .summary import Group, best, conditions_of, show, sort_key, summarize, title_of, values_of, varying


def terminal_table(records: Iterable[Record]) -> Table:
    """Validation accuracy, norms and learning rates down, batch sizes across; the best of each column stands out.

    Raises:
        InputError: there are no records.
    """
    groups = summarize(records)
    names = ["norm", *(name for name in varying(groups) if name not in ("norm", "batch_size"))]
    leaders = {
        size: best(group for group in groups if group.settings["batch_size"] == size)
        for size in values_of(groups, "batch_size")
    }
    table = Table(caption=conditions_of(groups), caption_justify="left")
    for name in names:
        table.add_column(title_of(name), overflow="fold")  # cut off, many names would read alike
    for size in leaders:
        table.add_column(f"batch {size}", justify="right", overflow="fold")
    rows: dict[tuple, dict[int, Group]] = {}
    for group in groups:
        rows.setdefault(tuple(group.settings[name] for name in names), {})[group.settings["batch_size"]] = group
    for values in sorted(rows, key=lambda values: [sort_key(value) for value in values]):
        titles = [Text(show(name, value)) for name, value in zip(names, values, strict=True)]
        table.add_row(*titles, *(_cell(rows[values].get(size), leader) for size, leader in leaders.items()))
    return table


def _cell(group: Group | None, leader: Group | None) -> Text:
    if group is None:
        return Text("–", style="dim")
    if group is leader and group.trains:
        return Text(group.outcome, style="bold green")
    return Text(group.outcome, style="" if group.trains else "red")

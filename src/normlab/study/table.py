"""A study as a table for the terminal."""

from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from .record import Record
from .summary import Group, conditions_of, digits, show, sort_key, summarize, title_of, values_of, varying
from .verdicts import Verdict, compare_groups, interval_of, method_of

STYLES = {"best mean": "bold green", "best of one seed": "bold green", "worse": "red"}


def terminal_table(records: Iterable[Record]) -> Table:
    """The metric, norms and learning rates down, batch sizes across, with its interval and what tests say of it.

    A norm's best setting at a batch size has a verdict beside the best norm there, see `verdicts.compare_groups`.

    Raises:
        InputError: there are no records.
    """
    return make_table(summarize(records))


def make_table(groups: Sequence[Group]) -> Table:
    """The table of `terminal_table`, of groups."""
    names = ["norm", *(name for name in varying(groups) if name not in ("norm", "batch_size"))]
    verdicts = {id(one.group): one for one in compare_groups(groups)}
    sizes = values_of(groups, "batch_size")
    caption = Text(f"{conditions_of(groups)} {method_of(groups)}".rstrip(), style="table.caption")
    table = Table(caption=caption, caption_justify="left")
    for name in names:
        table.add_column(title_of(name), overflow="fold")  # cut off, many names would read alike
    for size in sizes:
        table.add_column(f"batch {size}", justify="right", overflow="fold")
    rows: dict[tuple, dict[int, Group]] = {}
    for group in groups:
        rows.setdefault(tuple(group.settings[name] for name in names), {})[group.settings["batch_size"]] = group
    for values in sorted(rows, key=lambda values: [sort_key(value) for value in values]):
        titles = [Text(show(name, value)) for name, value in zip(names, values, strict=True)]
        found = [rows[values].get(size) for size in sizes]
        table.add_row(*titles, *(_cell(group, verdicts.get(id(group))) for group in found))
    return table


def _cell(group: Group | None, verdict: Verdict | None) -> Text:
    if group is None:
        return Text("–", style="dim")
    lines = group.outcome.split(", ")
    if group.value and (ends := interval_of(group)):
        lines.insert(1, " to ".join(digits(group.value.mean, *ends)[1:]))
    if verdict and verdict.rivals:
        lines.append(verdict.word)
    style = STYLES.get(verdict.word, "") if verdict else ""
    return Text("\n".join(lines), style=style if group.trains else "red")

"""What surgery did to a model, module by module, and what it left."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from typing import Any


@dataclass(frozen=True)
class Row:
    """One module.

    Attributes:
        name: its place in the model, or several with commas.
        was: its class.
        became: the class in its place, or None if it was left as it is.
        note: what carries over, or why it was left.
        change: root mean square of the change of its output, over the deviation of the old output. It is measured on
            the batches given, with all that stands before it as it was. None if none were given.
    """

    name: str
    was: str
    became: str | None
    note: str
    change: float | None = None

    def with_change(self, change: float | None) -> "Row":
        """The same row with its change; a change that is not finite is put in words."""
        unknown = change is not None and math.isnan(change)
        note = f"{self.note}; infinite or NaN on these batches: nothing was compared" if unknown else self.note
        return replace(self, change=change, note=note)


@dataclass
class Report:
    """Every norm of a model, touched or left; printed as a table.

    Attributes:
        rows: in the order of the model.
        change: the same of the model's output; None if it was not measured.
    """

    rows: list[Row] = field(default_factory=list)
    change: float | None = None

    @property
    def touched(self) -> list[Row]:
        """The modules that are others now."""
        return [row for row in self.rows if row.became is not None]

    @property
    def skipped(self) -> list[Row]:
        """Those that were left as they are."""
        return [row for row in self.rows if row.became is None]

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for heading in ("module", "was", "became", "note"):
            table.add_column(heading, overflow="fold")  # cut off, many names would read alike
        measured = any(row.change is not None for row in self.rows)
        if measured:
            table.add_column("change", justify="right")
        for row in self.rows:
            change = [] if not measured else ["" if row.change is None else f"{row.change:.3g}"]
            cells = row.name or "(the model)", row.was, row.became or "–", row.note, *change
            table.add_row(*map(Text, cells))  # no markup
        summary = f"{len(self.touched)} changed, {len(self.skipped)} left" + (
            "" if self.change is None else f"; the model's output changes by {self.change:.3g}"
        )
        return Group(table, summary)

    def __str__(self) -> str:
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=160).print(self)
        return text.getvalue().rstrip()

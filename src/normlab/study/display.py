"""Shows how far the runs of a study are: a live view on a terminal, plain lines elsewhere."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn
from rich.table import Column
from rich.text import Text

from .record import Record

if TYPE_CHECKING:
    from .jobs import Job

LINE_SECONDS = 20.0
NEEDED = 4  # lines of the view beside those of the runs, and one for the prompt
STYLES = {"finished": "", "diverged": "yellow", "failed": "bold red", "stopped": "dim"}


class Display:
    """Hears how the jobs go. It prints a line for each that ended, and says in between how far all of them are.

    Args:
        jobs: all of them.
        console: to print to.
    """

    def __init__(self, jobs: Sequence["Job"], console: Console):
        self.console, self._costs = console, {job.key: job.cost for job in jobs}
        self._shares = dict.fromkeys(self._costs, 0.0)
        self._ended: Counter[str] = Counter()
        self._width = max(len(plain(job.label)) for job in jobs)
        self._start = time.monotonic()

    def begin(self, job: "Job", where: str) -> None:
        """The job has begun, here: `process 1234`."""

    def tell(self, job: "Job", share: float) -> None:
        """So much of the job is done, from 0 to 1."""
        self._shares[job.key] = share

    def lose(self, job: "Job", why: str) -> None:
        """The process of the job is gone; the job is made again."""
        self._shares[job.key] = 0.0
        self._print(job, f"is made again: {why}", "yellow")

    def end(self, job: "Job", record: Record) -> None:
        """The job has ended."""
        if record.status != "finished":  # it is shorter, or never made: count what it did as all it had to do
            self._costs[job.key] *= self._shares[job.key]
        self._shares[job.key] = 1.0
        self._ended[record.status] += 1
        self._print(job, outcome(record), STYLES[record.status])

    @property
    def share(self) -> float:
        """How much of all jobs is done, from 0 to 1."""
        done = sum(cost * self._shares[key] for key, cost in self._costs.items())
        return done / (sum(self._costs.values()) or 1.0)

    @property
    def text(self) -> str:
        """How many jobs have ended, and how; and the time: `5 of 60 runs (1 diverged), 8 %, 0:20, about 3:10 left`."""
        odd = ", ".join(
            f"{self._ended[status]} {status}" for status in ("diverged", "failed", "stopped") if self._ended[status]
        )
        spent = time.monotonic() - self._start
        left = f", about {_clock(spent / self.share - spent)} left" if self.share > 0.02 else ""
        counts = f"{self._ended.total()} of {len(self._costs)} runs{f' ({odd})' if odd else ''}"
        return f"{counts}, {self.share:.0%}, {_clock(spent)}{left}"

    def _print(self, job: "Job", what: str, style: str) -> None:
        line = Text(f"{plain(job.label):<{self._width}}  {what}", style=style)
        self.console.print(line, highlight=False, soft_wrap=True)


class Lines(Display):
    """For a log: how far it is, a line every 20 seconds."""

    def __init__(self, jobs: Sequence["Job"], console: Console):
        super().__init__(jobs, console)
        self._next = self._start + LINE_SECONDS

    def tell(self, job: "Job", share: float) -> None:
        """As every display, and a line now and then."""
        super().tell(job, share)
        now = time.monotonic()
        if now >= self._next:
            self._next = now + LINE_SECONDS
            self.console.print(self.text, highlight=False, soft_wrap=True)


class View(Display):
    """For a terminal: the runs that are on the way, where and how far they are, and a line about all, at the bottom."""

    def __init__(self, jobs: Sequence["Job"], console: Console):
        super().__init__(jobs, console)
        names = TextColumn("{task.description}", markup=False, table_column=Column(ratio=3, no_wrap=True))
        places = TextColumn("{task.fields[where]}", markup=False, table_column=Column(ratio=1, no_wrap=True))
        self._bars = Progress(names, places, BarColumn(12), TaskProgressColumn(), console=console, expand=True)
        self._running: dict[str, TaskID] = {}

    def begin(self, job: "Job", where: str) -> None:
        """A line for the job."""
        self._running[job.key] = self._bars.add_task(plain(job.label), total=1.0, where=plain(where))

    def tell(self, job: "Job", share: float) -> None:
        """The bar of the job."""
        super().tell(job, share)
        self._bars.update(self._running[job.key], completed=share)

    def lose(self, job: "Job", why: str) -> None:
        """The line of the job goes."""
        self._remove(job)
        super().lose(job, why)

    def end(self, job: "Job", record: Record) -> None:
        """The line of the job goes."""
        self._remove(job)
        super().end(job, record)

    def _remove(self, job: "Job") -> None:
        if job.key in self._running:  # a job that is lost before it began has no line
            self._bars.remove_task(self._running.pop(job.key))

    def __rich__(self) -> Group:
        """What is seen now."""
        room = max(1, self.console.height - NEEDED)
        tasks = self._bars.tasks
        more = [Text(f"and {len(tasks) - room} more", style="dim")] if len(tasks) > room else []
        return Group(self._bars.make_tasks_table(tasks[:room]), *more, Text(self.text, style="bold", no_wrap=True))


@contextmanager
def show(jobs: Sequence["Job"], console: Console) -> Iterator[Display]:
    """The display for this console, which is gone at the end but for the lines of what ended."""
    if not console.is_terminal:
        yield Lines(jobs, console)
        return
    view = View(jobs, console)
    with Live(view, console=console, transient=True, refresh_per_second=5):
        yield view


def outcome(record: Record) -> str:
    """What came of a run, in a line."""
    if record.status in ("failed", "stopped"):
        return f"{record.status}: {plain(record.error or 'unknown')}"
    if record.status == "diverged":
        return f"diverged at step {record.diverged_at_step}"
    result = f"no {plain(record.metric)}" if record.result is None else f"{record.result:.4f}"
    return result if record.seconds is None else f"{result}  ({record.seconds:.0f} s)"


def plain(text: str) -> str:
    """The text in one line, without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""How far a study is: the state of each planned run, and how many are in each state."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Group
from rich.table import Table
from rich.text import Text

from .plan import Trial
from .record import Record, Start
from .store import RunStore, driver

State = Literal["waiting", "running", "interrupted", "finished", "diverged", "failed", "stopped"]
STYLES = {
    "running": "cyan",
    "finished": "green",
    "diverged": "yellow",
    "failed": "red",
    "interrupted": "magenta",
    "stopped": "dim",
}
STATES: tuple[State, ...] = ("finished", "diverged", "stopped", "failed", "running", "interrupted", "waiting")
SHOWN = 20  # runs of a state in the table


@dataclass(frozen=True)
class RunState:
    """What became of a planned run so far.

    Attributes:
        trial: that was planned.
        state: `waiting`; `running`; `interrupted`, if the process that had begun it is gone; or as its record says.
        failures: how often it failed.
        where: the run is made, or was begun; empty if it waits.
        since: when it was begun or ended, as ISO 8601 writes it; empty if it waits.
        error: of its last failure, or why it was stopped; empty if neither was.
    """

    trial: Trial
    state: State
    failures: int = 0
    where: str = ""
    since: str = ""
    error: str = ""


@dataclass(frozen=True)
class Status:
    """How far a study is.

    Attributes:
        runs: the state of each planned run, in the order of the plan.
        driver: the process that runs the study now; None if none does.
        others: how many records in the folder are of runs that are not planned.
    """

    runs: tuple[RunState, ...]
    driver: Start | None = None
    others: int = 0

    @property
    def counts(self) -> dict[State, int]:
        """How many runs are in each state, those without a run left out."""
        found = Counter(run.state for run in self.runs)
        return {state: found[state] for state in STATES if found[state]}

    @property
    def done(self) -> bool:
        """Whether each planned run finished, diverged or was stopped."""
        return all(run.state in ("finished", "diverged", "stopped") for run in self.runs)

    def __rich__(self) -> Group:
        """The counts, and of each state that wants a look its runs."""
        rows = Table(box=None, show_header=False, pad_edge=False)
        for state, count in self.counts.items():
            rows.add_row(Text(state, style=STYLES.get(state, "")), str(count), f"{count / len(self.runs):.0%}")
        parts = [Text(self._headline()), rows]
        wanted = [run for run in self.runs if run.state in ("running", "interrupted", "failed")]
        if wanted:
            table = Table("run", "state", "where", "since", "failed", "error", box=None, pad_edge=False)
            for run in wanted[:SHOWN]:
                times = f"{run.failures} times" if run.failures > 1 else "once" if run.failures else ""
                state = Text(run.state, style=STYLES[run.state])
                table.add_row(Text(_label(run.trial)), state, Text(run.where), run.since, times, Text(run.error))
            parts += [Text(), table]
            if len(wanted) > SHOWN:
                parts.append(Text(f"and {len(wanted) - SHOWN} more"))
        beaten = Counter((_setting(run.trial), run.error) for run in self.runs if run.state == "stopped")
        if beaten:
            table = Table("stopped", "runs", "why", box=None, pad_edge=False)
            for (setting, why), count in beaten.most_common(SHOWN):
                table.add_row(Text(setting), str(count), Text(why))
            parts += [Text(), table]
            if len(beaten) > SHOWN:
                parts.append(Text(f"and {len(beaten) - SHOWN} more"))
        if self.others:
            parts.append(Text(f"{self.others} more runs in the folder are not of this plan."))
        return Group(*parts)

    def _headline(self) -> str:
        ended = sum(run.state in ("finished", "diverged") for run in self.runs)
        stopped = self.counts.get("stopped")
        text = f"{ended} of {len(self.runs)} runs have ended" + (f", {stopped} are not made" if stopped else "")
        if self.driver:
            who = f"process {self.driver.process} on {self.driver.host}"
            return f"{text}; {who} runs the study since {self.driver.started}."
        return f"{text}." if self.done else f"{text}; nothing runs now. Run the study again to go on."


def status(
    folder: str | Path, trials: Sequence[Trial], usable: Callable[[Record], bool] = lambda record: True
) -> Status:
    """How far the study of these trials in a folder is. Nothing is changed, and no lock is kept.

    Args:
        folder: of the study.
        trials: that are planned.
        usable: whether a record counts; one that does not is of a run that is to be made again.

    Raises:
        InputError: the store of the folder cannot be read.

    Example:
        >>> status("runs/none", [Trial()]).counts
        {'waiting': 1}
    """
    runner = driver(folder)
    entries: dict[str, list[Record | Start]] = {}
    for entry in RunStore(Path(folder) / "runs.jsonl").heads():
        if isinstance(entry, Start) or entry.status == "failed" or usable(entry):
            entries.setdefault(entry.key, []).append(entry)
    keys = {trial.key: trial for trial in trials}
    runs = tuple(_state(trial, entries.get(key, ()), runner) for key, trial in keys.items())
    return Status(runs, runner, others=len(entries.keys() - keys.keys()))


def _state(trial: Trial, entries: Iterable[Record | Start], runner: Start | None) -> RunState:
    """The state of a run from what the store says of it, in the order written."""
    last, failures, error = None, 0, ""
    for last in entries:
        if isinstance(last, Record) and last.status == "failed":
            failures, error = failures + 1, (last.error or "unknown").partition("\n")[0]
    if last is None:
        return RunState(trial, "waiting")
    if isinstance(last, Record):
        error = last.error or "" if last.status == "stopped" else error
        return RunState(trial, last.status, failures, last.machine.get("cpu", ""), last.finished_at or "", error)
    same = runner is not None and (last.host, last.process) == (runner.host, runner.process)
    where = ", ".join(part for part in (last.where, f"process {last.process} on {last.host}") if part)
    return RunState(trial, "running" if same else "interrupted", failures, where, last.started, error)


def _label(trial: Trial) -> str:
    return f"{_setting(trial)} seed {trial.seed}"


def _setting(trial: Trial) -> str:
    return f"{trial.norm} batch {trial.batch_size} lr {trial.lr:g}"

"""A comparison: a plan's trials, run and kept in a folder, with the table, the picture and the page made of them."""

import itertools
import shlex
from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..files import check_writable, write_whole
from ..nn import NORMS
from ..training import Callback
from .executors import Executor, Job, run_jobs
from .fingerprint import differences, fingerprint
from .lines import uncollected
from .plan import PLAN, Plan, Trial
from .processes import ProcessExecutor
from .record import Record
from .results import PLAIN, report
from .stopping import Rounds
from .store import RunStore, lock_folder
from .summary import summarize
from .table import terminal_table
from .tasks import check_tasks
from .trial import run_trial

ENDED = ("finished", "diverged")


def compare(
    trials: Sequence[Trial],
    folder: str | Path,
    *,
    data_dir: str | Path | None = None,
    workers: int | Executor | None = 2,
    console: Console | None = None,
    command: str = "",
    stop_beaten: bool = False,
) -> list[Record]:
    """Run the trials that `folder` does not hold yet, and write `runs.jsonl`, `comparison.png` and `report.html` there.

    Ctrl-C ends it: it shows the table of what there is, and raises KeyboardInterrupt.

    Args:
        trials: see `plan.grid`.
        folder: of the results. Runs found there are not run again, if the same code, data and threads made them.
        data_dir: of local copies of the data.
        workers: processes on this machine, None for as many as there are cores; or what else makes the runs, see
            `executors.make_executor`.
        console: for progress and table.
        command: the command line, for the page.
        stop_beaten: whether settings that another one of their norm clearly beats get no further seeds, see
            `stopping.Rounds`.

    Returns:
        The records of the trials that ended, and of those that were stopped.

    Raises:
        InputError: a trial asks for what is not there; another process runs a study in the folder, or it cannot be
            written.
    """
    console = console or Console()
    folder = Path(folder)
    executor = ProcessExecutor(workers) if workers is None or isinstance(workers, int) else workers
    check_tasks(trials, data_dir)
    check_writable(folder)
    with lock_folder(folder):
        with uncollected():
            study = _Study(trials, folder, data_dir, executor.threads, stop_beaten)
            kept = study.kept()
        if kept:
            console.print(f"{len(kept)} runs are in {study.store.path} already; delete it to run them again.", **PLAIN)
        if study.others:
            said = f"{study.others} more were made by {study.why}; these runs are made again."
            console.print(said, **PLAIN)
        rounds, stopped = study.rounds()
        if stopped:
            console.print(f"{len(stopped)} runs are not made: other settings clearly beat theirs.", **PLAIN)
        try:
            run_jobs(study.jobs(kept | stopped), study.store, executor, console, rounds)
        except KeyboardInterrupt:
            if records := study.records():
                console.print(terminal_table(records))
            raise
        records = study.records()
        if records:
            report(summarize(records), folder, console, command)
    return records


class _Study:
    """The trials of a study and what its folder holds of them, by the code, data and threads of here and now.

    Attributes:
        others: how many trials have records that other code, data or threads made, and none of here and now.
        why: in what these differ.
    """

    def __init__(
        self, trials: Sequence[Trial], folder: Path, data_dir: str | Path | None, threads: int, stop_beaten: bool
    ):
        self.trials, self.data_dir, self.store = trials, data_dir, RunStore(folder / "runs.jsonl")
        self.stop_beaten = stop_beaten
        self.made_by = {trial.key: fingerprint(trial, data_dir, threads) for trial in trials}

    def kept(self) -> set[str]:
        """The keys of the trials that need no run any more; their curves are not read."""
        found, others = self._sorted(self.store.record_heads(), ENDED)
        only_others = {key: apart for key, apart in others.items() if key not in found}
        self.others = len(only_others)
        self.why = ", ".join(f"other {name}" for name in dict.fromkeys(itertools.chain(*only_others.values())))
        return set(found)

    def records(self) -> list[Record]:
        """Of each trial the last run that did not fail, or why it was stopped."""
        statuses = (*ENDED, "stopped") if self.stop_beaten else ENDED
        found, _ = self._sorted(self.store.read(), statuses)
        return [found[trial.key] for trial in self.trials if trial.key in found]

    def rounds(self) -> tuple[Rounds | None, set[str]]:
        """What lets runs begin, and the keys of those that are stopped already; the store says that they are."""
        if not self.stop_beaten:
            return None, set()
        known, _ = self._sorted(self.store.outcomes(), (*ENDED, "stopped"))
        rounds = Rounds(self.trials, known.values(), self.made_by)
        reasons = {record.key: record.error for record in known.values() if record.status == "stopped"}
        for record in rounds.first.stopped:
            if reasons.get(record.key) != record.error:
                self.store.append(record)
        return rounds, {record.key for record in rounds.first.stopped}

    def _sorted(
        self, entries: Iterable[Any], statuses: Container[str]
    ) -> tuple[dict[str, Record], dict[str, list[str]]]:
        """By key, the records of here and now; and of others in what they differ."""
        found, others = {}, {}
        for entry in entries:
            if isinstance(entry, Record) and entry.key in self.made_by and entry.status in statuses:
                apart = differences(entry, self.made_by[entry.key])
                if apart:
                    others[entry.key] = apart
                else:
                    found[entry.key] = entry
        return found, others

    def jobs(self, kept: set[str]) -> list[Job]:
        """Those that are left to be made."""
        left = [trial for trial in self.trials if trial.key not in kept]
        return [make_job(trial, self.data_dir, self.made_by[trial.key]) for trial in left]


def run_study(
    plan: Plan,
    folder: str | Path,
    *,
    data_dir: str | Path | None = None,
    workers: int | Executor | None = 2,
    console: Console | None = None,
) -> list[Record]:
    """Run what `folder` does not hold yet of a plan, and make its report; the plan is kept there as `plan.toml`.

    Arguments, errors and what is returned as for `compare`.

    Example:
        >>> plan = Plan(norms=["batch", "running"], batch_sizes=[2], seeds=[0, 1, 2], images=1000)
        >>> records = run_study(plan, "runs/first")  # doctest: +SKIP
    """
    trials, folder = plan.trials(), Path(folder)
    check_tasks(trials, data_dir)
    check_writable(folder)
    with lock_folder(folder):
        write_whole(folder / PLAN, plan.to_toml().encode())
    command = f"normlab study run {shlex.quote(str(folder / PLAN))} --out {shlex.quote(str(folder))}"
    return compare(
        trials,
        folder,
        data_dir=data_dir,
        workers=workers,
        console=console,
        command=command,
        stop_beaten=plan.stop_beaten,
    )


def make_job(trial: Trial, data_dir: str | Path | None, made_by: dict[str, str] | None = None) -> Job:
    """The trial as a job; its cost is about the seconds it takes on one core. `made_by` is for the record."""
    steps = trial.epochs * (trial.images or 50_000) / trial.batch_size
    per_step = 1e-3 * (NORMS[trial.norm].cost if trial.norm in NORMS else 1.0)  # others are the user's own
    label = f"{trial.norm:<9} batch {trial.batch_size:<4} lr {trial.lr:<5g} seed {trial.seed}"
    run = partial(_run, trial, data_dir, made_by or {})
    return Job(trial.key, label, steps * (per_step + 1e-4 * trial.batch_size), run, trial.to_dict())


def _run(trial: Trial, data_dir: str | Path | None, made_by: dict[str, str], tell: Callback) -> Record:
    return replace(run_trial(trial, data_dir, (tell,)), made_by=made_by)

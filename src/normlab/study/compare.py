"""A comparison: a plan's trials, run and kept in a folder, with the table, the picture and the page made of them."""

import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import check, is_whole
from ..files import check_writable, write_whole
from ..nn import NORMS
from ..training import Callback
from .executors import Job, run_jobs
from .picture import write_png
from .plan import Plan, Trial
from .record import Record
from .report import write_html
from .statistics import conclusions
from .store import RunStore
from .summary import summarize
from .table import terminal_table
from .tasks import check_tasks
from .trial import environment, run_trial

PLAN = "plan.toml"
PLAIN: Any = {"markup": False, "highlight": False, "soft_wrap": True}  # a path is printed as it is


def compare(
    trials: Sequence[Trial],
    folder: str | Path,
    *,
    data_dir: str | Path | None = None,
    workers: int = 2,
    console: Console | None = None,
    command: str = "",
) -> list[Record]:
    """Run the trials that `folder` does not hold yet, and write `runs.jsonl`, `comparison.png` and `report.html` there.

    Ctrl-C ends it: it shows the table of what there is, and raises KeyboardInterrupt.

    Args:
        trials: see `plan.grid`.
        folder: of the results. Runs found there are not run again, if the same versions made them.
        data_dir: of local copies of the data.
        workers: processes.
        console: for progress and table.
        command: the command line, for the page.

    Returns:
        The records of the trials that ended.

    Raises:
        InputError: a trial asks for what is not there, or the folder cannot be written.
    """
    console = console or Console()
    folder = Path(folder)
    store = RunStore(folder / "runs.jsonl")
    check(is_whole(workers, 1), "workers", workers, "a whole number from 1")
    check_tasks(trials, data_dir)
    check_writable(folder)
    kept = {record.key for record in _usable(store)}
    wanted = {trial.key for trial in trials}
    if kept & wanted:
        console.print(f"{len(kept)} runs are in {store.path} already; delete it to run them again.", **PLAIN)
    todo = [trial for trial in trials if trial.key not in kept]
    try:
        run_jobs([make_job(trial, data_dir) for trial in todo], store, workers, console)
    except KeyboardInterrupt:
        records = [record for record in _usable(store) if record.key in wanted]
        if records:
            console.print(terminal_table(records))
        raise
    records = [record for record in _usable(store) if record.key in wanted]
    if records:
        report(records, folder, console, command)
    return records


def run_study(
    plan: Plan,
    folder: str | Path,
    *,
    data_dir: str | Path | None = None,
    workers: int = 2,
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
    write_whole(folder / PLAN, plan.to_toml().encode())
    command = f"normlab study run {shlex.quote(str(folder / PLAN))} --out {shlex.quote(str(folder))}"
    return compare(trials, folder, data_dir=data_dir, workers=workers, console=console, command=command)


def report(records: Sequence[Record], folder: Path, console: Console, command: str = "") -> None:
    """Show the table and what it says, and write picture and page beside the runs."""
    console.print(terminal_table(records))
    for line in conclusions(summarize(records)):
        console.print(line, highlight=False, markup=False)
    write_png(records, folder / "comparison.png")
    write_html(records, folder / "report.html", "Norms compared", command)
    console.print(f"runs     {folder / 'runs.jsonl'}", **PLAIN)
    console.print(f"picture  {folder / 'comparison.png'}", **PLAIN)
    console.print(f"page     {folder / 'report.html'}", **PLAIN)


def make_job(trial: Trial, data_dir: str | Path | None) -> Job:
    """The trial as a job; its cost is about the seconds it takes on one core."""
    steps = trial.epochs * (trial.images or 50_000) / trial.batch_size
    per_step = 1e-3 * (NORMS[trial.norm].cost if trial.norm in NORMS else 1.0)  # others are the user's own
    label = f"{trial.norm:<9} batch {trial.batch_size:<4} lr {trial.lr:<5g} seed {trial.seed}"
    run = partial(_run, trial, data_dir)
    return Job(trial.key, label, steps * (per_step + 1e-4 * trial.batch_size), run, trial.to_dict())


def _run(trial: Trial, data_dir: str | Path | None, tell: Callback) -> Record:
    return run_trial(trial, data_dir, (tell,))


def _usable(store: RunStore) -> list[Record]:
    """The store's runs that did not fail and were made by the versions at hand."""
    versions = environment()["versions"]
    return [record for record in store.read() if record.status != "failed" and record.versions == versions]

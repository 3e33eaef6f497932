"""Runs whose results are known beforehand: of each norm, some rates are clearly beaten after three seeds.

    python tests/study/beaten_runs.py FOLDER

makes them in two processes, and stops what is beaten.
"""

import sys
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from normlab.study.executors import Executor, Job, ProcessExecutor, run_jobs
from normlab.study.plan import Plan, Trial
from normlab.study.record import Record
from normlab.study.stopping import Rounds
from normlab.study.store import RunStore

PLAN = Plan(norms=["batch", "group"], batch_sizes=[2], lrs=[0.01, 0.1, 1.0], seeds=list(range(6)), stop_beaten=True)
MEANS = {  # None diverges
    ("batch", 0.01): 0.55,
    ("batch", 0.1): 0.9,
    ("batch", 1.0): None,
    ("group", 0.01): 0.6,
    ("group", 0.1): 0.9,
    ("group", 1.0): 0.89,
}
BEATEN = {("batch", 0.01), ("batch", 1.0), ("group", 0.01)}
LUCK = [0.0, 0.002, -0.003, 0.001, 0.004, -0.001]
SECONDS = 0.01


def make_record(trial: Trial) -> Record:
    mean = MEANS[trial.norm, trial.lr]
    if mean is None:
        return Record(trial.key, trial.to_dict(), "diverged", diverged_at_step=3)
    luck = LUCK[trial.seed] * (-5 if trial.lr == 1.0 else 1)  # so that rates 0.1 and 1 win by turns
    return Record(trial.key, trial.to_dict(), "finished", epochs=[{"epoch": 1, "valid": {"accuracy": mean + luck}}])


def make_slowly(trial: Trial, tell) -> Record:
    """A run that takes the longer the smaller its seed is."""
    time.sleep(SECONDS * (6 - trial.seed))
    return make_record(trial)


def make(folder: Path, executor: Executor, plan: Plan = PLAN) -> None:
    """Make the runs that the folder does not hold, as `compare` does."""
    trials = plan.trials()
    store = RunStore(folder / "runs.jsonl")
    found = store.read()
    ended, said = ([one for one in found if (one.status == "stopped") == stopped] for stopped in (False, True))
    rounds = Rounds(trials, ended)
    for record in rounds.first.stopped:  # the process may have been killed before it said so
        if record.key not in {one.key for one in said}:
            store.append(record)
    left = {trial.key for trial in trials} - {record.key for record in (*ended, *rounds.first.stopped)}
    jobs = [
        Job(trial.key, trial.key, 1.0 + trial.seed, partial(make_slowly, trial), trial.to_dict())
        for trial in trials
        if trial.key in left
    ]
    run_jobs(jobs, store, executor, Console(stderr=True), rounds)


def outcomes(folder: Path) -> dict[str, tuple[str, str | None]]:
    """What came of each run, in the order of the plan; the last word of each."""
    found = {record.key: (record.status, record.error) for record in RunStore(folder / "runs.jsonl").read()}
    return {trial.key: found[trial.key] for trial in PLAN.trials() if trial.key in found}


if __name__ == "__main__":
    SECONDS = 0.2
    make(Path(sys.argv[1]), ProcessExecutor(2, threads=1))

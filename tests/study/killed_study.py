"""A study whose driver or worker is killed at random moments, against one that was left alone.

    python tests/study/killed_study.py --runs 60 --kills 20

SIGKILL meets the driver or one of its workers, while they start too. A driver that was killed is started again, and its
workers must have ended by themselves. In the end each run is there once, equal to the undisturbed one bit by bit. A
study that ends before all kills are spent is followed by another one.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from rich.console import Console
from torch import nn
from torch.utils.data import TensorDataset

from normlab.nn import build_norm
from normlab.study.compare import make_job
from normlab.study.executors import ProcessExecutor, run_jobs
from normlab.study.plan import Trial, grid
from normlab.study.record import Record
from normlab.study.store import RunStore

NORMS = ["batch", "group", "layer", "running"]
TASK = Trial(model=f"{__file__}:make_model", data=f"{__file__}:make_data", epochs=4)
WORKERS_END = 60.0  # seconds on a busy machine, for one that is still starting; else one is enough


def make_data() -> tuple[TensorDataset, TensorDataset]:
    """Noise of three classes, which differ in their level."""
    x, y = torch.randn(480, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(480) % 3
    x += y[:, None, None]
    return TensorDataset(x[:400], y[:400]), TensorDataset(x[400:], y[400:])


def make_model(norm: str) -> nn.Module:
    """A small net with dropout."""
    layers = nn.Conv1d(4, 8, 3), build_norm(norm, 8, 1), nn.ReLU(), nn.Dropout(0.1), nn.Flatten(), nn.Linear(16, 3)
    return nn.Sequential(*layers)


def trials_of(runs: int) -> list[Trial]:
    """So many small runs."""
    return grid(NORMS, [4], [0.05], list(range(runs // len(NORMS))), TASK)


def study(folder: Path, runs: int) -> None:
    """Make the runs that the folder does not hold."""
    store = RunStore(folder / "runs.jsonl")
    kept = {record.key for record in store.read()}
    jobs = [make_job(trial, None) for trial in trials_of(runs) if trial.key not in kept]
    run_jobs(jobs, store, ProcessExecutor(2, threads=1), Console())


def figures(record: Record) -> str:
    """All that a run came to but its times, to the last bit."""
    values = record.to_json()
    epochs = [{name: value for name, value in row.items() if name != "seconds"} for row in values["epochs"]]
    return json.dumps({**values, "epochs": epochs, "seconds": None, "finished_at": None}, sort_keys=True)


@dataclass
class Outcome:
    """Of one disturbed study: how often it was killed, and what is wrong with it in the end."""

    drivers: int
    workers: int
    wrong: list[str]


def disturbed(folder: Path, runs: int, kills: int, draw: random.Random) -> Outcome:
    """Start a study until it ends, and kill its driver or a worker up to `kills` times."""
    outcome = Outcome(0, 0, [])
    while True:
        driver = psutil.Popen([sys.executable, __file__, "--study", str(folder), "--runs", str(runs)])
        while outcome.drivers + outcome.workers < kills and workers_of(driver):
            time.sleep(draw.uniform(0.0, 4.0))
            workers = workers_of(driver)
            if workers and draw.random() < 0.5:
                with suppress(psutil.NoSuchProcess):  # it has just ended
                    draw.choice(workers).kill()
                    outcome.workers += 1
            elif workers:
                driver.kill()
                outcome.drivers += 1
                outcome.wrong += ["a worker outlived its driver"] * left_after(WORKERS_END, workers)
        code = driver.wait(600)
        if code != -signal.SIGKILL:
            outcome.wrong += [f"the study ended with exit code {code}"] * (code != 0)
            return outcome


def workers_of(driver: psutil.Popen) -> list[psutil.Process]:
    """The workers, as soon as there are any; none if the driver has ended."""
    while driver.poll() is None:
        with suppress(psutil.NoSuchProcess):
            if found := [one for one in driver.children() if "spawn_main" in " ".join(one.cmdline())]:
                return found
        time.sleep(0.05)
    return []


def left_after(seconds: float, workers: list[psutil.Process]) -> int:
    """How many of the processes are still there; it waits so long at most."""
    deadline = time.monotonic() + seconds
    while (left := sum(map(_runs, workers))) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _runs(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


def compare(whole: Path, other: Path) -> list[str]:
    """What differs between two studies."""
    wanted = {record.key: figures(record) for record in RunStore(whole / "runs.jsonl").read()}
    found = RunStore(other / "runs.jsonl").read()
    keys = [record.key for record in found]
    wrong = [f"{key} is missing" for key in wanted.keys() - set(keys)]
    wrong += [f"{key} was made {keys.count(key)} times" for key in set(keys) if keys.count(key) > 1]
    return wrong + [f"{one.key} differs: {figures(one)}" for one in found if figures(one) != wanted.get(one.key)]


def killed_studies(runs: int, kills: int, seed: int = 0) -> Outcome:
    """Spend so many kills; what was killed, and what was wrong in the end."""
    draw, total = random.Random(seed), Outcome(0, 0, [])
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole")
        study(whole, runs)
        number = 0
        while total.drivers + total.workers < kills:
            other = Path(folder, str(number))
            found = disturbed(other, runs, kills - total.drivers - total.workers, draw)
            total.drivers += found.drivers
            total.workers += found.workers
            total.wrong += found.wrong + compare(whole, other)
            number += 1
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--study", type=Path, help="only make the runs of this folder")
    a = parser.parse_args()
    if a.study:
        study(a.study, a.runs)
        return
    found = killed_studies(a.runs, a.kills, a.seed)
    print(f"{found.drivers} drivers and {found.workers} workers killed; wrong: {found.wrong or 'nothing'}")
    sys.exit(bool(found.wrong))


if __name__ == "__main__":
    main()

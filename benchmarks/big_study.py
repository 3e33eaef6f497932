"""How long the commands take on a study of 10,000 runs.

    python benchmarks/big_study.py [--seeds 10] [--out benchmarks/results/big_study.jsonl]

The store is made by code, with the start and the record of each run. One run is made. The others have as long a curve
and activations as it, other numbers, and the fingerprint of here and now. Each command is timed in a new process, its
start included, three times: the median of its seconds, and of those of the processor. `start` imports what the report
needs, and does no more. `resume` finds out which runs are left; its imports are not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from normlab.study.fingerprint import fingerprint
from normlab.study.lines import seal
from normlab.study.plan import PLAN, Plan, Trial
from normlab.study.record import Record
from normlab.study.trial import environment, run_trial

RUNS, ROUNDS = 10_000, 3
NORMS = ["batch", "renorm", "group", "instance", "layer", "rms", "running", "frozen", "filter_response", "evonorm_s0"]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
START = "import normlab.cli, normlab.study.results, matplotlib.backends.backend_agg, scipy.special"
RESUME = """
import sys, time
from pathlib import Path
from normlab.study.compare import _Study
from normlab.study.plan import PLAN, Plan
from normlab.study.lines import uncollected
wall, cpu = time.perf_counter(), time.process_time()
with uncollected():
    trials = Plan.read(Path(sys.argv[1], PLAN)).trials()
    left = _Study(trials, Path(sys.argv[1]), None, 1, stop_beaten=False)
    assert len(left.kept()) == len(trials)
print(time.perf_counter() - wall, time.process_time() - cpu)
"""


def make_study(folder: Path, seeds: int) -> None:
    """Plan and store of a study in which all runs have ended."""
    rates = np.geomspace(0.001, 3, RUNS // (len(NORMS) * len(SIZES) * seeds)).round(5).tolist()
    plan = Plan(norms=NORMS, batch_sizes=SIZES, lrs=rates, seeds=list(range(seeds)), images=2000)
    torch.set_num_threads(1)
    made = run_trial(Trial(norm="running", batch_size=4, images=2000))
    rng = np.random.default_rng(0)
    (folder / PLAN).write_text(plan.to_toml())
    with open(folder / "runs.jsonl", "wb") as file:
        for trial in plan.trials():
            record = replace(_run(trial, made, rng), made_by=fingerprint(trial, None, 1))
            file.write(seal({"key": trial.key, "host": "here", "process": 7, "started": made.finished_at, "where": ""}))
            file.write(seal(record.to_json()))


def _run(trial: Trial, made: Record, rng: np.random.Generator) -> Record:
    """A record as `made`, with other numbers. The high rates diverge now and then."""
    record = replace(made, key=trial.key, settings=trial.to_dict())
    if trial.lr > 1 and rng.random() < 0.3:
        return replace(record, status="diverged", diverged_at_step=int(rng.integers(1, made.steps)))
    quality = 0.95 - 0.05 * NORMS.index(trial.norm) / len(NORMS) - 0.02 * abs(np.log10(trial.lr) + 1)
    accuracy = float(np.clip(quality + rng.normal(0, 0.005), 0, 1))
    figures = {"loss": 3 * (1 - accuracy), "accuracy": accuracy}
    losses = np.asarray(made.curve["loss"]) * rng.uniform(0.9, 1.1, len(made.curve["loss"]))
    return replace(
        record,
        epochs=[{"epoch": 1, "train": figures, "valid": figures, "seconds": float(rng.uniform(2, 3))}],
        curve={"step": made.curve["step"], "loss": losses.tolist()},
    )


def timed(*command: str) -> tuple[float, float]:
    """Seconds of a new process, and those of the processor."""
    before = os.times()
    done = subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    after = os.times()
    if done.returncode:
        sys.exit(done.stderr)
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return after.elapsed - before.elapsed, cpu


def resumed(folder: Path) -> tuple[float, float]:
    """Seconds of a driver that finds nothing to do, and those of the processor."""
    done = subprocess.run([sys.executable, "-c", RESUME, folder], check=True, capture_output=True, text=True)
    wall, cpu = map(float, done.stdout.split())
    return wall, cpu


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="of each setting; the more, the fewer rates")
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_study(folder, a.seeds)
        commands: dict[str, Callable[[], tuple[float, float]]] = {
            "start": lambda: timed("-c", START),
            "status": lambda: timed("-m", "normlab.cli", "study", "status", str(folder)),
            "report": lambda: timed("-m", "normlab.cli", "study", "report", str(folder)),
            "resume": lambda: resumed(folder),
        }
        found: dict[str, Any] = {"megabytes": round((folder / "runs.jsonl").stat().st_size / 2**20, 1)}
        for name, command in commands.items():
            walls, cpus = zip(*(command() for _ in range(ROUNDS)), strict=True)
            found[name] = {"seconds": round(median(walls), 2), "of the processor": round(median(cpus), 2)}
            print(f"{name}: {median(walls):.2f} s, of the processor {median(cpus):.2f} s", flush=True)
    if a.out:
        with a.out.open("a") as file:
            file.write(json.dumps({"seeds": a.seeds, **found, **environment()}) + "\n")


if __name__ == "__main__":
    main()

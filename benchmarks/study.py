"""What a study costs beside its runs, and what a second process gains.

    python benchmarks/study.py [--runs 60] [--out benchmarks/results/study.json]

The same runs are made in one process and in two, each with one thread, in turn. `speed-up` is the ratio of the two
durations, the start of the processes included. That takes four seconds, most of them torch's, so a study of half a
minute gains less. The overhead is measured on runs that do nothing, so many that the start does not count: what each
adds to the study, with the two lines of the store. Run it on an idle machine of two cores.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from io import StringIO
from pathlib import Path
from statistics import median

from rich.console import Console

from normlab.study.compare import make_job
from normlab.study.executors import Job, ProcessExecutor, run_jobs
from normlab.study.plan import Trial, grid
from normlab.study.record import Record
from normlab.study.store import RunStore
from normlab.study.trial import environment

ROUNDS, EMPTY_RUNS = 3, 500


def duration(jobs: Sequence[Job], workers: int) -> float:
    """Seconds of a study."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        executor = ProcessExecutor(workers, threads=1)
        run_jobs(jobs, RunStore(Path(folder, "runs.jsonl")), executor, Console(file=StringIO()))
        return time.perf_counter() - start


def nothing(number: int, tell: object) -> Record:
    """A run that does nothing."""
    return Record(str(number), {}, "finished")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=60)
    parser.add_argument("--out", type=Path)
    a = parser.parse_args()
    load = os.getloadavg()[0]
    trials = grid(["batch"], [32], [0.1], list(range(a.runs)), Trial(images=10_000))
    jobs = [make_job(trial, None) for trial in trials]
    ratios = [duration(jobs, 1) / duration(jobs, 2) for _ in range(ROUNDS)]
    empty = [Job(str(number), "nothing", 1.0, partial(nothing, number), {}) for number in range(EMPTY_RUNS)]
    overhead = (duration(empty, 1) - duration(empty[:1], 1)) / (EMPTY_RUNS - 1)
    found = {"speed-up": median(ratios), "overhead in ms": 1000 * overhead, "load before": load}
    print(", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    if a.out:
        a.out.write_text(json.dumps({**found, "rounds": ratios, **environment()}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What two constants of running batch norm do, both of which depend on the size of the batch.

    python studies/flagship/constants.py

With N images, γ and β learn at √(N/S) of the learning rate, at most 1. A batch's share in the averages of gradients
grows where the cosine of innovation and drift is above T/N. Other values of S and T are tried at batch 2, 8 and 32, on
two nets:

- the lesson's net, MNIST, one epoch, a constant rate of 1, where γ and β that move fast do harm;
- the net and images of `contrast.py`, 4,000 images, where γ and β that move slowly do harm.

Each run is kept in `constants.jsonl` as it ends. A command started again makes the runs that are missing. At the end
the script prints accuracy and training loss, mean and deviation over three seeds. NOTES.md has them under "γ and β
learn at √(N/64)".
"""

import argparse
import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

from contrast import train_residual_net
from rich.console import Console

from normlab.kernels import cpu
from normlab.study.executors import Job, run_jobs
from normlab.study.plan import Trial
from normlab.study.record import Record
from normlab.study.store import RunStore
from normlab.study.summary import Spread
from normlab.study.trial import run_trial
from normlab.training import Callback

STORE = RunStore(Path(__file__).parent / "constants.jsonl")
CONSTANTS = (
    (64, 0.2),
    (8, 0.2),
    (16, 0.2),
    (32, 0.2),
    (200, 0.2),
    (64, 0.0),
    (64, 0.6),
)  # S and T; the first pair is the rule's
PEAKS = {2: 0.1, 8: 0.4, 32: 1.6}
SEEDS = range(3)


def train(net: str, images: float, drift: float, batch_size: int, seed: int, tell: Callback) -> Record:
    name = key(net, images, drift, batch_size, seed)
    with cpu.use_constants(tolerated_drift=drift, steady_images=images):
        if net == "resnet":
            record = train_residual_net(name, "running", batch_size, PEAKS[batch_size], seed, tell)
        else:
            trial = Trial("running", batch_size, 1.0, seed, schedule="constant")
            record = replace(run_trial(trial, callbacks=(tell,)), key=name)
    return replace(record, settings={**record.settings, "model": net, "S": images, "T": drift})


def key(*run: object) -> str:
    return "-".join(map(str, run))


def make_job(net: str, images: float, drift: float, batch_size: int, seed: int) -> Job:
    run = (net, images, drift, batch_size, seed)
    label = f"{net} S {images} T {drift} batch {batch_size} seed {seed}"
    return Job(key(*run), label, 1 / batch_size, partial(train, *run), {"norm": "running"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    a = parser.parse_args()
    kept = {record.key for record in STORE.read() if record.status != "failed"}
    settings = [(net, *constants, size) for net in ("convnet", "resnet") for size in PEAKS for constants in CONSTANTS]
    jobs = [
        make_job(*setting, seed)
        for setting, seed in itertools.product(settings, SEEDS)
        if key(*setting, seed) not in kept
    ]
    run_jobs(jobs, STORE, a.workers, Console())
    ended = {record.key: record for record in STORE.read()}
    for setting in settings:
        found = [ended[key(*setting, seed)].epochs for seed in SEEDS]
        losses = Spread.of([epochs[-1]["train"]["loss"] for epochs in found])
        print(*setting, Spread.of([epochs[-1]["valid"]["accuracy"] for epochs in found]), "training loss", losses)


if __name__ == "__main__":
    main()

"""A residual net on images of very different contrast, at batch 2.

    python studies/flagship/contrast.py [--norms running group batch]

4,000 images of MNIST are each multiplied by exp(0.7 z) and shifted by 0.7 z', with z and z' from the normal
distribution. Training is one epoch of plain SGD, one-cycle. Each run is kept in `contrast.jsonl` as it ends. A
command started again makes the runs that are missing. At the end the script prints the accuracy on 2,000 test images,
made in the same way: mean and deviation over three seeds. NOTES.md has it under "The own part of B".
"""

import argparse
import itertools
import time
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from normlab.data import TensorBatches, load_dataset
from normlab.models import build_model
from normlab.study.executors import Job, run_jobs
from normlab.study.record import Record
from normlab.study.schedules import SCHEDULES
from normlab.study.store import RunStore
from normlab.study.summary import Spread
from normlab.study.trial import make_record
from normlab.training import Callback, Learner, Metrics, ScheduleParameter, accuracy

STORE = RunStore(Path(__file__).parent / "contrast.jsonl")
LRS, SEEDS, SPREAD = (0.01, 0.03, 0.1, 0.3), range(3), 0.7


def with_drawn_contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    factors, shifts = torch.randn(2, len(images), 1, 1, 1, generator=generator) * SPREAD
    return (images - 0.13) / 0.31 * factors.exp() + shifts


def train(norm: str, lr: float, seed: int, tell: Callback) -> Record:
    return train_residual_net(key(norm, lr, seed), norm, 2, lr, seed, tell)


def train_residual_net(key: str, norm: str, batch_size: int, lr: float, seed: int, tell: Callback) -> Record:
    mnist = load_dataset("mnist")
    drawn = torch.Generator().manual_seed(100)
    x_train, x_valid = (with_drawn_contrast(part, drawn) for part in (mnist.x_train[:4000], mnist.x_valid[:2000]))
    torch.manual_seed(seed)
    model = build_model("resnet", norm, 10, 1)
    learner = Learner(
        model,
        TensorBatches(x_train, mnist.y_train[:4000], batch_size, shuffle=True, seed=seed),
        TensorBatches(x_valid, mnist.y_valid[:2000], 250),
        optimizer=torch.optim.SGD(model.parameters(), lr=lr),
        callbacks=[Metrics(accuracy=accuracy), ScheduleParameter("lr", SCHEDULES["one-cycle"](lr)), tell],
    )
    start = time.perf_counter()
    learner.fit(1)
    return make_record(
        key,
        settings={"norm": norm, "batch_size": batch_size, "lr": lr, "seed": seed},
        epochs=learner.history,
        losses=[],
        diverged_at_step=None,
        seconds=time.perf_counter() - start,
        parameters=sum(part.numel() for part in model.parameters()),
    )


def key(norm: str, lr: float, seed: int) -> str:
    return f"{norm}-{lr:g}-{seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", default=("running", "group", "batch"), help="norms to run")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    a = parser.parse_args()
    kept = {record.key for record in STORE.read() if record.status != "failed"}
    jobs = [
        Job(key(*run), f"{run[0]:<8} lr {run[1]:<5g} seed {run[2]}", 1.0, partial(train, *run), dict(norm=run[0]))
        for run in itertools.product(a.norms, LRS, SEEDS)
        if key(*run) not in kept
    ]
    run_jobs(jobs, STORE, a.workers, Console())
    ended = {record.key: record for record in STORE.read() if record.status != "failed"}
    for norm, lr in itertools.product(a.norms, LRS):
        found = [ended[key(norm, lr, seed)].final("accuracy") for seed in SEEDS]
        print(f"{norm:8} lr {lr:<5g} {Spread.of(found)}")


if __name__ == "__main__":
    main()

"""Fits in several processes, which the tests compare with one; and some that are killed.

python tests/training/several.py FOLDER 10    # kills: how long the others lived, and whether the fit goes on
"""

import copy
import importlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from keeping import KEEPING, norm_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from normlab.data import TensorBatches
from normlab.nn import FrozenBatchNorm2d, GroupNorm, RunningBatchNorm2d, SyncBatchNorm2d
from normlab.surgery import FreezeNorms, Recalibrate, SaveBest, recalibrate
from normlab.training import (
    EMA,
    Callback,
    Checkpoint,
    Distributed,
    Learner,
    Metrics,
    Recorder,
    ScheduleParameter,
    StopAtNonFinite,
    load_checkpoint,
    schedules,
)
from normlab.training.metrics import mean_over_samples

EPOCHS = 10  # of a fit that is killed
SAMPLES, BATCH = 37, 6  # the last batch has one sample, so that parts are empty
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
NORMS = {
    "sync": SyncBatchNorm2d,
    "group": lambda channels: GroupNorm(channels, 2),
    "batch": nn.BatchNorm2d,
    "running": RunningBatchNorm2d,
}
CASES: dict[str, dict[str, Any]] = {
    "sync": {},
    "group": {"norm": "group"},
    "DataLoader": {"loader": "DataLoader"},
    "DataLoader, workers": {"loader": "DataLoader", "workers": 2},
    "dicts": {"loader": "dicts", "norm": "group"},
    "accumulation": {"norm": "group", "accumulate": 3},
    "a step function": {"step_func": lambda batch, model: step(batch, model)},
    "of unknown length": {"loader": "of unknown length", "norm": "group", "accumulate": 3},
    "own statistics": {"norm": "batch", "first": "every norm", "epochs": 1, "validates": False, "with": ["EMA"]},
    "running": {"norm": "running"},
    "a moving average": {"norm": "batch", "with": ["EMA"]},
    "a moving average, measured": {"norm": "batch", "with": ["EMA, measured"]},
    "frozen norms": {"with": ["FreezeNorms"]},
    "frozen norms with own statistics": {"norm": "batch", "with": ["FreezeNorms"]},
    "measured and saved": {"with": ["EMA", "Recalibrate", "SaveBest"]},
    "measured and saved, own statistics": {"norm": "batch", "with": ["Recalibrate, in any order", "SaveBest"]},
    "saved, own statistics": {"norm": "batch", "with": ["SaveBest"]},
    "float16": {"norm": "running", "precision": "float16", "accumulate": 2},
}


# What does not depend on the number of processes.
ALIKE = [name for name, case in CASES.items() if case.get("norm") not in ("batch", "running")]
IN_FLOAT64 = [name for name in ALIKE if name not in ("DataLoader, workers", "float16")]  # of one epoch


def step(batch, model):
    """As the learner does it without one."""
    output = model(batch[0])
    return nn.functional.cross_entropy(output, batch[1]), output, batch[1]


@mean_over_samples
def right(output, targets):
    """As `accuracy`, in the type of the output."""
    return (output.argmax(1) == targets).to(output.dtype).mean()


class EveryNorm(nn.Module):
    """The mean of all norms with statistics, and of torch's, of what comes in."""

    def __init__(self, channels: int):
        super().__init__()
        norms = {name: norm_of(name, channels, 2) for name in KEEPING}
        self.norms = nn.ModuleDict({**norms, "torch": nn.BatchNorm2d(channels)})

    def forward(self, x):
        return sum(norm(x) for norm in self.norms.values()) / len(self.norms)


class Stream:
    """Batches that do not say how many they are."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(SAMPLES) % 3
    return torch.randn(SAMPLES, 2, 5, 5, generator=generator) + y.view(-1, 1, 1, 1), y


def learner_of(
    norm: str = "sync",
    loader: str = "ours",
    workers: int = 0,
    callbacks=(),
    dropout: float = 0,
    first=None,
    validates=True,
    dtype=torch.float32,
    optimizer=SGD,
    **options,
) -> Learner:
    torch.manual_seed(0)
    kind = NORMS[norm]
    start = EveryNorm(2) if first else nn.Identity()
    layers = start, nn.Conv2d(2, 4, 3), kind(4), nn.ReLU(), nn.Conv2d(4, 4, 2), kind(4), nn.Flatten()
    model = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(16, 3)).to(dtype)
    x, y = data()
    x = x.to(dtype)
    train: Any = TensorBatches(x, y, BATCH, shuffle=True)
    if loader == "DataLoader":
        train = DataLoader(TensorDataset(x, y), BATCH, shuffle=True, num_workers=workers)
    if loader == "dicts":
        train = [{"image": a, "label": b, "name": ["a"] * len(a)} for a, b in train]
    if loader == "of unknown length":
        train = Stream(train)
    valid = TensorBatches(x, y, 9) if validates else None
    callbacks = [Metrics(right=right), Recorder(), Distributed(timeout=60), *callbacks]
    return Learner(model, train, valid, optimizer=optimizer(model.parameters()), callbacks=callbacks, **options)


class States(Callback):
    """Keeps those of the models that were validated, and of the averages after each epoch."""

    order = 50

    def __init__(self):
        self.validated: list[dict[str, torch.Tensor]] = []
        self.averages: list[dict[str, torch.Tensor]] = []

    def after_loss(self) -> None:
        if not self.learner.training and self.learner.batch == 0:
            self.validated.append(copy.deepcopy(self.learner.model.state_dict()))

    def after_epoch(self) -> None:
        self.averages += [copy.deepcopy(one.model.state_dict()) for one in self.learner.callbacks if is_ema(one)]


class Frozen(Callback):
    """Keeps the means of frozen norms after each epoch."""

    order = -300  # before those of the processes are averaged

    def __init__(self):
        self.means: list[torch.Tensor] = []

    def begin_validate(self) -> None:
        frozen = [norm for norm in self.learner.model.modules() if isinstance(norm, FrozenBatchNorm2d)]
        self.means += [norm.running_mean.clone() for norm in frozen]


def is_ema(callback: Callback) -> bool:
    return isinstance(callback, EMA)


def callback_of(kind: str, dtype: torch.dtype, folder: Path) -> Callback:
    x, y = data()
    x = x.to(dtype)
    in_any_order = DataLoader(TensorDataset(x, y), BATCH, shuffle=True)  # each rank draws another
    return {
        "EMA": lambda: EMA(0.9),
        "EMA, measured": lambda: EMA(0.9, statistics=lambda model: recalibrate(model, in_any_order)),
        "FreezeNorms": lambda: FreezeNorms(0.6),
        "Recalibrate": lambda: Recalibrate([(x, y)]),
        "Recalibrate, in any order": lambda: Recalibrate(in_any_order),
        "SaveBest": lambda: SaveBest(folder / f"of rank {os.environ.get('RANK')}", keep=2),
    }[kind]()


def fit(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """What the fit of a case ended with."""
    options = dict(CASES[name])
    epochs = options.pop("epochs", 2 if dtype is torch.float32 else 1)
    added = {kind: callback_of(kind, dtype, folder / name) for kind in options.pop("with", [])}
    states, frozen = States(), Frozen()
    learner = learner_of(callbacks=[*added.values(), states, frozen], dtype=dtype, **options)
    history = learner.fit(epochs)
    return {
        "state": learner.model.state_dict(),
        "averages": [*states.averages, *(one.model.state_dict() for one in filter(is_ema, learner.callbacks))],
        "validated": states.validated,
        "frozen": frozen.means,
        "figures": [list(row[part].values()) for row in history for part in ("train", "valid") if part in row],
        "losses": learner.callbacks[1].losses,
    }


def poisoned() -> dict[str, Any]:
    """One sample, in the part of one rank, is not a number."""
    guard = StopAtNonFinite()
    learner = learner_of("group", callbacks=[guard])
    learner.train.dataset.x[17] = torch.nan
    with warnings.catch_warnings(record=True):
        learner.fit(2)
    return {"step": guard.step, "where": guard.where}


class Slowly(Callback):
    """So that a fit is not over before it is killed."""

    def begin_batch(self) -> None:
        time.sleep(float(os.environ.get("NAP", "0")))


def killed_learner(folder: Path) -> Learner:
    """One whose fit goes on: norms with statistics of their own, in the middle of a group too; else as the example."""
    return learner_of(
        "batch",
        accumulate=3,
        dropout=0.2,
        precision="bfloat16",
        optimizer=partial(torch.optim.AdamW, lr=3e-3),
        callbacks=[
            EMA(0.98),
            ScheduleParameter("lr", schedules.cosine(3e-3, 0.0)),
            FreezeNorms(0.2, only="5"),
            Recalibrate([data()]),
            SaveBest(folder / "best", keep=2),
            Slowly(),
        ],
    )


def fit_on(folder: Path) -> None:
    """A fit that goes on from its checkpoint."""
    checkpoint = Checkpoint(folder / "a.ckpt", batches=2)
    learner = killed_learner(folder)
    learner.callbacks.append(checkpoint)
    checkpoint.resume(learner)
    folder.mkdir(exist_ok=True)
    (folder / f"{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    history = learner.fit(EPOCHS)
    rows = [[row["train"], row["valid"]] for row in history]
    states = learner.model.state_dict(), next(filter(is_ema, learner.callbacks)).model.state_dict()
    torch.save([rows, learner.callbacks[1].losses, *states], folder / f"{dist.get_rank()}.pt")


def kill(folder: Path, seed: int) -> None:
    """Kills one of two ranks of `fit_on` at a random moment, and waits for the end of torchrun."""
    draw = random.Random(seed)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    settings = {**os.environ, "NAP": "0.02", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*run, __file__, str(folder)], env=settings, stderr=subprocess.DEVNULL)
    try:
        files = [folder / f"{rank}.pid" for rank in range(2)]
        while not all(file.exists() and file.read_text() for file in files):
            assert process.poll() is None
            time.sleep(0.02)
        ranks = [int(file.read_text()) for file in files]
        time.sleep(draw.uniform(0, 1.5))
        os.kill(draw.choice(ranks), signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)


def fully_sharded(folder: Path) -> dict[str, Any]:
    """A net of our norms under FSDP2: it trains, is saved in parts, loaded into another net, and goes on the same."""
    first, second = sharded(0), sharded(1)
    losses = [train_step(*first, *half()) for _ in range(3)]
    state = get_state_dict(*first)
    dcp.save({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder / "fsdp")
    state = get_state_dict(*second)
    dcp.load({"model": state[0], "optimizer": state[1]}, checkpoint_id=folder / "fsdp")
    set_state_dict(*second, model_state_dict=state[0], optim_state_dict=state[1])
    again = [[train_step(*one, *half()) for _ in range(2)] for one in (first, second)]
    options = StateDictOptions(full_state_dict=True)
    states = [get_model_state_dict(one[0], options=options) for one in (first, second)]
    return {"losses": losses, "again": again, "states": states}


def whole_net(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    layers = nn.Conv2d(2, 4, 3), SyncBatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 2), GroupNorm(4, 2), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(16, 3))
    return model, SGD(model.parameters())


def sharded(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, _ = whole_net(seed)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, SGD(model.parameters())


def half() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data()
    part = slice(18 * dist.get_rank(), 18 * (dist.get_rank() + 1))
    return x[part], y[part]


def train_step(model, optimizer, x, y) -> float:
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def fits(folder: Path) -> dict[torch.dtype, dict[str, Any]]:
    """What each case ended with, by the type of its numbers."""
    return {
        torch.float32: {name: fit(name, folder) for name in CASES},
        torch.float64: {name: fit(name, folder / "float64", torch.float64) for name in IN_FLOAT64},
    }


def jobs_of_two(folder: Path) -> dict[str, Any]:
    """All that the tests ask two ranks for."""
    fit_on(folder / "whole")
    return {"fits": fits(folder), "sharded": fully_sharded(folder), "poisoned": poisoned()}


def rank_of(folder: Path, rank: int, count: int, job: Callable[[Path], Any]) -> None:
    """A rank, started without torchrun."""
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    result = job(folder)
    if result is not None:
        torch.save(result, folder / f"{rank}.pt")


def run(folder: Path, count: int, job: Callable[[Path], Any]) -> None:
    """A job in so many ranks."""
    folder.mkdir(exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=rank_of, args=(folder, rank, count, job)) for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes), folder.name


def are_equal(found: Any, expected: Any) -> bool:
    """Bit by bit."""
    try:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


def main() -> None:
    """In a rank that torchrun started: `fit_on`. Else the jobs that the tests, or a number of kills, ask for."""
    folder = Path(sys.argv[1])
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        fit_on(folder)
        return
    importlib.import_module("torch._dynamo")  # once, as each rank would at its first step
    if sys.argv[2] == "resume":
        run(folder, 2, fit_on)
    elif sys.argv[2] == "jobs":
        run(folder / "2", 2, jobs_of_two)
        run(folder / "4", 4, lambda folder: {"fits": fits(folder)})
    else:
        run(folder / "whole", 2, fit_on)
        for seed in range(int(sys.argv[2])):
            one = folder / str(seed)
            one.mkdir()
            seconds = kill(one, seed)
            load = (one / "a.ckpt").exists() and load_checkpoint(one / "a.ckpt")
            run(one, 2, fit_on)
            same = all(
                map(are_equal, *([torch.load(f / f"{n}.pt") for n in range(2)] for f in (one, folder / "whole")))
            )
            place = f"epoch {load['epoch']}, batch {load['batches']}" if load else "no checkpoint yet"
            print(f"{seed}: ended after {seconds:.1f} s, {place}, goes on the same: {same}", flush=True)


if __name__ == "__main__":
    main()

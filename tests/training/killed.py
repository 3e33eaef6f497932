"""Fits that are killed at random moments and go on from their checkpoint, against one that was left alone.

    python tests/training/killed.py --kills 30    # every setting of SETTINGS: how many ended the same, bit by bit

Each fit is a process of its own, killed with SIGKILL. Checkpoints are so frequent that a part of the kills falls into
the writing of one.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from normlab.data import TensorBatches
from normlab.nn import RunningBatchNorm1d
from normlab.surgery import FreezeNorms
from normlab.training import EMA, Checkpoint, Learner, Metrics, Recorder, ScheduleParameter, accuracy, schedules

SAMPLES, BATCH, EPOCHS = 203, 4, 3
SETTINGS = {
    "ours": {},
    "DataLoader": {"loader": "DataLoader"},
    "accumulation": {"accumulate": 3},
    "bfloat16": {"precision": "bfloat16"},
    "float16, accumulation": {"precision": "float16", "accumulate": 2},
    "DataLoader, accumulation, bfloat16": {"loader": "DataLoader", "accumulate": 2, "precision": "bfloat16"},
    "compiled": {"compile": True},
    "average, frozen norms, float16, accumulation": {"average": True, "precision": "float16", "accumulate": 2},
    "average, frozen norms, DataLoader": {"average": True, "loader": "DataLoader"},
}


def learner_of(
    path: Path, loader: str = "ours", average: bool = False, **options
) -> tuple[Learner, Recorder, Checkpoint]:
    """A small net with dropout, running batch norm and AdamW, whose data come in random order."""
    torch.manual_seed(0)
    random.seed(0)
    x, y = torch.randn(SAMPLES, 10), torch.randint(0, 3, (SAMPLES,))
    layers = nn.Linear(10, 16), RunningBatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3)
    model = nn.Sequential(*layers)
    if loader == "ours":
        train = TensorBatches(x, y, BATCH, shuffle=True)
    else:
        train = DataLoader(TensorDataset(x, y), BATCH, shuffle=True, num_workers=2)
    recorder, checkpoint = Recorder(), Checkpoint(path, batches=3)
    rate = ScheduleParameter("lr", schedules.one_cycle(1e-3, 1e-2, 0.0))
    callbacks = [Metrics(accuracy=accuracy), recorder, rate, checkpoint]
    callbacks += [EMA(0.99), FreezeNorms(0.7)] if average else []
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    return Learner(model, train, [(x, y)], optimizer=optimizer, callbacks=callbacks, **options), recorder, checkpoint


def fit(path: Path, out: Path, settings: dict) -> None:
    """Goes on from the checkpoint, if there is one, and writes down to the last bit how it ended."""
    os.setsid()  # a group of its own, with the workers of its DataLoader
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # that batches are skipped
    learner, recorder, checkpoint = learner_of(path, **settings)
    checkpoint.resume(learner)
    history = learner.fit(EPOCHS)
    figures = [[row["epoch"], row["train"], row["valid"]] for row in history]
    models = learner.model, *(one.model for one in learner.callbacks if isinstance(one, EMA))
    state = [[name, part.double().flatten().tolist()] for model in models for name, part in model.state_dict().items()]
    out.write_text(json.dumps([state, figures, recorder.losses, recorder.lrs, learner.step]))


def process(*arguments) -> multiprocessing.Process:
    one = multiprocessing.get_context("fork").Process(target=fit, args=arguments)
    one.start()
    return one


def ended_the_same(settings: dict, kills: int, seed: int = 0) -> list[bool]:
    """For each kill whether the fit that went on ended as the one that was left alone."""
    draw, found = random.Random(seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "whole.json")
        start = time.monotonic()
        process(Path(folder, "whole.ckpt"), whole, settings).join()
        duration = time.monotonic() - start
        for number in range(kills):
            path, out = Path(folder, f"{number}.ckpt"), Path(folder, f"{number}.json")
            killed = process(path, out, settings)
            time.sleep(draw.uniform(0.1, 1) * duration)
            os.kill(killed.pid, signal.SIGKILL)
            killed.join()
            with contextlib.suppress(ProcessLookupError):  # a worker that had just begun does not see that it is alone
                os.killpg(killed.pid, signal.SIGKILL)
            process(path, out, settings).join()
            found.append(out.exists() and out.read_text() == whole.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    a = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    for name in a.settings:
        found = ended_the_same(SETTINGS[name], a.kills)
        good &= all(found)
        print(f"{name}: {sum(found)} of {len(found)} the same", flush=True)
    sys.exit(not good)


if __name__ == "__main__":
    main()

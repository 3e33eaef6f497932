"""Epochs of the lesson's net on MNIST: the flagship against torch's batch norm and the lesson's rule in a plain loop.

    OMP_NUM_THREADS=1 python benchmarks/epoch.py [--batch-size 2] [--out benchmarks/results/epoch.jsonl]

A round runs each of the loops over the same part of an epoch in turn, so that all see the same machine: `plain` loops
are written by hand and keep no figures, `learner` is normlab's with mean loss and accuracy and
the fused optimizer, `JAX` (left out where it is
not installed) a jitted step. Convolutions go the way that is the faster at this batch size, in every loop. What is
compiled is so before the first round. Figures are medians and quartiles over the rounds, of what each loop takes over
what the plain one with torch's batch norm takes. One line is appended, with versions and machine. Run it on an idle
machine.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from loop import LR, by_hand
from normlab.data import TensorBatches, load_dataset
from normlab.kernels import cpu
from normlab.models import build_model
from normlab.study.trial import environment, quick_convolutions
from normlab.training import Learner, Metrics, accuracy

PEER = "plain, torch batch"
Loop = Callable[[TensorBatches], None]


def torch_batch_norm() -> nn.Module:
    """The lesson's net with torch's layers."""
    model = build_model("convnet", "batch", 10, 1)
    for block in model.children():
        if isinstance(block, nn.Sequential):
            block[-1] = nn.BatchNorm2d(block[-1].num_features)
    return model


def plain(build: Callable[[], nn.Module]) -> Loop:
    """The loop by hand of a model."""
    return partial(by_hand, build())


def learner(norm: str, compile: bool = False) -> Loop:
    """A fit of an epoch."""
    model = build_model("convnet", norm, 10, 1)

    def loop(batches: TensorBatches) -> None:
        fitting.train = batches
        fitting.fit(1)

    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=True)
    fitting = Learner(model, (), optimizer=optimizer, callbacks=[Metrics(accuracy=accuracy)], compile=compile)
    return loop


def jax_loop() -> Loop:
    """That of JAX."""
    from jax_net import make_loop

    return make_loop(LR)


LOOPS: dict[str, Callable[[], Loop]] = {
    PEER: partial(plain, torch_batch_norm),
    "plain, batch": partial(plain, partial(build_model, "convnet", "batch", 10, 1)),
    "plain, running": partial(plain, partial(build_model, "convnet", "running", 10, 1)),
    "plain, lesson's rule": partial(plain, partial(build_model, "convnet", "running_lesson", 10, 1)),
    "learner, running": partial(learner, "running"),
    "learner compiled, batch": partial(learner, "batch", compile=True),
    "learner compiled, running": partial(learner, "running", compile=True),
    "JAX, batch": jax_loop,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, help="a round, by default 400; no more than an epoch has")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "epoch.jsonl")
    a = parser.parse_args()
    mnist = load_dataset("mnist")
    images = min(len(mnist.x_train), a.batch_size * (a.steps or 400))
    batches = TensorBatches(mnist.x_train[:images], mnist.y_train[:images], a.batch_size, shuffle=True, seed=0)
    loops: dict[str, Loop] = {}
    for name, make in LOOPS.items():
        torch.manual_seed(0)
        try:
            loops[name] = make()
        except ImportError as error:
            print(f"{name}: left out ({error})")
    found: dict[str, list[float]] = {name: [] for name in loops}
    with quick_convolutions("convnet", a.batch_size):
        for _ in range(a.rounds + 1):
            for name, loop in loops.items():
                start = time.perf_counter()
                loop(batches)
                found[name].append((time.perf_counter() - start) / len(batches))
    found = {name: times[1:] for name, times in found.items()}  # the first round compiles and warms up
    result: dict[str, dict[str, float | list[float]]] = {}
    for name, times in found.items():
        ratios = [mine / theirs for mine, theirs in zip(times, found[PEER], strict=True)]
        quartiles = statistics.quantiles(ratios, n=4)
        result[name] = {"us_per_step": 1e6 * statistics.median(times), "ratio": quartiles[1], "quartiles": quartiles}
        print(f"{name:25} {1e6 * statistics.median(times):8.0f} µs a step, {quartiles[1]:.2f} of {PEER}")
    record = {"batch_size": a.batch_size, "steps": len(batches), "rounds": a.rounds, "kernels": cpu.PATH}
    with a.out.open("a") as file:
        file.write(json.dumps({**record, **environment(), "loops": result}) + "\n")


if __name__ == "__main__":
    main()

"""What it costs to watch the activations while training: steps with `ActivationStats` against the same without.

    OMP_NUM_THREADS=1 python benchmarks/activations.py [--out benchmarks/results/activations.jsonl]

The lesson's net at batch 2 and 64, and a residual net of 13 convolutions on images of 32×32 at batch 64, each with
batch norm and SGD in a hand-written loop; all their modules are watched, at every batch and at the default. Rounds of
ten steps with and ten without take turns, in alternating order. Steps that are looked at, the others and those of the
plain loop each have their median; the figure is what the first two make together, in the share that each has, over
the third: of all rounds, and as quartiles over the rounds. Times are the processor's, which leaves out what others do
on the machine but for their use of caches and memory. One line is appended for each case, with versions and machine.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.models import build_model
from normlab.observe import ActivationStats
from normlab.study.trial import environment

STEPS = 10
CASES = [("convnet", 1, 28, 2), ("convnet", 1, 28, 64), ("resnet", 3, 32, 64)]  # channels, side, batch size
DEFAULT = ActivationStats(nn.Linear(1, 1)).every


def train(model: nn.Module, x: Tensor, y: Tensor, watch: contextlib.AbstractContextManager) -> list[float]:
    """Seconds of the processor that each step of a round takes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()
    clock = []
    with watch:
        for _ in range(STEPS):
            clock.append(time.process_time())
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        clock.append(time.process_time())
    return [end - start for start, end in itertools.pairwise(clock)]


def over_plain(watched: list[list[float]], plain: list[list[float]], every: int) -> float:
    """Time of a step with over that without, from the steps of some rounds, the first of each looked at."""
    looked_at = statistics.median(
        itertools.chain.from_iterable(steps[: STEPS if every == 1 else 1] for steps in watched)
    )
    others = statistics.median(itertools.chain.from_iterable(steps[1:] for steps in watched))
    return (looked_at / every + others * (1 - 1 / every)) / statistics.median(itertools.chain.from_iterable(plain))


def measure(model: nn.Module, x: Tensor, every: int, seconds: float) -> dict[str, Any]:
    """Time with over time without, from as many rounds as fit in so many seconds."""
    y = torch.randint(0, 10, (len(x),))
    train(model, x, y, contextlib.nullcontext())
    rounds: dict[bool, list[list[float]]] = {True: [], False: []}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(rounds[True]) < 4:
        for watched in (False, True) if len(rounds[True]) % 2 else (True, False):
            watch = ActivationStats(model, every=every) if watched else contextlib.nullcontext()
            rounds[watched].append(train(model, x, y, watch))
    ratios = [over_plain([one], [other], every) for one, other in zip(*rounds.values(), strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {"rounds": len(ratios), "ratio": over_plain(*rounds.values(), every), "quartiles": [low, high]}


def main() -> None:
    """Measure, print, and add lines of JSON to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="for each case")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "activations.jsonl")
    a = parser.parse_args()
    for name, channels, side, batch_size in CASES:
        torch.manual_seed(0)
        model = build_model(name, "batch", 10, channels)
        x = torch.randn(batch_size, channels, side, side)
        for every in (1, DEFAULT):
            case = {"model": name, "batch_size": batch_size, "modules": len(ActivationStats(model).modules)}
            found = {**case, "every": every, **measure(model, x, every, a.seconds)}
            low, high = found["quartiles"]
            print(
                f"{name}, batch {batch_size}, every {every}: {found['ratio']:.3f} ({low:.3f} … {high:.3f})", flush=True
            )
            with a.out.open("a") as file:
                file.write(json.dumps({**found, **environment()}) + "\n")


if __name__ == "__main__":
    main()

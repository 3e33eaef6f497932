"""Where the time of a training step of the lesson's net goes, at each batch size, plain and compiled.

    OMP_NUM_THREADS=1 python benchmarks/step.py [--norm running] [--out benchmarks/results/step.jsonl]

A callback reads the clock at each event of the learner. `batch` is what the loader takes, `forward` the model, then
loss, backward pass, optimizer, and `rest` the learner itself with metrics; a compiled step is one piece. Microseconds,
medians over steps; one line for each batch size is appended, with versions and machine. Run it on an idle machine.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from normlab.data import TensorBatches, load_dataset
from normlab.kernels import cpu
from normlab.models import build_model
from normlab.study.trial import environment, quick_convolutions
from normlab.training import Callback, Learner, Metrics, accuracy

PARTS = {
    "batch": ("end", "begin"),
    "forward": ("begin", "pred"),
    "loss": ("pred", "loss"),
    "backward": ("loss", "backward"),
    "optimizer": ("backward", "step"),
}


class Stopwatch(Callback):
    """The time of each event of each step; before the other callbacks of an event, so that theirs is in `rest`."""

    order = -100

    def begin_fit(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._end = time.perf_counter()

    def begin_batch(self) -> None:
        self.steps.append({"end": self._end, "begin": time.perf_counter()})

    def after_pred(self) -> None:
        self.steps[-1]["pred"] = time.perf_counter()

    def after_loss(self) -> None:
        self.steps[-1]["loss"] = time.perf_counter()

    def after_backward(self) -> None:
        self.steps[-1]["backward"] = time.perf_counter()

    def after_step(self) -> None:
        self.steps[-1]["step"] = time.perf_counter()

    def after_batch(self) -> None:
        self._end = self.steps[-1]["after"] = time.perf_counter()


def measure(norm: str, batch_size: int, compiled: bool) -> dict[str, float]:
    """Microseconds of each part of a step, and of the whole."""
    mnist = load_dataset("mnist")
    images = min(len(mnist.x_train), batch_size * 400)
    batches = TensorBatches(mnist.x_train[:images], mnist.y_train[:images], batch_size, shuffle=True, seed=0)
    torch.manual_seed(0)
    model = build_model("convnet", norm, 10, 1)
    watch = Stopwatch()
    learner = Learner(
        model,
        batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01),
        callbacks=[Metrics(accuracy=accuracy), watch],
        compile=compiled,
    )
    with quick_convolutions("convnet", batch_size):
        learner.fit(1)
        learner.fit(2)
    steps = watch.steps[1:]
    found = {part: statistics.median(s[end] - s[start] for s in steps) for part, (start, end) in PARTS.items()}
    found["step"] = statistics.median(s["after"] - s["end"] for s in steps)
    found["rest"] = found["step"] - sum(found[part] for part in PARTS)
    return {part: 1e6 * seconds for part, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", default="running")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 2, 32, 512])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step.jsonl")
    a = parser.parse_args()
    table = Table("batch size", "", *PARTS, "rest", "step, µs", box=None)
    for batch_size in a.batch_sizes:
        for compiled in (False, True):
            found = measure(a.norm, batch_size, compiled)
            how = {"norm": a.norm, "batch_size": batch_size, "compiled": compiled, "kernels": cpu.PATH}
            with a.out.open("a") as file:
                file.write(json.dumps({**how, **environment(), "us": found}) + "\n")
            cells = (f"{found[part]:.0f}" for part in (*PARTS, "rest", "step"))
            table.add_row(str(batch_size), "compiled" if compiled else "plain", *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

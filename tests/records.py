"""Records of runs that never ran, for the tests of what is made of them."""

import math

from normlab.study.plan import Trial, grid
from normlab.study.record import Record


def record(accuracy=None, status="finished", step=None, error=None, points=100, **settings):
    """A run as a `RunStore` keeps it; `points` of its loss, ten steps apart."""
    trial = Trial(**settings)
    loss = None if accuracy is None else 3 * (1 - accuracy)
    last = loss or 1.0
    figures = {"loss": loss, "accuracy": accuracy}
    losses = [last + 2 * math.exp(-i / 9) for i in range(points - 1)] + [None if status == "diverged" else last]
    return Record(
        key=trial.key,
        settings=trial.to_dict(),
        status=status,
        diverged_at_step=step,
        error=error,
        epochs=[{"epoch": 1, "train": figures, "valid": figures}],
        curve={"step": list(range(10, 10 * points + 1, 10)), "loss": losses},
        steps=10 * points,
        seconds=12.5,
        parameters=2916,
        versions={"normlab": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "numpy": "2.4.6"},
        machine={"cpu": "Imaginary 9000", "threads": 2},
        finished_at="2026-03-01T10:11:12+00:00",
    )


def study():
    """Two norms, batch sizes and rates, three seeds: batch norm does not train at batch 2, running diverges at lr 1."""
    runs = []
    for trial in grid(["batch", "running"], [2, 32], [0.1, 1.0], [0, 1, 2], Trial()):
        settings = trial.to_dict()
        if trial.norm == "running" and trial.lr == 1.0 and trial.batch_size == 2:
            runs.append(record(status="diverged", step=41 + trial.seed, **settings))
        elif trial.norm == "batch" and trial.batch_size == 2:
            runs.append(record(0.11 + 0.001 * trial.seed, **settings))
        else:
            bonus = 0.01 if trial.norm == "running" else 0.0
            runs.append(record(0.96 + bonus - 0.02 * (trial.lr == 1.0) + 0.001 * trial.seed, **settings))
    return runs

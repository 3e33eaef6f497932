"""One training run: from a `Trial` to the record that is kept of it."""

import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..observe import ActivationStats, blocks
from ..training import (
    Callback,
    ClipGradients,
    Learner,
    Metrics,
    Recorder,
    ScheduleParameter,
    StopWhenDiverged,
)
from ..training.checks import length
from .plan import Trial
from .record import Record
from .schedules import SCHEDULES
from .tasks import make_data, make_loss, make_metrics, make_model, make_optimizer

CURVE_POINTS = 100
LAYERS, LOOKS = 12, 10

# Up to this batch size torch's own convolutions take half the time of oneDNN's. The other nets gain nothing.
SMALL_BATCH = {"convnet": 8}


def run_trial(trial: Trial, data_dir: str | Path | None = None, callbacks: tuple[Callback, ...] = ()) -> Record:
    """Train as `trial` says, and return the record.

    Training stops at a loss that is not finite: the status is `diverged`, else `finished`. Built-in data are normalised
    by the mean and deviation of the training images. Runs are deterministic on one machine for one number of threads.

    Raises:
        InputError: an unknown norm, model or data set, or a batch size above the number of images.
    """
    learner = build_learner(trial, data_dir, callbacks)
    stats = _activation_stats(learner, trial.epochs)
    learner.callbacks.append(stats)
    record = run_learner(trial, learner)[0]
    return replace(record, more={**record.more, "activations": _activations(stats)})


def run_learner(trial: Trial, learner: Learner) -> tuple[Record, Recorder]:
    """Train what `build_learner` made of `trial`. Returns the record, and the recorder with every step."""
    recorder, guard = Recorder(), StopWhenDiverged()
    learner.callbacks += [recorder, guard]
    start = time.perf_counter()
    with quick_convolutions(trial.model, trial.batch_size):
        learner.fit(trial.epochs)
    record = make_record(
        trial.key,
        settings=trial.to_dict(),
        epochs=learner.history,
        losses=recorder.losses,
        diverged_at_step=guard.step,
        seconds=time.perf_counter() - start,
        parameters=sum(p.numel() for p in learner.model.parameters()),
    )
    return record, recorder


def build_learner(trial: Trial, data_dir: str | Path | None = None, callbacks: tuple[Callback, ...] = ()) -> Learner:
    """The learner of a trial, seeded, with metrics, schedule and clipping as the trial says, and `callbacks`."""
    train, valid = make_data(trial, data_dir)
    model = make_model(trial, data_dir)
    clip = [ClipGradients(trial.clip)] if trial.clip else []
    schedule = ScheduleParameter("lr", SCHEDULES[trial.schedule](trial.lr))
    return Learner(
        model,
        train,
        valid,
        loss_func=make_loss(trial),
        optimizer=make_optimizer(trial, model),
        precision=trial.precision,
        callbacks=[Metrics(**make_metrics(trial)), schedule, *clip, *callbacks],
    )


def _activation_stats(learner: Learner, epochs: int) -> ActivationStats:
    """Of at most `LAYERS` norms and other layers, at about `LOOKS` batches of the run."""
    layers = blocks(learner.model) or {"model": learner.model}
    names = list(layers)[:: -(-len(layers) // LAYERS)]
    batches = length(learner.train)
    every = max(1, epochs * batches // LOOKS) if batches else 50
    return ActivationStats({name: layers[name] for name in names}, every=every)


def _activations(stats: ActivationStats) -> dict[str, Any]:
    """Mean and deviation of each layer's output, and after which steps, in three digits."""
    figures = {"mean": stats.means, "deviation": stats.deviations}
    rounded = {
        figure: {name: [float(f"{value:.3g}") for value in values] for name, values in series.items()}
        for figure, series in figures.items()
    }
    return {"step": list(stats.steps), **rounded}


def make_record(
    key: str,
    *,
    settings: dict[str, Any],
    epochs: list[dict[str, Any]],
    losses: list[float],
    diverged_at_step: int | None,
    seconds: float,
    parameters: int,
) -> Record:
    """The record of a run that ended, with versions, machine and time. Its curve is that of `thin`."""
    return Record(
        key,
        settings,
        status="finished" if diverged_at_step is None else "diverged",
        diverged_at_step=diverged_at_step,
        epochs=epochs,
        curve=thin(losses),
        steps=len(losses),
        seconds=seconds,
        parameters=parameters,
        **environment(),
    )


def thin(losses: list[float]) -> dict[str, list]:
    """A curve of at most 100 points, each the mean over a block of steps, at the block's last step."""
    size = -(-len(losses) // CURVE_POINTS) or 1
    cut = [losses[i : i + size] for i in range(0, len(losses), size)]
    ends = [min((i + 1) * size, len(losses)) for i in range(len(cut))]
    return {"step": ends, "loss": [sum(block) / len(block) for block in cut]}


def environment() -> dict[str, Any]:
    """Versions, machine and the time now."""
    packages = ("normlab", "torch", "numpy")
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {"cpu": _cpu_name(), "threads": torch.get_num_threads()},
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


@contextmanager
def quick_convolutions(model: str, batch_size: int) -> Iterator[None]:
    """Inside, convolutions on a CPU go the faster way for this net and batch size."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TF32 acceleration", category=UserWarning)  # torch, of Intel GPUs
        use = torch.backends.mkldnn.enabled and batch_size > SMALL_BATCH.get(model, 0)
        with torch.backends.mkldnn.flags(enabled=use):  # pyright: ignore[reportArgumentType]
            yield


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"

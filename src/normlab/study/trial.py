"""One training run: from a `Trial` to the record that is kept of it."""

import os
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..data import ImageData, TensorBatches, load_dataset
from ..models import build_model
from ..training import (
    Callback,
    ClipGradients,
    Learner,
    Metrics,
    Recorder,
    ScheduleParameter,
    StopWhenDiverged,
    accuracy,
)
from .plan import Trial
from .record import Record
from .schedules import SCHEDULES

VALID_BATCH = 256
CURVE_POINTS = 100

# Up to this batch size torch's own convolutions take half the time of oneDNN's. The other nets gain nothing.
SMALL_BATCH = {"convnet": 8}


def run_trial(trial: Trial, data_dir: str | Path | None = None, callbacks: tuple[Callback, ...] = ()) -> Record:
    """Train as `trial` says, and return the record.

    Training stops at a loss that is not finite: the status is `diverged`, else `finished`. Data are normalised by the
    mean and deviation of the training images. Runs are deterministic on one machine for one number of threads.

    Raises:
        InputError: an unknown norm, model or data set, or a batch size above the number of images.
    """
    return run_learner(trial, build_learner(trial, data_dir, callbacks))[0]


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
    data = _load_normalized(trial.data, str(data_dir) if data_dir else None)
    images = trial.images or len(data.x_train)
    torch.manual_seed(trial.seed)
    model = build_model(trial.model, trial.norm, len(data.classes), data.x_train.shape[1])
    clip = [ClipGradients(trial.clip)] if trial.clip else []
    schedule = ScheduleParameter("lr", SCHEDULES[trial.schedule](trial.lr))
    return Learner(
        model,
        TensorBatches(data.x_train[:images], data.y_train[:images], trial.batch_size, shuffle=True, seed=trial.seed),
        TensorBatches(data.x_valid, data.y_valid, VALID_BATCH),
        optimizer=torch.optim.SGD(model.parameters(), lr=trial.lr),
        callbacks=[Metrics(accuracy=accuracy), schedule, *clip, *callbacks],
    )


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
def _load_normalized(name: str, data_dir: str | None) -> ImageData:
    """The data set, normalised; kept for the next trial of this process."""
    data = load_dataset(name, data_dir)
    mean, deviation = data.x_train.mean(), data.x_train.std()
    parts = {part: getattr(data, part).sub(mean).div_(deviation) for part in ("x_train", "x_valid")}
    return ImageData(data.name, y_train=data.y_train, y_valid=data.y_valid, classes=data.classes, **parts)


@lru_cache(maxsize=1)
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else platform.processor() or platform.machine()}, {os.cpu_count()} cores"

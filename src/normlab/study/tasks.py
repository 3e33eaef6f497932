"""What a trial trains: network, data, loss, metrics and optimizer, by the names in its settings."""

import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..data import ImageData, TensorBatches, load_dataset
from ..errors import InputError, check, unknown
from ..models import build_model
from ..nn import NORMS
from ..surgery import convert
from ..training import accuracy, dice, mean_iou, parameter_groups
from .named import explain_failure, find_named
from .optimizers import OPTIMIZERS
from .plan import Trial

VALID_BATCH = 256  # images of the built-in data
METRICS: dict[str, Callable[[Any, Any], Any]] = {"accuracy": accuracy, "dice": dice, "mean_iou": mean_iou}


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Inside, torch's operators have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def make_data(trial: Trial, data_dir: str | Path | None = None) -> tuple[Iterable[Any], Iterable[Any]]:
    """The batches for training and for validation.

    A function of the user's gives two data sets, of which loaders are made with the trial's batch size and seed. If it
    takes `batch_size`, it gives the batches itself. It may take `seed` too.

    Raises:
        InputError: there are no such data, they are none, or the user's function fails.
    """
    if not is_own(trial.data):
        data = _load_normalized(trial.data, str(data_dir) if data_dir else None)
        images = trial.images or len(data.x_train)
        x, y = data.x_train[:images], data.y_train[:images]
        train = TensorBatches(x, y, trial.batch_size, shuffle=True, seed=trial.seed)
        return _repeated(train, trial.steps), TensorBatches(data.x_valid, data.y_valid, VALID_BATCH)
    made = _call("data", trial.data, batch_size=trial.batch_size, seed=trial.seed)
    pair = isinstance(made, tuple | list) and len(made) == 2
    check(pair, f"data={trial.data!r}: result", type(made).__name__, "two: data for training, and for validation")
    train, valid = made
    if _is_set(train):
        check(trial.images is None or trial.images <= len(train), "images", trial.images, f"1 to {len(train)}")
        part = train if trial.images is None else torch.utils.data.Subset(train, range(trial.images))
        order = torch.Generator().manual_seed(trial.seed)
        train = DataLoader(part, trial.batch_size, shuffle=True, generator=order)
    else:
        check(trial.images is None, "images", trial.images, "None where data gives batches")
    return _repeated(train, trial.steps), DataLoader(valid, trial.batch_size) if _is_set(valid) else valid


def make_model(trial: Trial, data_dir: str | Path | None = None) -> nn.Module:
    """The network with the norm of the trial, from the trial's seed.

    A function of the user's that takes `norm` puts the norm of that name in by itself. What another one gives is
    converted, see `surgery.convert`. It may take `seed` too, and for built-in data `num_classes` and `in_channels`.

    Raises:
        InputError: there is no such network or norm, or the user's function fails; or nothing could be converted.
    """
    sizes = {"num_classes": 2, "in_channels": 1}
    if not is_own(trial.data):
        data = _load_normalized(trial.data, str(data_dir) if data_dir else None)
        sizes = {"num_classes": len(data.classes), "in_channels": data.x_train.shape[1]}
    seed_all(trial.seed)
    if not is_own(trial.model):
        return build_model(trial.model, trial.norm, **sizes)
    takes_norm = _takes(find_named("model", trial.model), "norm")
    model = _call("model", trial.model, norm=trial.norm, seed=trial.seed, **sizes)
    kind = type(model).__name__
    check(isinstance(model, nn.Module), f"model={trial.model!r}: result", kind, "a torch.nn.Module")
    if takes_norm:
        return model
    converted, report = convert(model, trial.norm)
    cure = "Build it with norms, or let the function take `norm` and put it in."
    check(len(report) > 0, f"model={trial.model!r}: norms", "none", "one or more, to be converted", cure)
    return converted


def make_optimizer(trial: Trial, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of the trial; weight decay spares norms and biases.

    Raises:
        InputError: there is no such optimizer, or the user's function fails.
    """
    groups = parameter_groups(model, trial.weight_decay)
    if not is_own(trial.optimizer):
        if trial.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", trial.optimizer, OPTIMIZERS)
        return OPTIMIZERS[trial.optimizer](groups, trial.lr)
    make = find_named("optimizer", trial.optimizer)
    with explain_failure(f"optimizer={trial.optimizer!r} failed"):
        return make(groups, lr=trial.lr)


def make_loss(trial: Trial) -> Callable[[Any, Any], Any]:
    """The loss of the trial.

    Raises:
        InputError: there is no such function.
    """
    return nn.functional.cross_entropy if trial.loss is None else _function("loss", trial.loss)


def make_metrics(trial: Trial) -> dict[str, Callable[[Any, Any], Any]]:
    """The metrics of the trial by their names; `loss`, which is always there, is left out.

    Raises:
        InputError: there is no such function.
    """
    found = {}
    for name in trial.metrics:
        if name in METRICS:
            found[name] = METRICS[name]
        elif name != "loss":
            found[name.rpartition(":")[2]] = _function("metrics", name)
    return found


def check_tasks(trials: Iterable[Trial], data_dir: str | Path | None = None) -> None:
    """Raise the InputError that one of the trials would end in, before anything is run.

    What differs in rate, seed or schedule alone is looked at once.
    """
    alike = {replace(trial, lr=1.0, seed=0, schedule="constant", clip=None): trial for trial in trials}
    for trial in alike.values():
        _check_task(trial, data_dir)


def _check_task(trial: Trial, data_dir: str | Path | None) -> None:
    own_model = is_own(trial.model)
    if trial.norm not in NORMS and not (own_model and _takes(find_named("model", trial.model), "norm")):
        raise unknown("norm", trial.norm, NORMS)
    if is_own(trial.data):
        make_data(trial, data_dir)
    else:
        size = _size(trial.data, str(data_dir) if data_dir else None)
        images = trial.images or size
        check(images <= size, "images", images, f"1 to {size}, the training images of {trial.data}")
        most = f"1 to {images}, the number of training images"
        check(trial.batch_size <= images, "batch_size", trial.batch_size, most)
    model = make_model(trial, data_dir) if own_model else build_model(trial.model, trial.norm, 2)
    make_optimizer(trial, model)
    make_loss(trial)
    make_metrics(trial)


def seed_all(seed: int) -> None:
    """Python's, numpy's and torch's random numbers begin anew."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Repeated:
    """Batches of an epoch that has `steps` of them: it goes on where the last one ended, and begins anew at the end.

    Args:
        batches: any number of them.
        steps: of an epoch.
    """

    def __init__(self, batches: Iterable[Any], steps: int):
        self.batches, self.steps = batches, steps
        self._rest: Iterator[Any] = iter(())

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self.steps):
            batch = next(self._rest, None)
            if batch is None:
                self._rest = iter(self.batches)
                batch = next(self._rest, None)
                check(batch is not None, "data", "no batches", "one batch or more")
            yield batch


def _repeated(batches: Iterable[Any], steps: int | None) -> Iterable[Any]:
    return batches if steps is None else Repeated(batches, steps)


def is_own(name: str) -> bool:
    """Whether a setting names something of the user's, `module:name`, and not what is built in."""
    return ":" in name


def _is_set(data: Any) -> bool:
    """Whether it gives samples, of which a loader makes batches."""
    return isinstance(data, Dataset) and not isinstance(data, IterableDataset)


def _takes(function: Any, argument: str) -> bool:
    try:
        return argument in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def _call(argument: str, name: str, **values: Any) -> Any:
    """What a user's function gives, called with those of the values that it takes."""
    function = find_named(argument, name)
    check(callable(function), argument, name, "module:name of a function")
    with explain_failure(f"{argument}={name!r} failed"):
        return function(**{key: value for key, value in values.items() if _takes(function, key)})


def _function(argument: str, name: str) -> Any:
    """A function of output and targets; a class is made without arguments."""
    found = find_named(argument, name)
    if isinstance(found, type):
        with explain_failure(f"{argument}={name!r} failed"):
            found = found()
    if not callable(found):
        raise InputError(f"{argument}={name!r}: expected a function of output and targets, got {type(found).__name__}.")
    return found


@lru_cache(maxsize=1)
def _load_normalized(name: str, data_dir: str | None) -> ImageData:
    """The data set, normalised; kept for the next trial of this process."""
    data = load_dataset(name, data_dir)
    with torch_threads(1):  # sums are rounded otherwise with more, and what is kept here is for all trials
        mean, deviation = data.x_train.mean(), data.x_train.std()
    parts = {part: getattr(data, part).sub(mean).div_(deviation) for part in ("x_train", "x_valid")}
    return ImageData(data.name, y_train=data.y_train, y_valid=data.y_valid, classes=data.classes, **parts)


@lru_cache(maxsize=8)
def _size(name: str, data_dir: str | None) -> int:
    """Training images of a data set; reading it also shows that it is there and whole."""
    return len(load_dataset(name, data_dir).x_train)

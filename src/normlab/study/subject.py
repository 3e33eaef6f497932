"""A model to look at, and batches for it: what a run left in its folder, or the user's own, by name."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ..errors import InputError, check, unknown
from .plan import Trial
from .store import RunStore, write_whole
from .trial import build_learner

RECORDS, WEIGHTS = "runs.jsonl", "model.safetensors"


class Subject(NamedTuple):
    """A model, and what it trains with."""

    model: nn.Module
    batches: Iterable[Any]
    loss: Callable[[Any, Any], Tensor] | None
    optimizer: torch.optim.Optimizer | None


def save_weights(model: nn.Module, folder: Path) -> None:
    """Write the state of a model where `of_run` looks for it."""
    write_whole(folder / WEIGHTS, save({name: part.contiguous() for name, part in model.state_dict().items()}))


def of_run(folder: Path, batch_size: int | None, data_dir: Path | None) -> Subject:
    """The last model that `normlab train` left in a folder, its images, loss and optimizer.

    Args:
        folder: of the run.
        batch_size: images a batch; by default as many as it trained with.
        data_dir: folder with local copies of the data sets.

    Raises:
        InputError: there is no run, or its weights are missing, damaged or another model's.
    """
    records = RunStore(folder / RECORDS).read()
    check(bool(records), "model", str(folder), "a folder that normlab train wrote, or module:name of a model")
    trial = Trial.from_dict(records[-1]["settings"])
    if batch_size is not None:
        trial = Trial.from_dict({**records[-1]["settings"], "batch_size": batch_size})
    learner = build_learner(trial, data_dir)
    load_weights(learner.model, folder / WEIGHTS)
    return Subject(learner.model, learner.train, learner.loss_func, learner.optimizer)


def of_user(model: str, batches: str, weights: Path | None, loss: str | None) -> Subject:
    """A model of the user's own.

    Args:
        model: `module:name` or `file.py:name` of a module, or of a function that makes one.
        batches: likewise of an iterable of batches.
        weights: a state to load, `.safetensors` or written by `torch.save`.
        loss: likewise of a function of the model's output and a batch's second part.

    Raises:
        InputError: one of them is not there, or not what it should be.
    """
    net = named("model", model)
    net = net if isinstance(net, nn.Module) else _made("model", model, net)
    check(isinstance(net, nn.Module), "model", model, "module:name of a torch.nn.Module or a function that makes one")
    if weights is not None:
        load_weights(net, weights)
    found = named("batches", batches)
    found = found if isinstance(found, Iterable) else _made("batches", batches, found)
    check(isinstance(found, Iterable), "batches", batches, "module:name of an iterable or a function that makes one")
    return Subject(net, found, None if loss is None else named("loss", loss), None)


def named(argument: str, name: str) -> Any:
    """What `module:name` or `file.py:name` names.

    Raises:
        InputError: it is not of this form, or names nothing.
    """
    module, colon, attribute = name.rpartition(":")
    check(bool(colon and module and attribute), argument, name, "module:name, or file.py:name")
    try:
        loaded = _file(Path(module)) if module.endswith(".py") else _module(module)
    except (ImportError, FileNotFoundError) as error:
        raise InputError(f"{argument}={name!r} cannot be imported: {error}.") from error
    if not hasattr(loaded, attribute):
        own = [one for one, thing in vars(loaded).items() if getattr(thing, "__module__", None) == loaded.__name__]
        raise unknown(argument, name, [f"{module}:{one}" for one in own] or ["a name of another module"])
    return getattr(loaded, attribute)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state into a model.

    Raises:
        InputError: the file is missing, damaged, or of another model.
    """
    try:
        content = path.read_bytes()
        state = load(content) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"weights={str(path)!r} cannot be read: {error.strerror}.") from error
    except Exception as error:  # what a reader raises on a damaged file is of many kinds
        what = f"{type(error).__name__}: {error}"
        raise InputError(f"weights={str(path)!r} is damaged, or not of weights alone ({what}).") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"weights={str(path)!r} are of another model: {error}") from error


def _module(name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)


def _file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _made(argument: str, name: str, make: Any) -> Any:
    check(callable(make), argument, name, "module:name of the thing itself, or of a function without arguments")
    return make()

"""A model to look at, and batches for it: what a run left in its folder, or the user's own, by name."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import InputError, check
from .named import find_named, make_named
from .plan import Trial
from .store import RunStore
from .trial import build_learner
from .weights import load_weights, read_weights

RECORDS, WEIGHTS = "runs.jsonl", "model.safetensors"
AGAIN = "the last run that is recorded in the folder; train again"


class Subject(NamedTuple):
    """A model, and what it trains with.

    Attributes:
        notes: what was odd about its weights, a line each.
    """

    model: nn.Module
    batches: Iterable[Any]
    loss: Callable[[Any, Any], Tensor] | None
    optimizer: torch.optim.Optimizer | None
    notes: list[str]


def of_run(folder: Path, batch_size: int | None, data_dir: Path | None) -> Subject:
    """The last model that `normlab train` left in a folder, its images, loss and optimizer.

    Args:
        folder: of the run.
        batch_size: images a batch; by default as many as it trained with.
        data_dir: folder with local copies of the data sets.

    Raises:
        InputError: there is no run; or its weights are missing, damaged or those of another model.
    """
    if _is_a_name(str(folder)):
        raise InputError(f"batches is missing: {folder}, a model of your own, needs --batches module:name to run on.")
    records = RunStore(folder / RECORDS).read()
    check(bool(records), "model", str(folder), "a folder that normlab train wrote, or module:name of a model")
    last = records[-1]
    learner = build_learner(
        Trial.from_dict(last.settings | ({} if batch_size is None else {"batch_size": batch_size})), data_dir
    )
    run = read_weights(folder / WEIGHTS).run
    check(run in (None, last.key), "run of the weights", run, f"{last.key}, {AGAIN}")
    notes = load_weights(learner.model, folder / WEIGHTS)
    check(not notes, "weights", " ".join(notes), f"those of {AGAIN}")
    return Subject(learner.model, learner.train, learner.loss_func, learner.optimizer, notes)


def of_user(model: str, batches: str, weights: Path | None, loss: str | None) -> Subject:
    """A model of the user's own.

    Args:
        model: `module:name` or `file.py:name` of a module, or of a function that makes one.
        batches: `module:name` of an iterable of batches, or of a function that makes one.
        weights: a state to load, see `load_weights`.
        loss: `module:name` of a function of the model's output and a batch's second part.

    Raises:
        InputError: one of them is not there, not what it should be, or their code fails.
    """
    net = find_named("model", model)
    net = net if isinstance(net, nn.Module) else make_named("model", model, net)
    check(isinstance(net, nn.Module), "model", model, "module:name of a torch.nn.Module or a function that makes one")
    notes = [] if weights is None else load_weights(net, weights)
    found = find_named("batches", batches)
    found = found if isinstance(found, Iterable) else make_named("batches", batches, found)
    check(isinstance(found, Iterable), "batches", batches, "module:name of an iterable or a function that makes one")
    return Subject(net, found, None if loss is None else _function("loss", loss), None, notes)


def _function(argument: str, name: str) -> Any:
    found = find_named(argument, name)
    check(callable(found), argument, name, "module:name of a function of output and target")
    return found


def _is_a_name(name: str) -> bool:
    """Whether it looks like `module:name`, and is no folder."""
    module, colon, attribute = name.rpartition(":")
    return bool(colon and module and attribute.isidentifier()) and not Path(name).exists()

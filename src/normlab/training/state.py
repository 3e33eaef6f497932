"""The state of a fit: all that a later one needs to go on as if it had never stopped."""

import random
import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from ..errors import InputError, check

if TYPE_CHECKING:
    from .learner import Learner

VERSION = 1
PARTS = ("train", "valid")


def state_of(learner: "Learner") -> dict[str, Any]:
    """The state of a learner: tensors, numbers, text, lists and dicts; see `Learner.state_dict`.

    The tensors of model and optimizer are those in use: save or copy the state before training goes on.
    """
    begun = learner._random_before is not None
    in_epoch = begun and learner.training  # else its validation is over
    return {
        "version": VERSION,
        "epoch": learner.epoch if in_epoch or not begun else learner.epoch + 1,
        "batches": learner.batch + 1 if in_epoch else 0,
        "step": learner.step,
        "history": learner.history,
        "model": learner.model.state_dict(),
        "buffers": _other_buffers(learner.model),
        "gradients": {name: part.grad for name, part in learner.model.named_parameters() if part.grad is not None},
        "samples": [learner.gradients.samples, learner.gradients.unit],
        "optimizers": [optimizer.state_dict() for optimizer in learner.optimizers],
        "precision": learner.precision.state_dict(),
        "callbacks": [[type(one).__name__, one.state_dict()] for one in _with_state(learner)] if begun else [],
        "data": {part: data_state(getattr(learner, part)) for part in PARTS},
        "random": random_state(learner),
        "random_before": learner._random_before if in_epoch else None,
    }


class Resumed:
    """A saved state, put into a learner: at once what it trains, and in its next fit the place to go on from.

    Raises:
        InputError: the state has another version, or was saved from other parts.
    """

    def __init__(self, learner: "Learner", state: dict[str, Any]):
        version = state.get("version") if isinstance(state, dict) else None
        check(version == VERSION, "state: version", version, f"{VERSION}, as this normlab saves it")
        self.learner, self.state = learner, state
        optimizers = len(state["optimizers"])
        check(len(learner.optimizers) == optimizers, "optimizer", len(learner.optimizers), f"{optimizers}, as saved")
        for one, (name, saved) in zip(_with_state(learner), state["callbacks"], strict=False):
            if name == type(one).__name__ and hasattr(one, "prepare_model"):
                one.prepare_model(learner, saved)
        try:
            learner.model.load_state_dict(state["model"])
            for optimizer, saved in zip(learner.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise InputError(f"state: it was saved from another model or optimizer. {error}") from error
        self._load_own()

    def begin(self) -> int:
        """After `begin_fit`: the counts are as they were. Returns the epoch to begin with."""
        self.state = self.learner.ranks.own_state(self.state)
        self._load_own()
        learner, state = self.learner, self.state
        learner.step, learner.history = state["step"], list(state["history"])
        if not state["batches"]:
            for part in PARTS:
                load_data_state(getattr(learner, part), state["data"][part])
            self._load_callbacks()
            if state["random"]:
                set_random_state(learner, state["random"])
        return state["epoch"]

    def rest_of(self, batches: Iterable[Any]) -> tuple[int, Iterator[Any]]:
        """After `begin_epoch`: how many batches of the epoch are done, and those that are left."""
        learner, state = self.learner, self.state
        done = state["batches"]
        if not done:
            return begin_part(learner, batches)
        learner.gradients.samples, learner.gradients.unit = state["samples"]
        learner._random_before = state["random_before"]
        for name, part in learner.model.named_parameters():
            part.grad = state["gradients"].get(name)
        load_data_state(learner.valid, state["data"]["valid"])
        if _keeps_its_place(batches):
            load_data_state(batches, state["data"]["train"])
            rest = iter(batches)
        else:
            warnings.warn(
                f"train has no state_dict: its first {done} batches are drawn again and skipped. The batches after "
                "them are the same only if those depend on nothing but random numbers.",
                stacklevel=2,
            )
            set_random_state(learner, state["random_before"])
            rest = iter(batches)
            for _ in range(done):
                next(rest, None)
        self._load_callbacks()
        set_random_state(learner, state["random"], generators=_keeps_its_place(batches))
        return done, rest

    def _load_own(self) -> None:
        learner, state = self.learner, self.state
        buffers = dict(learner.model.named_buffers())
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)
        device = next((part.device.type for part in learner.model.parameters()), "cpu")
        learner.precision.load_state_dict(state["precision"], device)

    def _load_callbacks(self) -> None:
        own, saved = _with_state(self.learner), self.state["callbacks"]
        if not self.state["step"] and not saved:  # of a learner that did not begin
            return
        names, expected = [type(one).__name__ for one in own], [name for name, _ in saved]
        check(names == expected, "callbacks", ", ".join(names), f"those of the saved state: {', '.join(expected)}")
        for one, (_, value) in zip(own, saved, strict=True):
            one.load_state_dict(value)


def begin_part(learner: "Learner", batches: Iterable[Any]) -> tuple[int, Iterator[Any]]:
    """Of a part from its beginning: that none of its batches are done, and all of them."""
    if learner.training:
        learner._random_before = random_state(learner)
    return 0, iter(batches)


def random_state(learner: "Learner") -> dict[str, Any]:
    """Every random state: Python's, numpy's, torch's, and those of the loaders' own generators."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "generators": [generator.get_state() for generator in _generators(learner)],
    }


def set_random_state(learner: "Learner", state: dict[str, Any], generators: bool = True) -> None:
    """The opposite; `generators` says whether the loaders' own are set too."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    if generators:
        for generator, value in zip(_generators(learner), state["generators"], strict=True):
            generator.set_state(value)


def _generators(learner: "Learner") -> list[torch.Generator]:
    """Those of the loaders and of their samplers, each once."""
    found: dict[int, torch.Generator] = {}
    for part in PARTS:
        batches = getattr(learner, part)
        for one in (batches, getattr(batches, "sampler", None), getattr(batches, "batch_sampler", None)):
            generator = getattr(one, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _keeps_its_place(batches: Any) -> bool:
    return hasattr(batches, "state_dict") and hasattr(batches, "load_state_dict")


def data_state(batches: Any) -> Any:
    """The place in the data, of batches that can say it; else None."""
    return batches.state_dict() if _keeps_its_place(batches) else None


def load_data_state(batches: Any, state: Any) -> None:
    """Go to a place that `data_state` gave."""
    if state is not None:
        check(_keeps_its_place(batches), "train or valid", type(batches).__name__, "batches as in the saved state")
        batches.load_state_dict(state)


def _with_state(learner: "Learner") -> list[Any]:
    """The callbacks that keep something."""
    return [one for one in learner.callbacks if hasattr(type(one), "load_state_dict")]


def _other_buffers(model: nn.Module) -> dict[str, Any]:
    """The buffers that are not in the model's state."""
    there = model.state_dict()
    return {name: part for name, part in model.named_buffers() if name not in there}

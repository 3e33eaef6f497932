"""A guard for anybody's training loop: it says what will fail at this batch size, and looks when losses part."""

import math
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..surgery.build import is_frozen
from ..surgery.effect import Batches, Forward, first_input
from ..surgery.modules import Found, norms, registered_name
from ..surgery.trace import input_of
from ..training.batches import call_each
from .diagnosis import NAMED, Diagnosis, diagnose
from .measure import Loss, Target, second_part

KEPT = 4  # batches, to look at when losses part
FEW = 6  # values a channel: their mean and deviation are half a deviation off
PARTED = 0.5  # of the size of the training loss, which may be below 0: minus a Dice score


def watch(
    model: nn.Module,
    *,
    batches: Batches | None = None,
    forward: Forward | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    target: Target = second_part,
    say: Callable[[str], Any] | None = None,
) -> "Guard":
    """Watch a training, in any loop: it says at the first batch what will fail at this batch size.

        with normlab.watch(model, batches=batches, loss=loss) as guard:
            for epoch in range(epochs):
                ...  # any loop that calls the model
                guard.log(train=training_loss, valid=validation_loss)

        Learner(..., callbacks=[normlab.watch(model)])  # needs nothing else; for Lightning see `health.lightning`

    At the first forward pass in training mode it looks at each norm. Does a batch have enough values a channel? Is a
    norm frozen by halves? Does every process of a group keep statistics of its own? Its hooks are gone after that pass.
    Later it compares losses. When the validation loss is above the training loss by half of its size, or not finite,
    it runs `diagnose` once and says what that finds.

    Cost: a hook on the model for each pass, and once the diagnosis.

    Args:
        model: the one that trains.
        batches: what to run the diagnosis on, as for `diagnose`. By default it keeps the first 4 training batches.
        forward: runs the model on one of them; by default as the loop does.
        loss: see `diagnose`. A learner gives its own.
        optimizer: see `diagnose`. A learner gives its own.
        target: see `diagnose`.
        say: what to say it with, such as `print`; by default a warning.
    """
    return Guard(model, batches, forward, loss, optimizer, target, say)


class Guard:
    """A training that is watched; see `watch`.

    Attributes:
        said: the texts so far.
        diagnosis: made when the losses parted; None before.
    """

    order: ClassVar[int] = 0
    learner: Any  # whose callback this is

    def __init__(
        self,
        model: nn.Module,
        batches: Batches | None,
        forward: Forward | None,
        loss: Loss | None,
        optimizer: Optimizer | None,
        target: Target,
        say: Callable[[str], Any] | None,
    ):
        self.model, self.said = model, []
        self.diagnosis: Diagnosis | None = None
        self._batches, self._forward, self._loss, self._optimizer = batches, forward, loss, optimizer
        self._target, self._say = target, say
        self._kept: list[Any] = []
        self._looked = False
        self._small: dict[str, int] = {}  # norms by batch with few values a channel
        self._hooks, self._first = ExitStack(), ExitStack()
        self._sums: dict[str, list[Any]] = {"train": [0.0, 0], "valid": [0.0, 0]}  # of a callback: losses, batches

    def log(self, *, train: float | Tensor, valid: float | Tensor) -> None:
        """Take the losses of an epoch. Where they first part, the norms are looked at."""
        train, valid = float(train), float(valid)
        parted = math.isfinite(train) and (not math.isfinite(valid) or valid - train > PARTED * abs(train))
        if parted and self.diagnosis is None:
            self.say(
                f"The validation loss, {valid:.3g}, has parted from that of training, {train:.3g}. {self._found()}"
            )

    def say(self, text: str) -> None:
        """Say something, in the way that was asked for."""
        self.said.append(text)
        if self._say is None:
            warnings.warn(text, stacklevel=3)
        else:
            self._say(text)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Guard":
        return self  # a copy of the model has its hooks too, and is not watched

    def __enter__(self) -> "Guard":
        self._hooks.callback(self.model.register_forward_pre_hook(self._begins, with_kwargs=True).remove)
        self._hooks.callback(self.model.register_forward_hook(self._ends, always_call=True).remove)
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()
        self._hooks.close()

    def begin_fit(self) -> None:
        """As a callback: the loss and the optimizer are the learner's."""
        self._loss, self._optimizer = self._loss or self.learner.loss_func, self._optimizer or self.learner.optimizer

    def begin_epoch(self) -> None:
        """As a callback."""
        self._sums = {"train": [0.0, 0], "valid": [0.0, 0]}

    def begin_batch(self) -> None:
        """As a callback."""
        if self.learner.training:
            self.see((self.learner.inputs, self.learner.targets))

    def after_loss(self) -> None:
        """As a callback."""
        self.add("train" if self.learner.training else "valid", self.learner.loss)

    def after_batch(self) -> None:
        """As a callback."""
        self.end()

    def after_epoch(self) -> None:
        """As a callback: both losses are known."""
        means = {part: float(total) / count for part, (total, count) in self._sums.items() if count}
        if len(means) == 2:
            self.log(**means)

    def after_fit(self) -> None:
        """As a callback."""
        self.end()

    def add(self, part: str, loss: Any) -> None:
        """The loss of a batch of "train" or "valid"."""
        total, count = self._sums[part]
        self._sums[part] = [total + (loss.detach() if isinstance(loss, Tensor) else loss), count + 1]

    def _begins(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is self.model and model.training and not torch.compiler.is_compiling():
            self.see(Called(args, kwargs))

    def _ends(self, model: nn.Module, args: Any, output: Any) -> None:
        self.end()

    def see(self, batch: Any) -> None:
        """A training batch begins."""
        if self._batches is None and len(self._kept) < KEPT:
            self._kept.append(call_each(batch, "detach"))  # of a generator's images the graph would be kept too
        if not self._looked:
            self._looked = True
            self._look()

    def _look(self) -> None:
        """Put hooks on the norms, for this batch alone. Nothing is compiled in it."""
        found = norms(self.model)
        self._first.callback(self._say_first, found)
        if "torch._dynamo" in sys.modules:  # which takes long to import; without it nothing is compiled
            self._first.enter_context(torch.compiler.set_stance("force_eager"))
        for one in found:
            if _by_batch(one.module):
                hook = partial(self._given, one.name)
                self._first.callback(one.module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def end(self) -> None:
        """A batch is over: after the first it says what it saw."""
        self._first.close()

    def _given(self, name: str, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        if norm.training and isinstance(x, Tensor) and not x.is_nested and x.dim() > 1 and x.shape[1] > 0:
            count = x.numel() // x.shape[1] * _processes(norm)
            if count <= FEW:
                self._small[name] = min(count, self._small.get(name, count))

    def _say_first(self, found: list[Found]) -> None:
        """What is wrong at this batch size, in plain words."""
        single = [name for name, count in self._small.items() if count == 1]
        few = [name for name, count in self._small.items() if count > 1]
        if single:
            self.say(
                f"{_named(single)}: a batch has one value a channel, which has no deviation: torch refuses to train, "
                'others give β. Use a norm that takes any batch: normlab.convert(model, "running").'
            )
        if few:
            least = min(self._small[name] for name in few)
            self.say(
                f"{_named(few)}: a batch has {least} values a channel; their mean and deviation are noise, and "
                "evaluation will differ from training. Use larger batches, or a norm that does not depend on them: "
                'normlab.convert(model, "running") or "group".'
            )
        for names, text in self._standing(found):
            if names:
                self.say(f"{_named(names)}: {text}")

    def _standing(self, found: list[Found]) -> list[tuple[list[str], str]]:
        """What does not depend on the batch: the norms, and what is wrong."""
        moving = [one for one in found if getattr(one.module, "running_mean", None) is not None]
        moving = [one for one in moving if not is_frozen(one.module)]
        learns = any(part.requires_grad for part in self.model.parameters())
        alone = [one.name for one in moving if not one.module.training] if self.model.training else []
        training = [one for one in moving if one.module.training]
        halves = [one.name for one in training if learns and _is_fixed(one.module)]
        apart = [one.name for one in training if _by_batch(one.module) and _processes(one.module) < _world()]
        return [
            (alone, "in evaluation mode though the model trains: the next model.train() unfreezes it. "
                    "normlab.freeze(model) holds."),
            (halves, "γ and β do not learn, but the statistics move. normlab.freeze(model) freezes all of it."),
            (apart, f"each of {_world()} processes normalises by its own part of the batch. normlab.sync(model) shares "
                    "the statistics."),
        ]  # fmt: skip

    def _to_look_at(self) -> tuple[Any, Forward, Loss | None]:
        """Batches, how the model runs on them, and the loss; without targets there is none."""
        if self._batches is not None:
            return self._batches, self._forward or first_input, self._loss
        if not all(isinstance(batch, Called) for batch in self._kept):
            return self._kept, self._forward or first_input, self._loss
        images = [call.args[0] for call in self._kept if _is_single(call)]
        return (images, first_input, None) if len(images) == len(self._kept) else (self._kept, _as_called, None)

    def _found(self) -> str:
        """What the diagnosis says, or why there is none."""
        batches, forward, loss = self._to_look_at()
        # Its forward pass waits for the other processes, where losses may not have parted.
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        if waiting := [one.name for one in norms(model) if _processes(one.module) > 1]:
            return f"{_named(waiting)} would wait for other processes: run normlab.diagnose in one by itself."
        try:
            found = diagnose(model, batches, forward=forward, loss=loss, optimizer=self._optimizer, target=self._target)
        except Exception as error:  # a guard ends nobody's training
            return f"The norms could not be looked at: {error}"
        self.diagnosis = found
        if found.healthy and found.layers and not any(layer.unmeasured for layer in found.layers):
            return "The norms are not the cause: nothing was found."
        if found.healthy:
            return f"The norms do not say why:\n{found}"
        return f"The norms say why:\n{found}"


class Called(NamedTuple):
    """What a model was called with: its arguments by position and by keyword."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def _as_called(model: nn.Module, batch: Called) -> Any:
    return model(*batch.args, **batch.kwargs)


def _is_single(call: Called) -> bool:
    """Whether it was called with a tensor alone."""
    return len(call.args) == 1 and isinstance(call.args[0], Tensor) and not call.kwargs


def _by_batch(norm: nn.Module) -> bool:
    """Whether in training it normalises by the batch alone."""
    return isinstance(norm, _BatchNorm) or registered_name(norm) in ("batch", "sync", "ghost")


def _processes(norm: nn.Module) -> int:
    """How many share its statistics."""
    return _world() if isinstance(norm, nn.SyncBatchNorm) or registered_name(norm) == "sync" else 1


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _is_fixed(norm: nn.Module) -> bool:
    own = list(norm.parameters(recurse=False))
    return bool(own) and not any(part.requires_grad for part in own)


def _named(names: list[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(name or "the model" for name in names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")

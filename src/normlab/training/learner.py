"""The training loop."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, check, check_no_class, is_whole
from .batches import call_each, split_batch
from .compiled import CompiledGradients
from .events import EVENTS, CancelBatch, CancelEpoch, CancelTrain, Listener, check_callbacks


class Learner:
    """Trains a model on batches and tells its callbacks (see `Callback` for the events).

    What callbacks read, and may change:

        model, loss_func, optimizer, train, valid
        training            whether this is a training batch
        inputs, targets     the batch
        output, loss        of the batch; from after_backward on they hold no graph
        num_epochs, epoch   of this fit; the epoch counts from 0
        num_batches, batch  of this pass over the batches; the batch counts from 0
        step                steps of the optimizer in this fit
        history             a dict an epoch, filled by callbacks

    Args:
        model: any module; it is called with the inputs alone. Its output may be a structure of tensors.
        train: batches `(inputs, targets)`: `TensorBatches`, a DataLoader, any iterable that can be passed again. A
            batch may have more parts, which are not used, or be a dict with such keys as `image` and `label`, see
            `split_batch`.
        valid: likewise, or None for no validation.
        loss_func: from output and targets to a scalar.
        optimizer: over the model's parameters. One whose step evaluates the loss again, such as L-BFGS, gets it of the
            same batch; the callbacks hear `after_pred` and `after_loss` each time.
        callbacks: in any order, see `Callback.order`.
        compile: make one compiled function of forward pass, loss and backward pass, by `torch.compile`, at the first
            training batch of each shape, which takes from seconds to a minute. `after_pred` and `after_loss` then come
            after it, and what a callback makes of output or loss there no longer changes the gradients.

    Raises:
        InputError: an argument is not what it should be: a class in place of an instance, a callback whose method is
            named after no event; `compile` with a torch that cannot compile gradients; in `fit`, an optimizer of
            another model, no batches, a batch that is neither pair nor dict, or a loss that is not one value.
    """

    _compiled: CompiledGradients | None = None

    def __init__(
        self,
        model: nn.Module,
        train: Iterable[Any],
        valid: Iterable[Any] | None = None,
        *,
        loss_func: Callable[..., Tensor] = nn.functional.cross_entropy,
        optimizer: torch.optim.Optimizer,
        callbacks: Sequence[Listener] = (),
        compile: bool = False,
    ):
        _check_parts(model, train, valid, loss_func, optimizer)
        self.model, self.train, self.valid = model, train, valid
        self.loss_func, self.optimizer, self.callbacks = loss_func, optimizer, check_callbacks(callbacks)
        self._compiled = CompiledGradients() if compile else None
        self._reset(0)

    @property
    def position(self) -> float:
        """Epochs done, in a training batch with the share of the batches before it, from validation on this one too."""
        if not self.training:
            return self.epoch + 1
        return self.epoch + (self.batch / self.num_batches if self.num_batches else 0)

    def fit(self, epochs: int) -> list[dict[str, Any]]:
        """Train for so many epochs, each followed by a validation; returns `history`."""
        check(is_whole(epochs, 1), "epochs", epochs, "a whole number from 1")
        _check_optimizer_of(self.optimizer, self.model)
        self._reset(epochs)
        self._listen()
        self._closure = _needs_closure(self.optimizer)
        self.optimizer.zero_grad()  # of an earlier fit that was left between two steps
        try:
            self._emit("begin_fit")
            for self.epoch in range(epochs):
                self._fit_epoch()
        except CancelTrain:
            self._emit("after_cancel_train")
        finally:
            self._emit("after_fit")
        return self.history

    def _fit_epoch(self) -> None:
        self.training = True
        self.model.train()
        self._run_batches("begin_epoch", "train")
        self.training = False
        if self.valid is not None:
            self.model.eval()
            with torch.no_grad():
                self._run_batches("begin_validate", "valid")
        self._emit("after_epoch")

    def _run_batches(self, beginning: str, part: str) -> None:
        self.batch = 0
        try:
            self._emit(beginning)
            batches = getattr(self, part)  # not before: a callback may give others
            self.num_batches = _length(batches)
            empty = True
            for self.batch, batch in enumerate(batches):
                empty = False
                self.inputs, self.targets = split_batch(batch)
                self._run_batch()
            if empty:
                _check_may_be_empty(part, batches, self.epoch)
        except CancelEpoch:
            self._emit("after_cancel_epoch")

    def _run_batch(self) -> None:
        try:
            self._emit("begin_batch")
            self._pass()
            if self.training:
                self._step()
        except CancelBatch:
            self._emit("after_cancel_batch")
        finally:
            self._emit("after_batch")

    def _pass(self) -> None:
        if self._compiled is not None and self.training:
            self._compiled_pass(self._compiled)
            return
        self.output = self.model(self.inputs)
        self._emit("after_pred")
        self.loss = self.loss_func(self.output, self.targets)
        check_loss(self.loss, "loss_func's result")
        self._emit("after_loss")
        if self.training:
            self.loss.backward()
            self.loss, self.output = self.loss.detach(), call_each(self.output, "detach")

    def _compiled_pass(self, compiled: CompiledGradients) -> None:
        self.output, self.loss, gradients = compiled(self.model, self.loss_func, self.inputs, self.targets)
        self._emit("after_pred")
        self._emit("after_loss")
        for parameter, gradient in gradients:
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def _step(self) -> None:
        self._emit("after_backward")
        if self._closure:
            self.optimizer.step(self._evaluations())
        else:
            self.optimizer.step()
        self.step += 1
        try:
            self._emit("after_step")
        finally:
            self._clear_gradients()

    def _evaluations(self) -> Callable[[], float]:
        """For an optimizer that asks for the loss: the first time the one that is there, with its gradients."""
        there = [self.loss]

        def evaluate() -> float:
            if there:
                return float(there.pop())
            self._clear_gradients()
            with torch.enable_grad():
                self._pass()
            return float(self.loss)

        return evaluate

    def _clear_gradients(self) -> None:
        """What optimizer.zero_grad() does, without the time it takes to be profiled."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def _reset(self, epochs: int) -> None:
        self.num_epochs, self.epoch, self.batch, self.step = epochs, 0, 0, 0
        self.num_batches: int | None = None
        self.training = True
        self.inputs: Any = None
        self.targets: Any = None
        self.output: Any = None
        self.loss: Any = None
        self.history: list[dict[str, Any]] = []

    def _listen(self) -> None:
        """Collect the callbacks' methods by event, once a fit: the loop then calls only what is there."""
        callbacks = sorted(check_callbacks(self.callbacks), key=attrgetter("order"))
        for callback in callbacks:
            callback.learner = self
        self._listeners = {
            event: [getattr(callback, event) for callback in callbacks if hasattr(type(callback), event)]
            for event in EVENTS
        }

    def _emit(self, event: str) -> None:
        for listener in self._listeners[event]:
            listener()


def _check_parts(model: Any, train: Any, valid: Any, loss_func: Any, optimizer: Any) -> None:
    """Each of a learner's arguments, by what the loop asks of it."""
    check_no_class("model", model)
    parts = all(callable(getattr(model, name, None)) for name in ("__call__", "train", "eval"))
    check(parts, "model", _kind(model), "a torch.nn.Module")
    for name, batches in (("train", train), ("valid", valid)):
        iterable = hasattr(type(batches), "__iter__") or hasattr(type(batches), "__getitem__")
        fits = iterable and not isinstance(batches, str | bytes | Tensor)
        check(
            fits or (batches is None and name == "valid"),
            name,
            _kind(batches),
            "batches: a DataLoader, or a list of pairs",
        )
    check_no_class("loss_func", loss_func)
    check(callable(loss_func), "loss_func", loss_func, "a function of output and targets, as nn.MSELoss()")
    check_no_class("optimizer", optimizer, "model.parameters(), …")
    known = hasattr(optimizer, "param_groups") and hasattr(optimizer, "step")
    check(known, "optimizer", _kind(optimizer), "a torch.optim.Optimizer", "Write SGD(model.parameters(), lr=0.1).")


def _kind(value: Any) -> str:
    return value if isinstance(value, str) else type(value).__name__


def _check_optimizer_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """An optimizer that holds no parameter of the model would train nothing."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    own = [id(parameter) for parameter in model.parameters()]
    if own and held.isdisjoint(own):
        raise InputError(
            f"optimizer: expected the parameters of the model, got {len(held)} of which the model has none. "
            "Make the optimizer after the model was changed: SGD(model.parameters(), lr=0.1)."
        )


def _check_may_be_empty(part: str, batches: Any, epoch: int) -> None:
    once = isinstance(batches, Iterator)
    if once or part == "train":
        cure = "An iterator gives its batches once: give a list or a DataLoader." if once else "Look at the data set."
        raise InputError(f"{part}: expected one batch or more, got none in epoch {epoch + 1}. {cure}")


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step cannot do without a closure."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def check_loss(loss: Any, name: str) -> None:
    """A loss is a tensor of one value.

    Raises:
        InputError: it is not; `name` says what of.
    """
    single = isinstance(loss, Tensor) and loss.numel() == 1
    what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    check(single, name, what, "a tensor of one value, such as the sum or mean of its parts")


def _length(batches: Any) -> int | None:
    try:
        return len(batches)
    except TypeError:  # also of a DataLoader, when its data set has no length
        return None

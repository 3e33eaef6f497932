"""The training loop."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check, is_whole
from .batches import call_each, split_batch
from .checks import (
    check_loss,
    check_may_be_empty,
    check_optimizer_of,
    check_parts,
    length,
    listed_optimizers,
    needs_closure,
    split_result,
)
from .compiled import CompiledGradients
from .distributed import ALONE, Ranks
from .events import CancelBatch, CancelEpoch, CancelTrain, Listener, Listeners, check_callbacks, shorten
from .gradients import Gradients, clear_gradients, evaluations
from .precision import Precision
from .state import Resumed, begin_part, state_of


class Learner:
    """Trains a model on batches and tells its callbacks (see `Callback` for the events).

    What callbacks read, and may change:

        model, loss_func, optimizer, train, valid
        training            whether this is a training batch
        inputs, targets     the batch; with `step_func` the whole batch, and None
        output, loss        of the batch; from after_backward on they hold no graph
        num_epochs, epoch   of this fit; the epoch counts from 0
        num_batches, batch  of this pass over the batches; the batch counts from 0
        step                steps of the optimizer in this fit
        ranks               the processes that train together, see `Distributed`
        history             a dict an epoch, filled by callbacks

    Args:
        model: any module; it is called with the inputs alone. Its output may be a structure of tensors.
        train: batches `(inputs, targets)`: `TensorBatches`, a DataLoader, any iterable that can be passed again. A
            batch may have more parts, which are not used, or be a dict with such keys as `image` and `label`, see
            `split_batch`. With `step_func` a batch may be anything.
        valid: the same for validation, or None for none.
        loss_func: from output and targets to a scalar.
        optimizer: over the model's parameters. One whose step evaluates the loss again, such as L-BFGS, gets it of the
            same batch; the callbacks hear `after_pred` and `after_loss` each time. A list of several, as a GAN has, or
            None: `step_func` then does backward passes and steps by itself.
        callbacks: in any order, see `Callback.order`.
        step_func: in place of `model` and `loss_func`: from batch and model to the loss and the output, and targets for
            metrics if there are any: `lambda batch, model: (loss, output, targets)`. Validation calls it too.
        accumulate: batches a step of the optimizer. The gradient is that of the mean over all their samples, also where
            the last batches of an epoch are fewer or smaller. Events of a batch come for each, `after_backward` and
            `after_step` once a step.
        precision: "float32"; "bfloat16" or "float16" for forward pass and loss in mixed precision, by `torch.autocast`.
            With float16 the loss is scaled. A step whose gradient overflows is left out, and the buffers of the model
            are as they were before its batches.
        compile: make one compiled function of forward pass, loss and backward pass, by `torch.compile`, at the first
            training batch of each shape, which takes from seconds to a minute. `after_pred` and `after_loss` then come
            after it, and what a callback makes of output or loss there no longer changes the gradients.

    Raises:
        InputError: an argument is not what it should be: a class in place of an instance, a callback whose method is
            named after no event; `compile` with a torch that cannot compile gradients; in `fit`, an optimizer of
            another model, no batches, a batch that is neither pair nor dict, a loss that is not one value, or a
            Cancel exception raised where there is nothing to cancel.
    """

    def __init__(
        self,
        model: nn.Module,
        train: Iterable[Any],
        valid: Iterable[Any] | None = None,
        *,
        loss_func: Callable[..., Tensor] = nn.functional.cross_entropy,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
        callbacks: Sequence[Listener] = (),
        step_func: Callable[[Any, Any], tuple[Any, ...]] | None = None,
        accumulate: int = 1,
        precision: str = "float32",
        compile: bool = False,
    ):
        check_parts(model, train, valid, loss_func, step_func)
        check(is_whole(accumulate, 1), "accumulate", accumulate, "a whole number from 1")
        self.model, self.train, self.valid = model, train, valid
        listed_optimizers(optimizer, step_func)
        self.optimizer: Any = optimizer
        self.loss_func, self.step_func, self.accumulate = loss_func, step_func, accumulate
        self.callbacks, self.precision = check_callbacks(callbacks), Precision(precision)
        alone = step_func is None and precision != "float16"
        check(alone or not compile, "compile", compile, "False with a step_func, and with float16")
        self._compiled = CompiledGradients() if compile else None
        self._resumed: Resumed | None = None
        self._random_before: dict[str, Any] | None = None  # the training batches; None before a fit
        self._reset(0)

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """None, one or several."""
        return listed_optimizers(self.optimizer, self.step_func)

    @property
    def position(self) -> float:
        """Epochs done, in a training batch with the share of the batches before it, from validation on this one too."""
        if not self.training:
            return self.epoch + 1
        return self.epoch + (self.batch / self.num_batches if self.num_batches else 0)

    def state_dict(self) -> dict[str, Any]:
        """All that a later `fit` needs to go on as if it had never stopped; see `training.Checkpoint`.

        Weights, buffers, gradients that wait for a step, optimizers, loss scale, random states, the place in the data,
        history, counts, and what the callbacks keep. It holds tensors, numbers, text, lists and dicts alone.
        """
        return state_of(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved state: the next `fit` goes on there, in the middle of an epoch too.

        Raises:
            InputError: it is the state of another version, or of a learner with other parts.
        """
        self._resumed = Resumed(self, state)

    def fit(self, epochs: int) -> list[dict[str, Any]]:
        """Train for `epochs` epochs, each followed by a validation; returns `history`.

        After `load_state_dict` those are counted that were trained before it.
        """
        check(is_whole(epochs, 1), "epochs", epochs, "a whole number from 1")
        check_optimizer_of(self.optimizers, self.model)
        resumed, self._resumed = self._resumed, None
        self._reset(epochs)
        several = isinstance(self.optimizer, list | tuple)
        self._stepped = [] if several else self.optimizers  # by the loop; step_func steps several, or none, by itself
        self._closure = bool(self._stepped) and needs_closure(self.optimizer)
        clear_gradients(self._stepped)  # of an earlier fit that was left between two steps
        listeners = Listeners(self)
        self._tell = listeners.tell
        try:
            self._tell("begin_fit")
            first = resumed.begin() if resumed else 0
            for self.epoch in range(first, epochs):
                self._run_batches("train", "begin_epoch", resumed if self.epoch == first else None)
                if self.valid is not None:
                    with torch.no_grad():
                        self._run_batches("valid", "begin_validate", None)
                self.training = False
                self._tell("after_epoch")
        except CancelTrain:
            self._tell("after_cancel_train")
        except Exception as error:
            shorten(error)
            raise
        finally:
            self.precision.end(self.model)
            listeners.tell_all("after_fit")
        return self.history

    def _run_batches(self, part: str, beginning: str, resumed: Resumed | None) -> None:
        self.training, self.batch = part == "train", 0
        self.model.train(self.training)
        try:
            self._tell(beginning)
            batches = self.ranks.part(getattr(self, part))  # not before: a callback may give others
            self.num_batches = length(batches)
            first, rest = resumed.rest_of(batches) if resumed else begin_part(self, batches)
            empty = first == 0
            for self.batch, batch in enumerate(rest, first):
                empty = False
                self._run_batch(batch)
            if self.training and self.gradients.samples:  # of a last group whose end was not known
                self._step()
            if empty:
                check_may_be_empty(part, batches, self.epoch)
        except CancelEpoch:
            self._tell("after_cancel_epoch")

    def _run_batch(self, batch: Any) -> None:
        self.inputs, self.targets = split_batch(batch) if self.step_func is None else (batch, None)
        self._whole = False  # and so it stays if an error ends the batch
        try:
            self._tell("begin_batch")
            self._compute()
            if self.training:
                self._tell("after_backward")
                if self.gradients.are_due(self):
                    self._step()
            self._whole = True
        except CancelBatch:
            self._tell("after_cancel_batch")
            self._whole = True
        finally:
            self._tell("after_batch")

    def _compute(self) -> None:
        """Output and loss of the batch; in training also what they add to the gradients."""
        compiled, model, found = self._compiled if self.training else None, self.ranks.called(self), ()
        with self.precision.autocast(self.model):
            if compiled is not None:
                self.output, self.loss, found = compiled(model, self.loss_func, self.inputs, self.targets)
                self._tell("after_pred")
            elif self.step_func is None:
                self.output = model(self.inputs)
                self._tell("after_pred")
                self.loss = self.loss_func(self.output, self.targets)
                check_loss(self.loss, "loss_func's result")
            else:
                self.loss, self.output, self.targets = split_result(self.step_func(self.inputs, model))
                check_loss(self.loss, "the loss of step_func's result")
                self._tell("after_pred")
            self._tell("after_loss")
        if not self.training:
            return
        if compiled is not None:
            self.gradients.add(self, found)
        elif self._stepped:  # else step_func has done it
            self.gradients.backward(self)
        self.loss, self.output = self.loss.detach(), call_each(self.output, "detach")

    def _step(self) -> None:
        stepped = True
        if self._stepped:
            self.gradients.finish(self)
            self._tell("begin_step")
            stepped = self.precision.step(self.optimizer, self.model, evaluations(self) if self._closure else None)
        try:
            if stepped:
                self.step += 1
                self._tell("after_step")
        finally:
            clear_gradients(self._stepped)

    def _reset(self, epochs: int) -> None:
        self.num_epochs, self.epoch, self.batch, self.step = epochs, 0, 0, 0
        self.num_batches: int | None = None
        self.training = True
        self.inputs: Any = None
        self.targets: Any = None
        self.output: Any = None
        self.loss: Any = None
        self.history: list[dict[str, Any]] = []
        self.gradients, self._whole = Gradients(self.accumulate), False
        self.ranks: Ranks = ALONE

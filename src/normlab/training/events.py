"""What a callback is: an object whose methods are named after the events it wants to hear."""

from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    from .learner import Learner

EVENTS = (
    "begin_fit",
    "begin_epoch",
    "begin_batch",
    "after_pred",
    "after_loss",
    "after_backward",
    "after_step",
    "after_cancel_batch",
    "after_batch",
    "after_cancel_epoch",
    "begin_validate",
    "after_epoch",
    "after_cancel_train",
    "after_fit",
)


class Listener(Protocol):
    """What a learner asks of a callback: a `Callback`, or anything else with methods for events."""

    order: ClassVar[int]
    learner: Any


class Callback:
    """Base of all callbacks: define a method for each event of `EVENTS` you want, without arguments.

    Callbacks are called by ascending `order`, equal ones as they were given. While a fit runs, `self.learner` is the
    learner: read its state, change it, or leave a level of the loop by raising one of the Cancel exceptions.

    Events, an epoch at a time: `begin_fit`; `begin_epoch`; per batch `begin_batch`, `after_pred`, `after_loss`, in
    training `after_backward`, `after_step`, and always `after_batch`; `begin_validate` and its batches; `after_epoch`;
    at last `after_fit`, also after a failure. A cancelled level fires `after_cancel_batch/epoch/train`.
    """

    order: ClassVar[int] = 0
    learner: "Learner"


class CancelBatch(Exception):
    """Leaves the batch; raised in `after_backward` it keeps the gradients, which then accumulate."""


class CancelEpoch(Exception):
    """Leaves the training or validation batches of the epoch; raised in their begin event, before the first."""


class CancelTrain(Exception):
    """Ends the fit in good order."""

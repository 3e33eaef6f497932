"""What a callback is: an object whose methods are named after the events it wants to hear."""

import difflib
import functools
import inspect
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from ..errors import InputError, check_no_class

if TYPE_CHECKING:
    from .learner import Learner

HERE = os.path.dirname(__file__)
EVENTS = (
    "begin_fit",
    "begin_epoch",
    "begin_batch",
    "after_pred",
    "after_loss",
    "after_backward",
    "begin_step",
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
    training `after_backward`, `begin_step` with the whole gradient and `after_step`, and always `after_batch`;
    `begin_validate` and its batches; `after_epoch`; at last `after_fit`, also after a failure. A cancelled level fires
    `after_cancel_batch/epoch/train`.

    A callback that keeps something over batches, and wants to go on with it after a crash, has `state_dict()` and
    `load_state_dict(state)`. The state holds tensors, numbers, text, lists and dicts. It is loaded after `begin_fit`,
    and after `begin_epoch` if it is from within an epoch. One that changes the modules of a model has
    `prepare_model(learner, state)` too, which makes that change before the saved weights are loaded.
    """

    order: ClassVar[int] = 0
    learner: "Learner"


class CancelBatch(Exception):
    """Leaves the batch; raised in `after_backward` it keeps the gradients, which then accumulate."""


class CancelEpoch(Exception):
    """Leaves the training or validation batches of the epoch; raised in their begin event, before the first."""


class CancelTrain(Exception):
    """Ends the fit in good order."""


_BATCH = ("begin_batch", "after_pred", "after_loss", "after_backward", "begin_step", "after_step")
_EPOCH = (*_BATCH, "after_cancel_batch", "after_batch", "begin_epoch", "begin_validate")
# Where there is something to cancel.
CANCELLED_IN = {
    CancelBatch: _BATCH,
    CancelEpoch: _EPOCH,
    CancelTrain: tuple(event for event in EVENTS if event not in ("after_cancel_train", "after_fit")),
}


class Listeners:
    """The methods of a learner's callbacks, collected once a fit: the loop then calls only what is there.

    Attributes:
        of: those of each event, in their order.
    """

    def __init__(self, learner: "Learner"):
        callbacks = sorted(check_callbacks(learner.callbacks), key=attrgetter("order"))
        for callback in callbacks:
            callback.learner = learner
        self._learner = learner
        self.of = {
            event: [getattr(callback, event) for callback in callbacks if hasattr(type(callback), event)]
            for event in EVENTS
        }

    def tell(self, event: str, listeners: list[Any] | None = None) -> None:
        """Calls those of an event in their order, or those of them that are given; an error says whose it is."""
        for listener in self.of[event] if listeners is None else listeners:
            try:
                listener()
            except Exception as error:
                _explain(error, listener, event, self._learner)
                raise

    def tell_all(self, event: str) -> None:
        """The same, and each is told, whatever others raise."""
        with ExitStack() as each:
            for listener in reversed(self.of[event]):
                each.callback(self.tell, event, [listener])


def _explain(error: Exception, listener: Any, event: str, learner: "Learner") -> None:
    """Says in which callback and event an error came.

    Raises:
        InputError: it is a Cancel exception, and there is nothing that it would cancel.
    """
    kind = type(getattr(listener, "__self__", listener)).__name__
    for cancel, events in CANCELLED_IN.items():
        if isinstance(error, cancel):
            if event not in events:
                where = f"{kind}.{event} raised {cancel.__name__}, which has nothing to end there."
                raise InputError(f"{where} Raise it in {', '.join(events)}.") from None
            return
    error.add_note(f"In the callback's {kind}.{event}, epoch {learner.epoch + 1}, batch {learner.batch + 1}.")


def shorten(error: Exception) -> None:
    """Leaves five of our own frames in the error's traceback, so that the user's stand out."""
    places, place = [], error.__traceback__
    while place is not None:
        places.append(place)
        place = place.tb_next
    own = [n for n, place in enumerate(places) if place.tb_frame.f_code.co_filename.startswith(HERE)]
    for n in reversed(own[3:-2]):
        places[n - 1].tb_next = places[n].tb_next


# What a method's name begins with that was meant for an event, here or in other libraries.
_MEANT = ("begin_", "after_", "before_")
_NEAR = 0.8  # similarity from which on any other name is an event misspelt


def check_callbacks(callbacks: Any) -> list[Any]:
    """The callbacks as a list.

    Raises:
        InputError: one is a class, no callback, has a method that is meant for an event but named after none, or a
            method of an event that needs arguments.
    """
    check_no_class("callbacks", callbacks)
    if not isinstance(callbacks, Iterable):
        name = type(callbacks).__name__
        raise InputError(f"callbacks: expected a list of callbacks, got one {name}. Write callbacks=[…].")
    callbacks = list(callbacks)
    for number, callback in enumerate(callbacks):
        _check_callback(f"callbacks[{number}]", callback)
    return callbacks


def _check_callback(argument: str, callback: Any) -> None:
    check_no_class(argument, callback)
    kind = type(callback)
    if not hasattr(callback, "order"):
        raise InputError(
            f"{argument}: expected a normlab.training.Callback, got {kind.__name__}. "
            "Derive a class from Callback, with a method for each event."
        )
    misnamed = _misnamed(kind)
    if misnamed:
        raise InputError(f"{argument}: {misnamed}")
    for event in EVENTS:
        if hasattr(kind, event):
            _check_event(argument, f"{kind.__name__}.{event}", getattr(callback, event))


@functools.cache
def _misnamed(kind: type) -> str | None:
    """What is wrong with a class that has a method meant for an event, but named after none."""
    foreign = set(dir(kind)) - set(dir(Callback)) - set(EVENTS)
    for name in sorted(name for name in foreign if name[0] != "_" and callable(getattr(kind, name, None))):
        if name.startswith(_MEANT) or difflib.get_close_matches(name, EVENTS, 1, _NEAR):
            near = difflib.get_close_matches(name.replace("before_", "begin_"), EVENTS, 1, 0.5)
            return (
                f"{kind.__name__}.{name} is no event.{f' Did you mean {near[0]!r}?' if near else ''} "
                f"Events: {', '.join(EVENTS)}. A helper's name may begin with an underscore."
            )
    return None


def _check_event(argument: str, name: str, method: Any) -> None:
    if not callable(method):
        raise InputError(f"{argument}: {name} is no method, but {method!r}. Leave it out, or define a method.")
    function = getattr(method, "__func__", None)
    needed = _needed(method) if function is None else _needed_of_function(function)[1:]
    if needed:
        raise InputError(
            f"{argument}: {name} needs {', '.join(needed)}, and events give no arguments. "
            "Read what it needs from self.learner."
        )


def _needed(method: Callable[..., Any]) -> list[str]:
    """The arguments that it cannot do without, as far as it says."""
    try:
        return [name for name, one in inspect.signature(method).parameters.items() if _is_needed(one)]
    except (TypeError, ValueError):
        return []


_needed_of_function = functools.cache(_needed)


def _is_needed(one: inspect.Parameter) -> bool:
    return one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)

"""What a learner is given, and what its parts give it: each mistake in a sentence, with the cure."""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, check, check_no_class


def check_parts(model: Any, train: Any, valid: Any, loss_func: Any, step_func: Any) -> None:
    """Each of a learner's arguments, by what the loop asks of it."""
    check_no_class("model", model)
    parts = all(callable(getattr(model, name, None)) for name in ("__call__", "train", "eval"))
    check(parts, "model", kind_of(model), "a torch.nn.Module")
    for name, batches in (("train", train), ("valid", valid)):
        iterable = hasattr(type(batches), "__iter__") or hasattr(type(batches), "__getitem__")
        fits = iterable and not isinstance(batches, str | bytes | Tensor)
        fits = fits or (batches is None and name == "valid")
        check(fits, name, kind_of(batches), "batches: a DataLoader, or a list of pairs")
    check_no_class("loss_func", loss_func)
    check(callable(loss_func), "loss_func", loss_func, "a function of output and targets, as nn.MSELoss()")
    check(step_func is None or callable(step_func), "step_func", step_func, "a function of batch and model, or None")


def listed_optimizers(optimizer: Any, step_func: Any) -> list[torch.optim.Optimizer]:
    """The optimizers in `optimizer`: one, or with a `step_func` any number.

    Raises:
        InputError: one is none, or there is not one and no `step_func`.
    """
    single = not isinstance(optimizer, list | tuple) and optimizer is not None
    optimizers: list[Any] = [optimizer] if single else list(optimizer or ())
    for one in optimizers:
        check_no_class("optimizer", one, "model.parameters(), …")
        known = hasattr(one, "param_groups") and hasattr(one, "step")
        check(known, "optimizer", kind_of(one), "a torch.optim.Optimizer", "Write SGD(model.parameters(), lr=0.1).")
    cure = "For several write a step_func that does the backward passes and steps."
    check(single or step_func is not None, "optimizer", kind_of(optimizer), "one torch.optim.Optimizer", cure)
    return optimizers


def kind_of(value: Any) -> str:
    """What an error calls a value: a text itself, else its class."""
    return value if isinstance(value, str) else type(value).__name__


def check_optimizer_of(optimizers: list[torch.optim.Optimizer], model: Any) -> None:
    """Optimizers that hold no parameter of the model would train nothing."""
    held = {id(parameter) for one in optimizers for group in one.param_groups for parameter in group["params"]}
    own = [id(parameter) for parameter in model.parameters()]
    if own and optimizers and held.isdisjoint(own):
        raise InputError(
            f"optimizer: expected the parameters of the model, got {len(held)} of which the model has none. "
            "Make the optimizer after the model was changed: SGD(model.parameters(), lr=0.1)."
        )


def check_may_be_empty(part: str, batches: Any, epoch: int) -> None:
    """No batches came: an error, unless they are a list for validation."""
    once = isinstance(batches, Iterator)
    if once or part == "train":
        cure = "An iterator gives its batches once: give a list or a DataLoader." if once else "Look at the data set."
        raise InputError(f"{part}: expected one batch or more, got none in epoch {epoch + 1}. {cure}")


def needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its step cannot do without a closure."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def check_loss(loss: Any, name: str) -> None:
    """A loss is a tensor of one value.

    Raises:
        InputError: it is not; `name` says what of.
    """
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return
    what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    check(False, name, what, "a tensor of one value, such as the sum or mean of its parts")


def split_result(result: Any) -> tuple[Any, Any, Any]:
    """Loss, output and targets of what a `step_func` returned.

    Raises:
        InputError: it is not two or three values.
    """
    fits = isinstance(result, tuple) and len(result) in (2, 3)
    came = f"{len(result)} values" if isinstance(result, tuple) else type(result).__name__
    check(fits, "step_func's result", came, "loss, output", "Return (loss, output), or (loss, output, targets).")
    loss, output, *targets = result
    return loss, output, targets[0] if targets else None


def length(batches: Any) -> int | None:
    """How many batches there are, if that is known."""
    try:
        return len(batches)
    except TypeError:  # also of a DataLoader, when its data set has no length
        return None

"""What could help, tried on copies of a model, and judged by its loss in evaluation."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import InputError
from ..surgery import convert, recalibrate
from ..surgery.effect import Forward, looking
from ..surgery.modules import copied
from .faults import RECALIBRATE
from .measure import REFUSALS

BETTER = 0.1  # of the loss as it is: what gains less is no help


class Candidate(NamedTuple):
    """A change of a model.

    Attributes:
        name: in a few words.
        loss: the mean over the batches, in evaluation; None if the change could not be made.
        command: Python that makes it.
    """

    name: str
    loss: float | None
    command: str


AS_IT_IS = "as it is, or frozen"
RECALIBRATED = "recalibrated"


def candidates(
    model: nn.Module, batches: Sequence[Any], forward: Forward, loss: Callable[..., Tensor], target: Callable[..., Any]
) -> list[Candidate]:
    """The model as it is, with statistics measured anew, and with norms of each image by itself.

    The model stays as it is. Each copy takes as much memory as the model.
    """

    def judged(name: str, make: Callable[[], nn.Module], command: str) -> Candidate:
        try:
            made = make()
            with looking(made):
                losses = [float(loss(forward(made, batch), target(batch))) for batch in batches]
        except (InputError, *REFUSALS):  # it cannot be copied or converted, or does not run with other norms
            return Candidate(name, None, command)
        return Candidate(name, sum(losses) / len(losses), command)

    def recalibrated() -> nn.Module:
        made = copied(model)
        recalibrate(made, batches, forward=forward)
        return made

    def fitted(to: str) -> Callable[[], nn.Module]:
        return lambda: convert(model, to, batches=batches, forward=forward, fit=True).model

    return [
        judged(AS_IT_IS, lambda: model, "model = normlab.freeze(model).model"),
        judged(RECALIBRATED, recalibrated, RECALIBRATE),
        *(
            judged(
                f"{to} norm fitted",
                fitted(to),
                f'model = normlab.convert(model, "{to}", batches=batches, fit=True).model',
            )
            for to in ("group", "instance")
        ),
    ]


def best(tried: Sequence[Candidate]) -> Candidate | None:
    """The candidate of the least loss, or None if that is not well below the loss of the model as it is."""
    known = [one for one in tried if one.loss is not None]
    if not known or tried[0].loss is None:
        return None
    least = min(known, key=lambda one: one.loss)  # type: ignore[reportArgumentType, reportCallIssue]
    return least if gain(tried[0], least) > BETTER else None


def gain(before: Candidate, after: Candidate) -> float:
    """The share by which the loss falls. Losses below 0, such as minus a Dice score, count by their size."""
    if before.loss is None or after.loss is None or before.loss <= after.loss:
        return 0.0
    return (before.loss - after.loss) / abs(before.loss) if before.loss else math.inf


def listed(tried: Sequence[Candidate]) -> str:
    """Each with its loss."""
    return "; ".join(f"{one.name}: {'not tried' if one.loss is None else format(one.loss, '.3g')}" for one in tried)

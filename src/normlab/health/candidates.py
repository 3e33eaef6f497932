"""What could help, tried on copies of a model, and judged by its loss in evaluation."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import InputError
from ..surgery import convert, recalibrate
from ..surgery.effect import Forward, looking
from ..surgery.modules import copied

BETTER = 0.9  # of the loss as it is: what is above it is no help


class Candidate(NamedTuple):
    """A change of a model.

    Attributes:
        name: in a few words.
        loss: in evaluation, the mean over the batches; None if it could not be made.
        command: that makes it.
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

    The model stays as it is. A copy needs its memory once more.
    """

    def judged(name: str, make: Callable[[], nn.Module], command: str) -> Candidate:
        try:
            made = make()
            with looking(made):
                losses = [float(loss(forward(made, batch), target(batch))) for batch in batches]
        except (InputError, RuntimeError):  # it cannot be copied or converted
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
        judged(RECALIBRATED, recalibrated, "normlab.recalibrate(model, batches)"),
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
    """The one of the least loss, if it is well below that of the model as it is; None without."""
    known = [one for one in tried if one.loss is not None]
    if not known or tried[0].loss is None:
        return None
    least = min(known, key=lambda one: one.loss)  # type: ignore[reportArgumentType, reportCallIssue]
    return least if least.loss is not None and least.loss < BETTER * tried[0].loss else None


def listed(tried: Sequence[Candidate]) -> str:
    """Each with its loss."""
    return "; ".join(f"{one.name}: {'not tried' if one.loss is None else format(one.loss, '.3g')}" for one in tried)

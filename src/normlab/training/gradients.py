"""How the gradients of batches become that of a step: added up over batches and processes, scaled, cleared."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .learner import Learner


class Gradients:
    """Adds up the gradients of `accumulate` batches, so that the step's is that of the mean over their samples.

    Attributes:
        samples: of the batches that were added since the last step, where several make one.
        unit: samples of the first of them.
    """

    def __init__(self, accumulate: int):
        self.accumulate, self.samples, self.unit = accumulate, 0, 0

    def backward(self, learner: "Learner") -> None:
        """Adds the gradient of the learner's loss."""
        weight = self._count(learner)
        loss = learner.loss if weight == 1 else weight * learner.loss
        learner.precision.scaled(loss).backward()

    def add(self, learner: "Learner", found: Iterable[tuple[nn.Parameter, Tensor | None]]) -> None:
        """Adds gradients that are computed already."""
        weight = self._count(learner)
        for parameter, gradient in found:
            if gradient is not None:
                gradient = gradient if weight == 1 else weight * gradient
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient

    def are_due(self, learner: "Learner") -> bool:
        """Whether the learner's batch ends a step: it is the last of its group, or of the epoch."""
        done = learner.batch + 1
        return self.accumulate == 1 or done % self.accumulate == 0 or done == learner.num_batches

    def finish(self, learner: "Learner") -> None:
        """What was added up becomes the gradient of the mean."""
        if self.accumulate > 1:
            for parameter in parameters_of([learner.optimizer]):
                if parameter.grad is not None:
                    parameter.grad.mul_(self.unit / self.samples)
            self.samples, self.unit = 0, 0
        learner.precision.unscale(learner.optimizer)

    def _count(self, learner: "Learner") -> float:
        """The weight of the batch in the gradient of the step: its samples over those of the step's first batch."""
        if self.accumulate == 1:
            return learner.ranks.weight
        samples = learner.ranks.count_samples(learner.inputs, learner.targets)
        self.unit = self.unit or samples
        self.samples += samples
        return learner.ranks.weight * samples / self.unit


def parameters_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[Any]:
    """All parameters that these optimizers change."""
    return [parameter for one in optimizers for group in one.param_groups for parameter in group["params"]]


def evaluations(learner: "Learner") -> Callable[[], float]:
    """For an optimizer that asks for the loss: the first time the one that is there, with its gradients."""
    there = [learner.loss]

    def evaluate() -> float:
        if there:
            return float(there.pop())
        clear_gradients([learner.optimizer])
        with torch.enable_grad():
            learner._compute()
        return float(learner.loss)

    return evaluate


def clear_gradients(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """What `zero_grad` of each does, without the time it takes to be profiled."""
    for one in optimizers:
        for group in one.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

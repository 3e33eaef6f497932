"""Small learners for tests of callbacks."""

import math

import torch
from torch import nn

from normlab.data import TensorBatches
from normlab.training import Callback, Learner


def samples(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def classifier(*callbacks: Callback, n: int = 11, valid: int = 7, lr: float = 0.5, **options) -> Learner:
    """A linear classifier of 3 classes on batches of 4, of which the last is smaller."""
    torch.manual_seed(0)
    model = options.pop("model", nn.Linear(5, 3))
    options.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=lr))
    held = TensorBatches(*samples(valid, 1), min(4, valid)) if valid else None
    return Learner(model, TensorBatches(*samples(n), min(4, n)), held, **options, callbacks=callbacks)


def of_known_losses(values: list[float], *callbacks: Callback, batches: int, valid: bool = True) -> Learner:
    """A learner whose training losses are these, in this order, and whose validation losses are nan."""
    model = nn.Linear(1, 1)
    values_left = iter(values)

    def loss(output, targets):
        return output.sum() * 0 + (next(values_left) if torch.is_grad_enabled() else math.nan)

    x = torch.ones(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    held = [(x, x)] * 2 if valid else None
    return Learner(model, [(x, x)] * batches, held, loss_func=loss, optimizer=optimizer, callbacks=callbacks)


def sees(look, event: str = "begin_batch", order: int = 5) -> Callback:
    """A callback that keeps `look(learner)` at every such event, once the others have acted, as its `seen`."""
    note = {event: lambda self: self.seen.append(look(self.learner))}
    callback = type("Sees", (Callback,), {"order": order, **note})()
    callback.seen = []
    return callback

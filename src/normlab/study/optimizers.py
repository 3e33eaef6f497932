"""The optimizers of a trial, by name: each is made from groups of parameters and a learning rate.

The functions import torch, the names do not: the command line's help has to be quick.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer


def sgd(groups: Any, lr: float) -> "Optimizer":
    """Plain stochastic gradient descent."""
    from torch.optim import SGD

    return SGD(groups, lr=lr)


def momentum(groups: Any, lr: float) -> "Optimizer":
    """The same with a momentum of 0.9."""
    from torch.optim import SGD

    return SGD(groups, lr=lr, momentum=0.9)


def nesterov(groups: Any, lr: float) -> "Optimizer":
    """The same with Nesterov's momentum of 0.99, as nnU-Net trains."""
    from torch.optim import SGD

    return SGD(groups, lr=lr, momentum=0.99, nesterov=True)


def adamw(groups: Any, lr: float) -> "Optimizer":
    """Adam with decoupled weight decay."""
    from torch.optim import AdamW

    return AdamW(groups, lr=lr)


OPTIMIZERS: dict[str, Callable[[Any, float], "Optimizer"]] = {
    "sgd": sgd,
    "momentum": momentum,
    "nesterov": nesterov,
    "adamw": adamw,
}

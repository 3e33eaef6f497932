"""Runs a model over batches, in evaluation and as its norms train, and leaves it as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from ..errors import check
from ..nn import FrozenBatchNorm2d
from ..surgery.effect import Batches, Forward, evaluating, kept_statistics
from ..surgery.modules import norms
from .layer import Layer
from .neighbours import Neighbours
from .watch import Ratio, Watched

Loss: TypeAlias = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Output:
    """What becomes of the model's output.

    Attributes:
        batches: gone through.
        images: in them.
        gap: root mean square of the difference between the outputs with norms in training and in evaluation mode, over
            the deviation of the former.
        training_loss: mean loss with norms in training mode; None without a loss.
        evaluation_loss: likewise in evaluation mode.
    """

    batches: int
    images: int
    gap: float | None
    training_loss: float | None
    evaluation_loss: float | None


def measure(
    model: nn.Module,
    batches: Batches,
    forward: Forward,
    loss: Loss | None,
    optimizer: Optimizer | None,
    limit: int,
) -> tuple[list[Layer], Output]:
    """Runs the first `limit` batches through the model, in evaluation and with its norms in training mode.

    Other modules are in evaluation mode in both, so that dropout is no difference.
    """
    found = norms(model)
    watched = {one.module: Watched(one.module) for one in found}
    neighbours, turns = Neighbours(list(watched)), _Turns(optimizer)
    # As they train: as they are, or all of them if the whole model is in evaluation mode.
    trained = [one.module for one in found if one.module.training or not model.training]
    gaps, losses, count, images = Ratio(), [], 0, 0
    with evaluating(model):
        for batch in islice(batches, limit):
            seeing = nullcontext() if count else neighbours.watching(model)
            # Forked, so that a model that draws random numbers draws the same ones in both passes.
            with torch.random.fork_rng(), seeing, _hooked(watched, training=False):
                expected = forward(model, batch)
            weights = [] if loss is None or optimizer is None else neighbours.weights()
            with _training(model, trained), _hooked(watched, training=True), torch.set_grad_enabled(bool(weights)):
                output = forward(model, batch)
                if loss is not None:
                    target = _target(batch)
                    found_loss = loss(output, target)
                    turns.add(weights, found_loss)
                    losses.append((float(found_loss.detach()), float(loss(expected, target))))
            gaps.add(_flat(output), _flat(expected))
            count, images = count + 1, images + _images(batch)
    check(count > 0, "batches", batches, "at least one batch")
    layers = [
        watched[one.module].layer(
            one.name,
            frozen_by_mode=one.module not in trained and not isinstance(one.module, FrozenBatchNorm2d),
            model_learns=any(parameter.requires_grad for parameter in model.parameters()),
            optimized=turns.known,
            closes=one.module in neighbours.rectified,
            turn=turns.of(neighbours.layer_before.get(one.module)),
        )
        for one in found
    ]
    means = [sum(part) / count for part in zip(*losses, strict=True)] or [None, None]
    return layers, Output(count, images, gaps.overall, *means)


class _Turns:
    """How far a step of an optimizer turns weights, from their gradients in each batch.

    Attributes:
        known: ids of the parameters that it has; None without one.
    """

    def __init__(self, optimizer: Optimizer | None):
        groups = [] if optimizer is None else optimizer.param_groups
        self._group = {id(parameter): group for group in groups for parameter in group["params"]}
        self.known = None if optimizer is None else set(self._group)
        self._lengths: dict[int, list[float]] = {}  # of the gradients

    def add(self, weights: list[Tensor], loss: Tensor) -> None:
        learned = list({id(weight): weight for weight in weights if weight.requires_grad}.values())
        gradients = torch.autograd.grad(loss, learned, allow_unused=True) if learned else ()
        for weight, grad in zip(learned, gradients, strict=True):
            if grad is not None:
                self._lengths.setdefault(id(weight), []).append(float(grad.norm()))

    def of(self, layer: nn.Module | None) -> float | None:
        """For the weight of this layer, in radians."""
        weight = getattr(layer, "weight", None)
        if weight is None or id(weight) not in self._group or id(weight) not in self._lengths:
            return None
        group, lengths = self._group[id(weight)], self._lengths[id(weight)]
        step = sum(lengths) / len(lengths) / (1 - group.get("momentum", 0.0))
        if "betas" in group:
            step = weight.numel() ** 0.5
        length = float(weight.detach().norm())
        return float(group["lr"]) * step / length if length > 0 else float("inf")


@contextmanager
def _hooked(watched: dict[nn.Module, Watched], training: bool) -> Iterator[None]:
    handles = []
    for norm, seen in watched.items():
        seen.begin_pass()
        if training:
            handles.append(norm.register_forward_pre_hook(seen.begins_training, with_kwargs=True))
        after = seen.trained if training else seen.evaluated
        handles.append(norm.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _training(model: nn.Module, trained: list[nn.Module]) -> Iterator[None]:
    """Inside, these are in training mode; after, in evaluation mode, and all buffers of the model as before."""
    for module in trained:
        module.training = True
    try:
        with kept_statistics(model):
            yield
    finally:
        for module in trained:
            module.training = False


def _flat(output: Any) -> Tensor:
    """(1, values): all its floating-point values."""
    leaves = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.is_floating_point()]
    return torch.cat([leaf.detach().double().flatten() for leaf in leaves] or [torch.zeros(0)])[None]


def _images(batch: Any) -> int:
    return next((len(leaf) for leaf in tree_leaves(batch) if torch.is_tensor(leaf) and leaf.dim() > 0), 0)


def _target(batch: Any) -> Any:
    several = isinstance(batch, (list, tuple)) and len(batch) > 1
    check(several, "batches", type(batch).__name__, "tuples of inputs and targets, for a loss")
    return list(batch)[1]

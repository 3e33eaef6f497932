"""By which angle a step of an optimizer turns the weights that norms follow."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import Optimizer


def parameters_of(optimizer: Optimizer) -> set[int]:
    """The ids of the parameters that it has."""
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


class Turns:
    """How far a step of an optimizer turns weights, from their gradients in each batch; nothing without one."""

    def __init__(self, optimizer: Optimizer | None):
        groups = [] if optimizer is None else optimizer.param_groups
        self._optimizer = optimizer
        self._group = {id(parameter): group for group in groups for parameter in group["params"]}
        self._lengths: dict[int, list[float]] = {}  # of the gradients

    def directions(self, layers: Iterable[nn.Module]) -> list[Tensor]:
        """The parameters that give the layers' weights their directions, each once, as far as they learn."""
        if self._optimizer is None:
            return []
        found = [part for layer in layers if (part := direction(layer)) is not None and part.requires_grad]
        return list({id(part): part for part in found}.values())

    def add(self, learned: list[Tensor], loss: Tensor) -> None:
        """The gradients of a batch."""
        gradients = torch.autograd.grad(loss, learned, allow_unused=True) if learned and loss.requires_grad else ()
        for weight, grad in zip(learned, gradients, strict=False):
            if grad is not None:
                self._lengths.setdefault(id(weight), []).append(float(grad.norm()))

    def of(self, layer: nn.Module | None) -> float | None:
        """For the weight of this layer, in radians."""
        weight = None if layer is None else direction(layer)
        if layer is None or weight is None or id(weight) not in self._group or id(weight) not in self._lengths:
            return None
        group, lengths = self._group[id(weight)], self._lengths[id(weight)]
        if not _is_known(group):
            return None
        step = sum(lengths) / len(lengths) / (1 - group.get("momentum", 0.0))
        kept = layer._buffers.get("weight_mask")  # of torch.nn.utils.prune
        values = weight.detach() if kept is None else weight.detach() * kept
        if "betas" in group:
            step = (weight.numel() if kept is None else float(kept.sum())) ** 0.5
        length = float(values.norm())
        return float(group["lr"]) * step / length if length > 0 else float("inf")

    def why_not(self, layer: nn.Module) -> str | None:
        """Why the turn of this layer's weight is not measured, or None."""
        if self._optimizer is None:
            return None
        group = self._group.get(id(direction(layer)))
        if group is not None and not _is_known(group):
            return f"turn: how long a step of {type(self._optimizer).__name__} is, is not known here"
        return why_no_direction(layer)


def _is_known(group: dict[str, Any]) -> bool:
    """Whether its optimizer steps along the gradient, as SGD, or by about lr for each weight, as Adam and Lion."""
    return "betas" in group or "dampening" in group


def direction(layer: nn.Module) -> Tensor | None:
    """The parameter whose direction is that of a layer's weight; None if the weight is computed in another way.

    It is the weight itself; of spectral norm and pruning what they keep in its place, of weight norm the vectors.
    """
    own = layer._parameters
    if parametrize.is_parametrized(layer, "weight"):
        made: Any = layer.parametrizations["weight"]  # type: ignore[reportIndexIssue]
        kinds = [type(part) for part in made]
        if kinds == [parametrizations._SpectralNorm]:
            return made._parameters.get("original")
        return made._parameters.get("original1") if kinds == [parametrizations._WeightNorm] else None
    return next((own[name] for name in ("weight", "weight_orig", "weight_v") if own.get(name) is not None), None)


def why_no_direction(layer: nn.Module) -> str | None:
    """Why the turn of the weight before a norm is not measured, or None."""
    found = direction(layer)
    adapted = any(part.requires_grad and part.dim() > 1 for part in layer.parameters())
    if found is None or (not found.requires_grad and adapted):  # such as LoRA, beside a weight that is kept
        return "turn: the weight before it is computed from other parameters"
    return None

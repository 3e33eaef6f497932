"""Passes that leave a model as it was; what another norm changes, and the γ and β that change it least."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..errors import InputError, check
from ..training.batches import INPUT_KEYS
from .moments import Moments
from .outputs import comparable, ratio
from .places import held_modules
from .probe import check_made, is_linear_in_its_parameters, library, same_random
from .trace import input_of

Batches: TypeAlias = Iterable[Any]
Forward: TypeAlias = Callable[[nn.Module, Any], Any]


def first_input(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, or for the first part of one of several parts: inputs and targets.

    Of a dict it is what a usual key holds, such as `image`, as the learner has it.

    Raises:
        InputError: the batch is a dict, of which nothing says what the model is to be given.
    """
    if isinstance(batch, Mapping):
        usual = [key for key in INPUT_KEYS if key in batch]
        if len(usual) == 1:
            return model(batch[usual[0]])
        keys = ", ".join(map(repr, batch))
        raise InputError(
            f"batches: expected tensors or tuples, got a dict with the keys {keys}. Say what the model is given: "
            f"forward=lambda model, batch: model(batch[{next(iter(batch), 'image')!r}])."
        )
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


def peeked(batches: Batches) -> tuple[Any, Iterator[Any]]:
    """The first batch, and all of them.

    Raises:
        InputError: there is none, or what is given are no batches.
    """
    whole = isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable)
    check(not whole, "batches", type(batches).__name__, "an iterable of batches: [images] for one")
    rest = iter(batches)
    for first in rest:
        return first, chain([first], rest)
    raise InputError(f"batches={batches!r} is not usable. Accepted: at least one batch.")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode and there are no gradients; after, each is in the mode it was in.

    Modules that torch does not see stay in the mode they are in, as they do when the model's user evaluates it.
    Compiled modules run as they are written, so that hooks are called and nothing is compiled for them.
    Generators of random numbers, torch's, numpy's and Python's, are after as they were before: a model that draws some
    draws the same the next time.
    """
    modes = {held.module: held.module.training for held in held_modules(model)}
    devices = [part for part in model.parameters() if part.is_cuda]
    with _switched_back([module for module in modes if _switches_more(module)]):
        try:
            model.eval()
            with torch.no_grad(), torch.compiler.set_stance("force_eager"), same_random(devices):
                yield
        finally:
            for module, training in modes.items():
                module.training = training


def _switches_more(module: nn.Module) -> bool:
    """Whether its `train`, which `eval` calls, is somebody's own: some merge adapters, or stop parameters' learning."""
    return any("train" in vars(kind) for kind in type(module).__mro__ if not library(kind))


@contextmanager
def _switched_back(modules: list[nn.Module]) -> Iterator[None]:
    """After, attributes, parameters and their gradient switches are as before."""
    attributes = [(module, dict(module.__dict__), dict(module._parameters)) for module in modules]
    parameters = {part: (part.requires_grad, part.detach().clone()) for one in modules for part in one.parameters()}
    try:
        yield
    finally:
        for module, own, registered in attributes:
            module.__dict__.update(own)
            module._parameters.update(registered)
        for part, (learns, value) in parameters.items():
            part.requires_grad_(learns)
            if not part.is_meta and not torch.equal(part, value):
                part.data.copy_(value)  # not seen by `undo`, to which this is no training


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Inside, forward passes in training mode use the model's buffers as ever; after, those are as they were before.

    For passes that shall not count: a second one for sharpness-aware steps, a look at a batch. Of `running` the
    backward pass has to be inside too, since it moves averages of its own.

    Raises:
        InputError: parts of the model are not made yet.
    """
    check_made(model)
    kept = [
        (module, name, buffer, buffer.clone())
        for module in (held.module for held in held_modules(model))
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                if not isinstance(module, torch.jit.ScriptModule) and module._buffers.get(name) is not buffer:
                    module._buffers[name] = buffer
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)


@contextmanager
def looking(model: nn.Module) -> Iterator[None]:
    """Inside, the model is evaluated; after, its modes, buffers and random numbers are as they were."""
    with kept_statistics(model), evaluating(model):
        yield


class Effect:
    """Runs a model over batches and compares each of its norms with the one to come, on the same inputs.

    Args:
        model: as it was.
        pairs: its norms, and those to take their place.
        batches: gone through once.
        forward: runs the model on one of them.
        fit: choose γ and β by least squares; `apply` sets them.
    """

    def __init__(
        self, model: nn.Module, pairs: Mapping[nn.Module, nn.Module], batches: Batches, forward: Forward, fit: bool
    ):
        self.forward, self.fit = forward, fit
        self.batches: list[Any] = []
        self.outputs: list[dict[str, Tensor]] = []
        self._sums: dict[nn.Module, Tensor] = {}  # of each channel: 1, x̂, x̂², y, y², x̂y, the squared change
        self._pivots: dict[nn.Module, tuple[Tensor, Tensor]] = {}  # (C, 1) each: x̂ and y are counted from them
        self._outputs: dict[nn.Module, Moments] = {}  # of the old norms
        self._rounding: dict[nn.Module, float] = {}  # of their type of numbers
        self._pairs = pairs
        self._fitted = {new for new in pairs.values() if fit and is_linear_in_its_parameters(new)}
        handles = [old.register_forward_hook(self._compare, prepend=True, with_kwargs=True) for old in pairs]
        try:
            with looking(model):
                for batch in batches:
                    self.batches.append(batch)
                    self.outputs.append(comparable(forward(model, batch), "batches"))
        finally:
            for handle in handles:
                handle.remove()

    def apply(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Sets γ and β of the norms to come, if they are to be fitted; returns them with their old values."""
        before = []
        for old in self._sums if self.fit else ():
            new = self._pairs[old]
            if self._fits(new):
                for name, value in zip(("weight", "bias"), self._fit_of(old), strict=True):
                    parameter = new.get_parameter(name)
                    before.append((parameter, parameter.detach().clone()))
                    with torch.no_grad():
                        parameter.copy_(value)
        return before

    def of(self, old: nn.Module) -> float | None:
        """Root mean square of the change over the deviation of the old output.

        None if the norm was not run, or its output hardly varies; NaN if it was given, or put out, what is not finite.
        """
        if old not in self._sums:
            return None
        count, x, xx, y, yy, xy, squares = self._sums[old]
        if self._fits(self._pairs[old]):
            gamma, beta = self._least_squares(old)
            squares = yy - 2 * (gamma * xy + beta * y) + gamma**2 * xx + 2 * gamma * beta * x + beta**2 * count
        change = squares.sum().clamp(min=0) / count.sum()
        return None if change > 0 and self._is_even(old) else ratio(change.sqrt(), self._outputs[old].deviation)

    def of_model(self, model: nn.Module) -> float:
        """The same of the outputs of the whole model, as it is now; infinite if they are of another structure."""
        with looking(model):
            new = [comparable(self.forward(model, batch), "batches") for batch in self.batches]
        before, after = ([part for parts in all_parts for part in parts.values()] for all_parts in (self.outputs, new))
        if [part.shape for part in before] != [part.shape for part in after]:
            return float("inf")
        one, other = torch.cat(before), torch.cat(after)
        return ratio((other - one).square().mean().sqrt(), one.std(correction=0))

    def _compare(self, old: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        new, x = self._pairs[old], input_of(args, kwargs)
        modes = [(module, module.training) for module in new.modules()]
        further = {name: kwargs[name] for name in ("residual", "mask") if kwargs.get(name) is not None}
        for name in set(further) - set(inspect.signature(new.forward).parameters):
            kinds = type(old).__name__, type(new).__name__
            raise InputError(
                f"batches: a later batch gives {kinds[0]} {name}=, which {kinds[1]} does not take. Skip it."
            )
        try:
            for module, _ in modes:
                module.training = False
            self._add(old, new, y, x, further)
        finally:
            for module, training in modes:
                module.training = training

    def _add(self, old: nn.Module, new: nn.Module, y: Tensor, x: Tensor, further: dict[str, Any]) -> None:
        self._outputs.setdefault(old, Moments()).add(y)
        self._rounding[old] = torch.finfo(y.dtype).eps
        if self._fits(new):
            y = y - further.pop("residual", 0)  # which γ x̂ + β does not replace
            kept, shape = dict(new._parameters), new.get_parameter("weight")
            new._parameters.update(
                weight=nn.Parameter(torch.ones_like(shape)), bias=nn.Parameter(torch.zeros_like(shape))
            )
            try:
                x_hat = new.forward(x, **further)  # not called: it has the hooks of the old one
            finally:
                new._parameters.update(kept)
            change = torch.zeros_like(y)
        else:
            x_hat = torch.zeros_like(y)
            change = new.forward(x, **further) - y
        x_hat, y, change = (part.detach().double().transpose(0, 1).flatten(1) for part in (x_hat, y, change))
        if y.shape[1] == 0:  # an empty batch
            return
        # From the first means on, so that the squares of what is far from 0 do not cancel.
        pivot_x, pivot_y = self._pivots.setdefault(old, (x_hat.mean(1, keepdim=True), y.mean(1, keepdim=True)))
        x_hat, y = x_hat - pivot_x, y - pivot_y
        parts = torch.ones_like(y), x_hat, x_hat**2, y, y**2, x_hat * y, change**2
        sums = torch.stack([part.sum(1) for part in parts])
        self._sums[old] = self._sums[old] + sums if old in self._sums else sums

    def notes(self, old: nn.Module) -> list[str]:
        """What could not be measured, or fitted, of this norm and the one in its place, and why."""
        said = []
        if self.fit and old in self._sums and not self._fits(self._pairs[old]):
            said.append("γ and β are not fitted: its output is not γ x̂ + β")
        if old in self._sums and self.of(old) is None:
            said.append("its change is not known: on these batches its output hardly varies")
        return said

    def _is_even(self, old: nn.Module) -> bool:
        """Whether the output of a norm varied by no more than rounding can make of a constant input."""
        weight = getattr(old, "weight", None)
        scale = weight.detach().abs().max().double() if isinstance(weight, Tensor) and weight.numel() > 0 else 1.0
        return bool(self._outputs[old].deviation <= _hardly(self._rounding[old]) * scale)

    def _fits(self, new: nn.Module) -> bool:
        return new in self._fitted

    def _fit_of(self, old: nn.Module) -> tuple[Tensor, Tensor]:
        """γ and β that give about what the old norm did."""
        gamma, beta = self._least_squares(old)
        pivot_x, pivot_y = (pivot.flatten() for pivot in self._pivots[old])
        return gamma, beta + pivot_y - gamma * pivot_x

    def _least_squares(self, old: nn.Module) -> tuple[Tensor, Tensor]:
        """γ, and β of what is counted from the pivots; where x̂ varies by rounding alone, γ stays as it is."""
        count, x, xx, y, _, xy, _ = self._sums[old]
        squares, pivot = xx - x**2 / count, self._pivots[old][0].flatten()
        varies = (squares / count).clamp(min=0).sqrt() > _hardly(self._rounding[old]) * pivot.abs().clamp(min=1)
        kept = self._pairs[old].get_parameter("weight").detach().to(squares)
        gamma = torch.where(varies, (xy - x * y / count) / torch.where(varies, squares, 1), kept)
        return gamma, (y - gamma * x) / count


def _hardly(rounding: float) -> float:
    """How far a normalised value may be off where rounding of the input is magnified."""
    return min(1e3 * rounding, 0.05)

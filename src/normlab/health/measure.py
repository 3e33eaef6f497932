"""Runs a model over batches, in evaluation and as its norms train, and leaves it as it was."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.optim import Optimizer

from ..errors import InputError, check
from ..surgery.build import is_frozen
from ..surgery.effect import Batches, Forward, kept_statistics, looking, peeked
from ..surgery.modules import Found, norms
from ..surgery.outputs import named_tensors, tensors
from ..surgery.trace import Trace
from ..training.batches import TARGET_KEYS
from ..training.checks import check_loss
from .figures import figures
from .layer import Layer
from .turns import Turns, parameters_of
from .watched import Ratio, Watched

Loss: TypeAlias = Callable[[Any, Any], Tensor]
Target: TypeAlias = Callable[[Any], Any]
# What a model raises for a batch that it does not take. Other errors, and subclasses, say something of their own.
REFUSALS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError)


class BatchError(InputError, RuntimeError):
    """A model does not take a batch; a RuntimeError too, as torch's own would be."""


@dataclass(frozen=True)
class Output:
    """What becomes of the model's output.

    Attributes:
        batches: gone through.
        images: in them.
        gap: root mean square of the difference between its outputs with norms in training and in evaluation mode, over
            the deviation in training.
        training_loss: mean loss with norms in training mode; None without a loss.
        evaluation_loss: the mean loss with norms in evaluation mode; None without a loss.
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
    target: Target,
    limit: int,
) -> tuple[list[Layer], Output, list[Any]]:
    """Runs the first `limit` batches through the model, in evaluation and with its norms in training mode.

    Other modules are in evaluation mode in both passes, so that dropout makes no difference.

    Returns:
        The figures of each norm, those of the output, and the batches if there is a loss.
    """
    found = norms(model)
    lazy = [one.name for one in found if isinstance(one.module, _LazyNormBase)]
    check(not lazy, "model", ", ".join(lazy), "norms that know their channels: run a batch through it first")
    empty = [name for name, part in model.named_parameters() if part.is_meta]
    check(not empty, "model", ", ".join(empty[:4]), "parameters with values: these are on the meta device")
    passes = Passes(model, found, forward, loss, optimizer, target)
    with looking(model), _kept_parameters(passes.trained):
        for batch in islice(peeked(batches)[1], limit):
            passes.add(batch)
    return passes.layers(), passes.output(), passes.kept


class Passes:
    """What was seen of a model and its norms in the batches that were added.

    Attributes:
        trained: the norms that train, as they are; all of them if the whole model is in evaluation mode.
        kept: the batches, if there is a loss.
    """

    def __init__(
        self,
        model: nn.Module,
        found: list[Found],
        forward: Forward,
        loss: Loss | None,
        optimizer: Optimizer | None,
        target: Target,
    ):
        self.model, self._found = model, found
        self._forward, self._loss, self._target = forward, loss, target
        self.trained = [one.module for one in found if one.module.training or not model.training]
        self.kept: list[Any] = []
        self._watched = {one.module: Watched(one.module) for one in found}
        self._trace = Trace(model, [norm for norm, seen in self._watched.items() if seen.blind is None])
        self._turns = Turns(optimizer if loss is not None else None)
        self._optimized = None if optimizer is None else parameters_of(optimizer)
        self._before: dict[nn.Module, nn.Module] = {}
        self._gaps, self._losses, self._count, self._images = Ratio(), [], 0, 0

    def add(self, batch: Any) -> None:
        """Run a batch, in evaluation and as the norms train."""
        self._count += 1
        first, run = self._count == 1, Run(self.model, self._forward, batch, self._count)
        # Forked, so that a model that draws random numbers draws the same ones in both passes.
        tracing = self._trace.watching() if first else nullcontext()
        with torch.random.fork_rng(), tracing, _hooked(self._watched, training=False):
            expected = run()
        if first:
            self._before = _layers_before(self._trace)
        learned = self._turns.directions(self._before.values())
        training = _training(self.model, self.trained), _hooked(self._watched, training=True)
        with training[0], training[1], torch.set_grad_enabled(bool(learned)):
            output = run()
            if self._loss is not None:
                self._judge(batch, output, expected, learned)
        _compare(self._gaps, output, expected)
        self._images += _images(batch)

    def _judge(self, batch: Any, output: Any, expected: Any, learned: list[Tensor]) -> None:
        """Take the losses of both outputs, and the gradients."""
        assert self._loss is not None
        wanted = self._target(batch)
        found = self._loss(output, wanted)
        check_loss(found, "loss's result")
        self._turns.add(learned, found)
        self._losses.append((float(found.detach()), float(self._loss(expected, wanted))))
        self.kept.append(batch)

    def output(self) -> Output:
        """What became of the model's output."""
        means = [sum(part) / self._count for part in zip(*self._losses, strict=True)] or [None, None]
        return Output(self._count, self._images, self._gaps.overall, *means)

    def layers(self) -> list[Layer]:
        """The figures of every norm, in the order of the model."""
        shown = [seen for seen in self._watched.values() if seen.images]
        first = min(shown, key=lambda seen: seen.first_pass_at, default=None)
        learns = any(parameter.requires_grad for parameter in self.model.parameters())
        return [self._layer(one, learns, first) for one in self._found]

    def _layer(self, one: Found, model_learns: bool, first: Watched | None) -> Layer:
        seen, layer = self._watched[one.module], self._before.get(one.module)
        reason = self._turns.why_not(layer) if layer is not None and self._losses else None
        if reason is not None:
            seen.say(reason)
        return figures(
            seen,
            one.name,
            frozen_by_mode=one.module not in self.trained and not is_frozen(one.module),
            model_learns=model_learns,
            optimized=self._optimized,
            closes=one.module in self._trace.rectified,
            turn=self._turns.of(layer),
            first=seen is first,
        )


@contextmanager
def _kept_parameters(norms: list[nn.Module]) -> Iterator[None]:
    """After, these norms' parameters are as they were: some set them by their first batch, as those of flows do."""
    kept = [(part, part.detach().clone()) for norm in norms for part in norm.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, value in kept:
                if not torch.equal(part, value):
                    part.copy_(value)


class Run:
    """A model's output for a batch.

    Raises:
        BatchError: the batch is empty, or the model does not take it.
    """

    def __init__(self, model: nn.Module, forward: Forward, batch: Any, number: int):
        self.model, self.forward, self.batch, self.number = model, forward, batch, number
        if any(part.numel() == 0 for part in tensors(batch)) and _images(batch) == 0:
            raise BatchError(f"batches: batch {number} has no images: {described(batch)}. Accepted: one or more.")

    def __call__(self) -> Any:
        try:
            return self.forward(self.model, self.batch)
        except Exception as error:
            if type(error) not in REFUSALS:
                raise
            said = (str(error).strip().splitlines() or [""])[0]
            raise BatchError(
                f"batches: the model does not take batch {self.number}, {described(self.batch)}. "
                f"It raised {type(error).__name__}: {said}. {_cure(self.batch)}"
            ) from error


def described(batch: Any) -> str:
    """Its tensors, by type and shape."""
    if isinstance(batch, Tensor):
        return f"a tensor of {str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    parts = [
        f"{name.removeprefix('output')} {str(part.dtype).removeprefix('torch.')} {tuple(part.shape)}"
        for name, part in named_tensors(batch).items()
    ]
    return f"{type(batch).__name__} of {', '.join(parts)}" if parts else f"{type(batch).__name__} without tensors"


def _cure(batch: Any) -> str:
    images = next(iter(tensors(batch[0] if isinstance(batch, (list, tuple)) and batch else batch)), None)
    if images is not None and not images.is_floating_point():
        return "Give images of floating point, as in training, or forward=, a function of model and batch."
    return "Give batches as in training, or forward=, a function of model and batch."


def _layers_before(trace: Trace) -> dict[nn.Module, nn.Module]:
    """The convolution or linear layer that each norm follows, also where its weight is computed from others."""
    made = {norm: trace.made_by(calls[0].input) for norm, calls in trace.calls.items() if calls}
    return {norm: layer for norm, layer in made.items() if layer is not None} | trace.before


def _compare(gaps: Ratio, output: Any, expected: Any) -> None:
    """Compare the tensors that are in both outputs and have one shape."""
    one, other = named_tensors(output), named_tensors(expected)
    for name in [name for name in one if name in other and one[name].shape == other[name].shape]:
        if one[name].is_floating_point() and not one[name].is_nested and one[name].layout is torch.strided:
            gaps.add(one[name].flatten()[None], other[name].flatten()[None])


@contextmanager
def _hooked(watched: dict[nn.Module, Watched], training: bool) -> Iterator[None]:
    handles = []
    for norm, seen in watched.items():
        seen.begin_pass()
        if seen.blind is not None:
            continue
        begins, ends = (seen.begins_training, seen.trained) if training else (seen.begins, seen.evaluated)
        handles.append(norm.register_forward_pre_hook(begins, with_kwargs=True))
        handles.append(norm.register_forward_hook(ends, with_kwargs=True))
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


def _images(batch: Any) -> int:
    """How many images: the length of the first tensor, or of the list of dicts or of (C, H, W) that detectors take."""
    parts = [*batch] if isinstance(batch, (list, tuple)) else [batch]
    if parts and parts[0] is not batch and all(isinstance(part, Mapping) for part in parts):
        return len(parts)
    first = parts[0] if parts else None
    if isinstance(first, list) and first and all(isinstance(part, Tensor) and part.dim() == 3 for part in first):
        return len(first)
    return next((len(part) for part in tensors(batch) if part.dim() > 0), 0)


def second_part(batch: Any) -> Any:
    """The targets of a batch: its second part, or in a dict what stands under a usual key.

    Raises:
        InputError: nothing says which part they are.
    """
    if isinstance(batch, Mapping):
        named = [key for key in TARGET_KEYS if key in batch]
        keys = ", ".join(map(repr, batch))
        example = f"target=lambda batch: batch[{next(reversed(batch), 'label')!r}]"
        accepted = f"a dict with one of {', '.join(TARGET_KEYS)}; or give {example}"
        check(len(named) == 1, "batches", f"a dict with the keys {keys}", accepted)
        return batch[named[0]]
    several = isinstance(batch, (list, tuple)) and len(batch) > 1
    check(several, "batches", type(batch).__name__, "tuples of inputs and targets, for a loss; or give target=")
    return list(batch)[1]

"""What another norm in the place of one changes, on batches given; γ and β that change it least."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Batches: TypeAlias = Iterable[Any]
Forward: TypeAlias = Callable[[nn.Module, Any], Any]


def first_input(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, or for the first part of one of several parts: inputs and targets."""
    return model(batch[0] if isinstance(batch, (list, tuple)) else batch)


@contextmanager
def evaluating(model: nn.Module):
    """Inside, every module is in evaluation mode and there are no gradients; after, each is in the mode it was in.

    Compiled modules run as they are written, so that hooks are called and nothing is compiled for them.
    Generators of random numbers are after as they were before: a model that draws some draws the same the next time.
    """
    modes = {module: module.training for module in model.modules()}
    devices = {part.get_device() for part in model.parameters() if part.is_cuda}
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices):
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def kept_statistics(model: nn.Module):
    """Inside, forward passes in training mode use the model's buffers as ever; after, those are as they were before.

    For passes that shall not count: a second one for sharpness-aware steps, a look at a batch. Of `running` the
    backward pass has to be inside too, since it moves averages of its own.
    """
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                buffer.copy_(value)


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
        self.outputs: list[list[Tensor]] = []
        self._sums: dict[nn.Module, Tensor] = {}  # of each channel: 1, x̂, x̂², y, y², x̂y, the squared change
        self._pairs = pairs
        handles = [old.register_forward_hook(self._compare) for old in pairs]
        try:
            with evaluating(model):
                for batch in batches:
                    self.batches.append(batch)
                    self.outputs.append(_values(forward(model, batch)))
        finally:
            for handle in handles:
                handle.remove()

    def apply(self) -> None:
        """Sets γ and β of the norms to come, if they are to be fitted."""
        if self.fit:
            for old in self._sums:
                new, (gamma, beta) = self._pairs[old], self._least_squares(old)
                with torch.no_grad():
                    new.get_parameter("weight").copy_(gamma)
                    new.get_parameter("bias").copy_(beta)

    def of(self, old: nn.Module) -> float | None:
        """Root mean square of the change over the deviation of the old output; None if the norm was not run."""
        if old not in self._sums:
            return None
        count, x, xx, y, yy, xy, squares = self._sums[old]
        if self._fits(self._pairs[old]):
            gamma, beta = self._least_squares(old)
            squares = yy - 2 * (gamma * xy + beta * y) + gamma**2 * xx + 2 * gamma * beta * x + beta**2 * count
        total, n = squares.sum().clamp(min=0), count.sum()
        deviation = (yy.sum() / n - (y.sum() / n) ** 2).clamp(min=0).sqrt()
        return _ratio((total / n).sqrt(), deviation)

    def of_model(self, model: nn.Module) -> float:
        """The same of the outputs of the whole model, as it is now."""
        with evaluating(model):
            new = [_values(self.forward(model, batch)) for batch in self.batches]
        before = torch.cat([part.flatten() for parts in self.outputs for part in parts])
        after = torch.cat([part.flatten() for parts in new for part in parts])
        return _ratio((after - before).square().mean().sqrt(), before.std(correction=0))

    def _compare(self, old: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        new, x = self._pairs[old].eval(), inputs[0]
        if self._fits(new):
            kept, shape = dict(new._parameters), new.get_parameter("weight")
            new._parameters.update(
                weight=nn.Parameter(torch.ones_like(shape)), bias=nn.Parameter(torch.zeros_like(shape))
            )
            x_hat = new.forward(x)  # not called: it has the hooks of the old one
            new._parameters.update(kept)
            change = torch.zeros_like(y)
        else:
            x_hat = torch.zeros_like(y)
            change = new.forward(x) - y
        x_hat, y, change = (part.detach().double().transpose(0, 1).flatten(1) for part in (x_hat, y, change))
        parts = torch.ones_like(y), x_hat, x_hat**2, y, y**2, x_hat * y, change**2
        sums = torch.stack([part.sum(1) for part in parts])
        self._sums[old] = self._sums[old] + sums if old in self._sums else sums

    def _fits(self, new: nn.Module) -> bool:
        return self.fit and {name for name, _ in new.named_parameters()} == {"weight", "bias"}

    def _least_squares(self, old: nn.Module) -> tuple[Tensor, Tensor]:
        count, x, xx, y, _, xy, _ = self._sums[old]
        gamma = (xy - x * y / count) / (xx - x**2 / count).clamp(min=torch.finfo(torch.float64).tiny)
        return gamma, (y - gamma * x) / count


def _values(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output)
    return [leaf.detach().double().cpu() for leaf in leaves if torch.is_tensor(leaf) and leaf.is_floating_point()]


def _ratio(change: Tensor, deviation: Tensor) -> float:
    return (change / deviation).item() if deviation > 0 else float(change > 0) and float("inf")

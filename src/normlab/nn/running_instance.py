"""Running instance norm: a mixture of running batch norm and instance norm, learned channel by channel."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..kernels import autograd, policy
from ..kernels.running import Lessons, Mixture, instance_norm, lessons_left, normalize_with_memory, parts_of
from . import functional as F
from .activation import SLOPES, activate, scripted_activation
from .base import is_fresh, settle
from .registry import register
from .running import RunningBatchNorm

VALUES = 64  # of this many values a map knows its mean half
FAINT = 1e-30  # the square of the lessons that a state comes with: those of the first batch outweigh them
SURE = 20.0  # tanh of it is 1


class RunningInstanceNorm(RunningBatchNorm):
    """Running instance norm of (N, C, *space); see `RunningInstanceNorm2d`."""

    of_gradients = (*RunningBatchNorm.of_gradients, *Lessons._fields)
    learned = Lessons._fields
    values: Final[int] = VALUES  # for TorchScript, which knows no values of a module
    instance_gradient: Tensor
    instance_gradient_square: Tensor

    def first_state(self) -> dict[str, Tensor]:
        return super().first_state() | {name: torch.zeros(self.num_features) for name in Lessons._fields}

    def rescale_gradients(self, factor: float) -> None:
        super().rescale_gradients(factor)
        self.instance_gradient_square.mul_(factor)

    def instance_share(self, *space: int) -> Tensor:
        """s, (C,), in maps of this size: 0 where a channel is running batch norm, 1 where it is instance norm."""
        return self._lessons().share(_known(space))

    def in_training(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Tensor:
        known = _known(x.shape[2:])
        if known == 0:  # running batch norm
            return super().in_training(x, mask, residual)
        lessons = self._lessons()
        parts = self._parts_for_kernels(x, policy.if_compiled, residual) if mask is None else None
        if parts is not None:
            state, slope = parts.state if self.track_running_stats else self._state(), SLOPES[self.activation]
            numbers = autograd.RunningNumbers(self.momentum, self.eps, self._kept_already())
            others = parts.weight, parts.bias, lessons, known, state, numbers
            return autograd.running_instance_norm(x, *others, self.step_bound, slope, residual)
        self._check_memory(x, residual)
        share = lessons.share(known)
        with torch.no_grad():
            running = parts_of(self.weight, share)[1]
            mean, var, rate = settle(*self._updated(x, mask, running))
        mixture = Mixture(share, known, lessons_left(self.momentum), lessons)
        guards = self._state().memory, self.step_bound, self.eps
        y = normalize_with_memory(x, mean, var, self.weight, self.bias, rate, *guards, mask, mixture)
        return activate(y, self.activation, residual)

    def in_evaluation(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Tensor:
        known = _known(x.shape[2:])
        if known == 0:
            return super().in_evaluation(x, mask, residual)
        self._check_memory(x, residual)
        own, running = parts_of(self.weight, self._lessons().share(known))
        if x.numel() == 0:
            return self._evaluate(x, residual, running)
        parts = self._parts_for_kernels(x, policy.for_activated_groups) if mask is None else None
        if parts is not None and own.dtype is torch.float32:
            y = autograd.group_norm(x, self.num_features, own, None, self.eps, 1.0)
        else:
            y = (instance_norm(x, mask, self.eps)[0] * F.per_channel(own, x)).to(x.dtype)
        return self._evaluate(x, y if residual is None else y + residual, running)

    def _lessons(self) -> Lessons:
        """The buffers, to be written, or copies while nothing is to be tracked."""
        lessons = self.instance_gradient, self.instance_gradient_square
        return Lessons(*lessons if self.track_running_stats else (part.clone() for part in lessons))

    def _scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("This norm is scripted for evaluation: call eval() before.")
        values = input[0, 0].numel() if input.numel() > 0 else 1
        known = values / (values + self.values) if values > 1 else 0.0
        lessons = self.instance_gradient / self.instance_gradient_square.clamp(min=1.2e-38).sqrt()
        share = (1 - lessons.tanh()) * (known / 2)
        own = share if self.weight is None else share * self.weight
        running = 1 - share if self.weight is None else (1 - share) * self.weight
        mean, var = self.running_mean, self.running_var
        y = torch.nn.functional.batch_norm(input, mean, var, running, self.bias, False, 0.0, self.eps)
        if values > 1:
            y = y + torch.group_norm(input.flatten(2), self.num_features, own, None, self.eps).view(input.shape)
        return scripted_activation(y, self.activation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        gate = state_dict.pop(prefix + "gate", None)  # of before there were lessons: s is four times this
        if gate is None and prefix + "running_mean" in state_dict and not is_fresh(state_dict, prefix):
            gate = torch.zeros(self.num_features)  # a batch norm's state
        if gate is not None and prefix + "instance_gradient" not in state_dict:
            sure = torch.atanh(1 - 2 * (4 * gate.float()).clamp(0, 1)).clamp(-SURE, SURE)
            square = torch.full_like(sure, FAINT)
            state_dict |= {
                prefix + "instance_gradient": sure * square.sqrt(),
                prefix + "instance_gradient_square": square,
            }
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _known(space: Sequence[int]) -> float:
    """How well a map of this size knows its own mean: n / (n + 64) with n values, 0 of one value."""
    values = math.prod(space)
    return values / (values + VALUES) if values > 1 else 0.0


class RunningInstanceNorm1d(RunningInstanceNorm):
    """Running instance norm of (N, C) or (N, C, L); see `RunningInstanceNorm2d`.

    Example:
        >>> RunningInstanceNorm1d(4)(torch.randn(1, 4, 5)).shape
        torch.Size([1, 4, 5])
    """

    accepted_dims = (2, 3)


class RunningInstanceNorm2d(RunningInstanceNorm):
    """Running instance norm of (N, C, H, W): y = γ ((1 − s) x̂ + s i) + β, per channel.

    x̂ is the input as running batch norm normalises it, by statistics of the last batches. i is the input as instance
    norm does, by those of its own image. s, from 0 to 1, is learned from its gradients:

        s = n / (n + 64) · (1 − tanh z) / 2          z = Σ ∂L/∂s / √Σ(∂L/∂s)²

    n is the number of values of a map. So large maps begin with s = 0.5, and small ones, of which few values are known,
    with running batch norm; one value is that alone. Where contrast and brightness change from image to image s grows;
    where the image's own mean says something it falls. The sums are buffers and reach back over about a thousand
    backward passes. z is as sure as the gradients agree, however long they are: no optimizer and no rate moves s.

    Guards, arguments and other buffers are those of `RunningBatchNorm2d`, with γ and β those of the whole. The state
    of a batch norm or a running one loads: s is 0 until the first backward pass, so that evaluation gives what it gave.
    `normlab.convert` begins with the s of a new layer.

    Args:
        num_features: C.
        eps: added to both variances.
        momentum: see `RunningBatchNorm2d`.
        affine: learn γ and β; s is learned in any case.
        track_running_stats: True; see `RunningStatistics`.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.
        step_bound: see `RunningBatchNorm2d`.
        activation: see `BatchNorm2d`.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> norm = RunningInstanceNorm2d(3)
        >>> norm(torch.randn(1, 3, 8, 8)).shape
        torch.Size([1, 3, 8, 8])
        >>> norm.instance_share(8, 8).tolist()  # of 64 values
        [0.25, 0.25, 0.25]

    Source: here; the mixture is that of Nam and Kim 2018, "Batch-Instance Normalization", equation 3.
    """

    accepted_dims = (4,)


class RunningInstanceNorm3d(RunningInstanceNorm):
    """Running instance norm of (N, C, D, H, W); see `RunningInstanceNorm2d`.

    Example:
        >>> RunningInstanceNorm3d(4)(torch.randn(1, 4, 3, 5, 5)).shape
        torch.Size([1, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


register(
    "running_instance",
    RunningInstanceNorm1d,
    RunningInstanceNorm2d,
    RunningInstanceNorm3d,
    summary="running batch norm and instance norm, a learned mixture",
    over="the last batches",
    about="running batch norm and instance norm, in a mixture that each channel learns",
    source="here: [docs/running.md](docs/running.md)",
    cost=3.0,
)

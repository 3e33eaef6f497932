"""Running instance norm: a mixture of running batch norm and instance norm, learned channel by channel."""

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..kernels import autograd, policy
from ..kernels.running import instance_norm, normalize_with_memory, parts_of
from . import functional as F
from .activation import SLOPES, activate, scripted_activation
from .base import is_fresh, settle
from .registry import register
from .running import RunningBatchNorm

GATE_SPEED = 4.0  # s over gate: where steps have one length, as AdamW's, s moves four times as fast as γ
FIRST_SHARE = 0.5  # s at first, of a large map
VALUES = 64  # of this many values a map knows its mean half


class RunningInstanceNorm(RunningBatchNorm):
    """Running instance norm of (N, C, *space); see `RunningInstanceNorm2d`."""

    gate: nn.Parameter
    speed: Final[float] = GATE_SPEED  # for TorchScript, which knows no values of a module
    values: Final[int] = VALUES

    def first_parameters(self) -> dict[str, tuple[int, float]]:
        return {"gate": (self.num_features, FIRST_SHARE / GATE_SPEED)}

    def instance_share(self, *space: int) -> Tensor:
        """s, (C,), in maps of this size: 0 where a channel is running batch norm, 1 where it is instance norm."""
        return _Share.apply(self.gate, _known(space)).detach()

    def in_training(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Tensor:
        known = _known(x.shape[2:])
        if known == 0:  # running batch norm
            return super().in_training(_WithGate.apply(x, self.gate), mask, residual)
        parts = self._parts_for_kernels(x, policy.if_compiled, residual) if mask is None else None
        if parts is not None and self.gate.dtype is torch.float32:
            state, slope = parts.state if self.track_running_stats else self._state(), SLOPES[self.activation]
            numbers = autograd.RunningNumbers(self.momentum, self.eps, self._kept_already())
            others = parts.weight, parts.bias, autograd.Gate(self.gate, GATE_SPEED, known), state, numbers
            return autograd.running_instance_norm(x, *others, self.step_bound, slope, residual)
        self._check_memory(x, residual)
        share = _Share.apply(self.gate, known)
        with torch.no_grad():
            running = parts_of(self.weight, share)[1]
            mean, var, rate = settle(*self._updated(x, mask, running))
        guards = self._state().memory, self.step_bound, self.eps
        y = normalize_with_memory(x, mean, var, self.weight, self.bias, rate, *guards, mask, share)
        return activate(y, self.activation, residual)

    def in_evaluation(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Tensor:
        known = _known(x.shape[2:])
        if known == 0:
            return super().in_evaluation(_WithGate.apply(x, self.gate), mask, residual)
        self._check_memory(x, residual)
        own, running = parts_of(self.weight, _Share.apply(self.gate, known))
        if x.numel() == 0:
            return self._evaluate(x, residual, running)
        parts = self._parts_for_kernels(x, policy.for_activated_groups) if mask is None else None
        if parts is not None and own.dtype is torch.float32:
            y = autograd.group_norm(x, self.num_features, own, None, self.eps, 1.0)
        else:
            y = (instance_norm(x, mask, self.eps)[0] * F.per_channel(own, x)).to(x.dtype)
        return self._evaluate(x, y if residual is None else y + residual, running)

    def _scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("This norm is scripted for evaluation: call eval() before.")
        values = input[0, 0].numel() if input.numel() > 0 else 1
        share = (self.speed * self.gate).clamp(0, 1) * (values / (values + self.values) if values > 1 else 0.0)
        own = share if self.weight is None else share * self.weight
        running = 1 - share if self.weight is None else (1 - share) * self.weight
        mean, var = self.running_mean, self.running_var
        y = torch.nn.functional.batch_norm(input, mean, var, running, self.bias, False, 0.0, self.eps)
        if values > 1:
            y = y + torch.group_norm(input.flatten(2), self.num_features, own, None, self.eps).view(input.shape)
        return scripted_activation(y, self.activation)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "running_mean" in state_dict:  # a batch norm's state has no gate
            first = FIRST_SHARE / GATE_SPEED if is_fresh(state_dict, prefix) else 0.0
            state_dict.setdefault(prefix + "gate", torch.full((self.num_features,), first))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _known(space: Sequence[int]) -> float:
    """How well a map of this size knows its own mean: n / (n + 64) with n values, 0 of one value."""
    values = math.prod(space)
    return values / (values + VALUES) if values > 1 else 0.0


class _Share(torch.autograd.Function):
    """s = GATE_SPEED · gate, between 0 and 1, times how well a map knows its mean.

    At 0 and 1 s goes back as soon as its gradient says so: a clamp's gradient would be 0 outside.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(gate, known):  # types: (C,), float
        return (gate * GATE_SPEED).clamp(0, 1) * known

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        gate, ctx.known = inputs
        ctx.save_for_backward(gate)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        (gate,) = ctx.saved_tensors
        outwards = torch.where(grads[0] > 0, gate <= 0, gate * GATE_SPEED >= 1)
        return torch.where(outwards, 0, grads[0] * (GATE_SPEED * ctx.known)), None


class _WithGate(torch.autograd.Function):
    """x, and a gradient of 0 for a gate that is not used: DistributedDataParallel waits for every parameter's."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, gate):  # types: Tensor, (C,)
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        return grads[0], torch.zeros_like(*ctx.saved_tensors)


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
    norm does, by those of its own image. s is learned, from 0 to 1:

        s = min(1, max(0, 4 gate)) · n / (n + 64)

    n is the number of values of a map. So large maps begin with s = 0.5, and small ones, of which few values are known,
    with running batch norm; one value is that alone. Where contrast and brightness change from image to image s grows;
    where the image's own mean says something it falls. Its gradient is exact, where those of γ and β are slowed down.

    Guards, arguments and buffers are those of `RunningBatchNorm2d`, with γ and β those of the whole. The state of a
    batch norm or a running one loads: s is 0 then, so that evaluation gives what it gave. `normlab.convert` begins with
    the s of a new layer.

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

"""Running batch norm: trains at batch one and two, with the statistics that evaluation will use."""

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..kernels import autograd, policy
from ..kernels.running import STATISTICS, State, normalize_with_memory, rate_of, take_in, upgrade
from . import functional as F
from .activation import SLOPES, activate, check_activation, described, scripted_activation
from .base import RunningStatistics, is_fresh, settle
from .call import call, for_script
from .registry import register


class RunningBatchNorm(RunningStatistics):
    """Running batch norm of (N, C, *space); see `RunningBatchNorm2d`."""

    _checks_memory = True
    _state_type = State
    of_gradients = ("gradient_average", "gradient_latest", "parameters_gradient")
    momentum: float
    share: Tensor
    innovation: Tensor
    gradient_share: Tensor
    gradient_average: Tensor
    gradient_latest: Tensor
    parameters_before: Tensor
    parameters_gradient: Tensor
    log_learning_rate: Tensor
    learning_rate_steps: Tensor
    output_square: Tensor
    step_length: Tensor
    latest_gradient_share: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        step_bound: float | None = 0.006,
        activation: str | None = None,
    ):
        check(momentum is not None and 0 < momentum < 1, "momentum", momentum, "a number above 0, below 1")
        bounded = step_bound is None or step_bound > 0
        check(bounded, "step_bound", step_bound, "a number above 0, or None for no bound")
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias)
        self.step_bound, self.activation = step_bound, check_activation(activation)

    def first_state(self) -> dict[str, Tensor]:
        state = State.empty(self.num_features)._asdict()
        return {name: state[name] for name in State._fields[3:]}

    def rescale_gradients(self, factor: float) -> None:
        """As the template's; the measured learning rate is for one of the gradients as they come."""
        super().rescale_gradients(factor)
        self.log_learning_rate.sub_(math.log(factor))
        self.step_length.div_(factor)

    def settled_state(self) -> dict[str, Tensor]:
        return {"share": torch.tensor(self.momentum)}  # batch norm's own: statistics may lag where weights move fast

    @for_script
    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The norm of `input`, and its activation of the sum with `residual`; see `OnKernels.forward`."""
        return call(self, input, mask, residual)

    def in_training(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Tensor:
        parts = self._parts_for_kernels(x, policy.always, residual) if mask is None else None
        if parts is not None:
            state, slope = parts.state if self.track_running_stats else self._state(), SLOPES[self.activation]
            numbers = autograd.RunningNumbers(self.momentum, self.eps, self._kept_already())
            weight, bias = parts.weight, parts.bias
            return autograd.running_norm(x, weight, bias, state, numbers, self.step_bound, slope, residual)
        self._check_memory(x, residual)
        with torch.no_grad():
            mean, var, rate = settle(*self._updated(x, mask, self.weight))
        memory = self._state().memory
        y = normalize_with_memory(x, mean, var, self.weight, self.bias, rate, memory, self.step_bound, self.eps, mask)
        return activate(y, self.activation, residual)

    def in_evaluation(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Tensor:
        return self._evaluate(x, residual, self.weight)

    def _evaluate(self, x: Tensor, residual: Tensor | None, weight: Tensor | None) -> Tensor:
        """`in_evaluation` with `weight` for γ."""
        parts = self._parts_for_kernels(x, policy.for_constants, residual)
        if parts is not None and (weight is None or weight.dtype is torch.float32):
            mean, var, slope = parts.state.running_mean, parts.state.running_var, SLOPES[self.activation]
            return autograd.frozen_norm(x, mean, var, weight, parts.bias, self.eps, slope, residual)
        self._check_memory(x, residual)
        mean, var = F.unless_none((self.running_mean, self.running_var), x)
        return activate(F.normalize(x, mean, var, weight, self.bias, self.eps), self.activation, residual)

    def _state(self) -> State:
        """The buffers, to be written, or copies while nothing is to be tracked."""
        state = (getattr(self, name) for name in State._fields)
        return State._make(state if self.track_running_stats else (part.clone() for part in state))

    def _scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("This norm is scripted for evaluation: call eval() before.")
        mean, var = self.running_mean, self.running_var
        y = torch.nn.functional.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        return scripted_activation(y, self.activation)

    def extra_repr(self) -> str:
        options = f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, step_bound={self.step_bound}"
        return f"{self.num_features}, {options}" + described(self.activation)

    def _updated(self, x: Tensor, mask: Tensor | None, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance with this batch in them, which are kept, and its share in A and B."""
        state = State._make(getattr(self, name) for name in State._fields)
        if not self._kept_already():
            mean, var, counts = self._moments(x.to(self.running_mean.dtype), mask)
            before, state = state, take_in(state, mean, var, len(x), weight, self.momentum, self.eps, counts)
            self._keep(*zip(before[STATISTICS], state[STATISTICS], strict=True))
        return state.running_mean, state.running_var, rate_of(state)

    def _moments(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, int | Tensor]:
        """Mean and biased variance of the batch, and 1; of one without a value that counts the running ones, and 0."""
        if mask is None:
            var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
            return mean, var, 1
        mean, var, count = F.masked_moments(x, mask)
        mean, var = F.unless_empty(count, (mean, var), (self.running_mean, self.running_var))
        return mean.flatten(), var.flatten(), (count > 0).long()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "running_mean" in state_dict:
            upgrade(state_dict, prefix)
            # Old files do not say how many batches there were: some, if the statistics are not fresh.
            batches = torch.tensor(int(not is_fresh(state_dict, prefix)))
            state_dict.setdefault(prefix + "num_batches_tracked", batches)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RunningBatchNorm1d(RunningBatchNorm):
    """Running batch norm of (N, C) or (N, C, L); see `RunningBatchNorm2d`.

    Example:
        >>> RunningBatchNorm1d(4)(torch.randn(1, 4, 5)).shape
        torch.Size([1, 4, 5])
    """

    accepted_dims = (2, 3)


class RunningBatchNorm2d(RunningBatchNorm):
    """Running batch norm of (N, C, H, W): y = γ (x − μ) / √(σ² + eps) + β, per channel.

    μ and σ² are the running statistics, in evaluation and in training. In training this batch, of mean m and biased
    variance v, enters them first, with the share w:

        μ' = μ + w(m − μ)           σ²' = (1−w)σ² + w v + w(1−w)(m − μ)²

    Three ideas make it train at any batch size. Watch the surprise: w grows while the means of batches stray from μ in
    one direction, and falls while they stray at random. Subtract remembered means: in the backward pass the means A of
    g and B of g x̂ are running averages too, with a share r of their own. Three guards for high rates: a bound for each
    image's gradient, slower γ and β in small batches, and a pull that shrinks them while they overshoot.

    Each forward pass in training moves μ and σ², each backward pass A and B. A batch with an infinite value or NaN
    moves none of them. Arguments and buffers are those of `torch.nn.BatchNorm2d`, and the rest of `State` on top. The
    state of a batch norm loads, and this one's loads into a batch norm with `strict=False`.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: how fast w and r adapt; above 0, below 1.
        affine: learn γ and β.
        track_running_stats: True; see `RunningStatistics`.
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.
        step_bound: how far one image may move (γ, β) in a step, as a part of their length; None for no bound and pull.
        activation: see `BatchNorm2d`.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> norm = RunningBatchNorm2d(8)
        >>> norm(torch.randn(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])

    Source: `docs/running.md`, with all formulas.
    """

    accepted_dims = (4,)


class RunningBatchNorm3d(RunningBatchNorm):
    """Running batch norm of (N, C, D, H, W); see `RunningBatchNorm2d`.

    Example:
        >>> RunningBatchNorm3d(4)(torch.randn(1, 4, 3, 5, 5)).shape
        torch.Size([1, 4, 3, 5, 5])
    """

    accepted_dims = (5,)


register(
    "running",
    RunningBatchNorm1d,
    RunningBatchNorm2d,
    RunningBatchNorm3d,
    summary="running batch norm: each channel over the last images, training too",
    over="the last batches",
    about="batch norm by running statistics, in training too",
    source="here: [docs/running.md](docs/running.md)",
    cost=3.0,
)

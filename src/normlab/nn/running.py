"""Running batch norm: trains at batch one and two, with the statistics that evaluation will use."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..kernels import fused, operators
from ..kernels.ops import GradientMemory, normalize_with_memory
from . import functional as F
from .activation import SLOPES, activate, check_activation, check_residual, described, scripted_activation
from .base import RunningStatistics, is_fresh, settle
from .call import call, for_script

# The share of a batch in the statistics after those of another layer were loaded, which had time to settle.
SETTLED_SHARE = 0.01
# The least share, over momentum: statistics reach back over a thousand batches at most.
LEAST_SHARE = 0.01
# The same in the averages of the backward pass: these reach back over a hundred.
LEAST_GRADIENT_SHARE = 0.1
# Times 1/N, the cosine of innovation and push above which that share grows.
TOLERATED_DRIFT = 0.2
STATISTICS = fused.RunningStatistics._fields
MEMORY = tuple(f"gradient_{name}" for name in GradientMemory._fields)


class RunningBatchNorm2d(RunningStatistics):
    """Running batch norm of (N, C, H, W): y = γ (x − μ) / √(σ² + eps) + β, per channel.

    μ and σ² are the running statistics, in evaluation as in training, where this batch enters them first. With mean m
    and biased variance v it has the share w:

        μ' = μ + w(m − μ)           σ²' = (1−w)σ² + w v + w(1−w)(m − μ)²

    w is found while training, one for all channels. It starts at 1; at the t-th batch, with e = (m − μ)/√(σ² + eps) and
    e' that of the batch before,

        log w ← log w + max(momentum, 1/t) · cos(e, e')         momentum/100 ≤ w ≤ 1

    Where layers below move fast the mean lags, e and e' point the same way, and w grows until the statistics follow;
    where they move slowly and batches are small and noisy it falls, until the statistics have many images in them.

    The gradient is batch norm's, with moving averages A and B in the place of the two means that a small batch knows
    too badly; this batch enters them first, with the share r, at the first batches 1/t:

        ∂L/∂x = γ/√(σ²'+eps) · (g − A − x̂ B)        A ≈ mean g, B ≈ mean g x̂

    With r = 1 they are batch norm's, and what a batch has of its own in them is lost to learning: of two images half,
    of N one N-th. With a small r nothing is lost, but the batch now pushes the mean of the layer below, in the
    direction d = γ/(σ² + eps) · (A − mean g); averages of its successors take that back later, and at a high learning
    rate the weights are thrown about in between. So r is as small as it can be without the push showing in the next
    innovation, by more than the loss is worth:

        log r ← log r + max(momentum, 1/t) · (cos(e, d) − .2/N)          momentum/10 ≤ r ≤ 1

    Of this batch's own part in B no more is subtracted than removes what of g lies along x̂. There are three more
    restraints, for at a high learning rate a small batch drives γ, β and the layer above without limit.
    Each image's gradient g is bounded: times the learning rate it is no longer than `step_bound` times (γ, β); γ and β
    learn at √(N/64) of the learning rate, up to 64 images; and while the bound is met and the output is so large that a
    linear layer above overshoots, γ and β are pulled towards 0. The learning rate is measured, by how far γ and β have
    moved, so that neither it nor the scale of the loss need be known; a step that was clipped shows too, and counts for
    less in A and B. `normlab.kernels.ops.normalize_with_memory` has the formulas. At a usual learning rate the bound is
    seldom met.

    The arguments are those of `torch.nn.BatchNorm2d`, and so are `weight`, `bias`, `running_mean`, `running_var` and
    `num_batches_tracked`; `share` (w), `innovation` (e), `gradient_share` (r) and five more buffers `gradient_…` (see
    `GradientMemory`) come on top. The state of a batch norm loads into this layer, with w = 0.01; one that never saw a
    batch starts as new. Its own loads into a batch norm with `strict=False`. Statistics are kept and computed in
    float32 at least. Each forward pass in training mode moves μ and σ², each backward pass A and B: under gradient
    accumulation every part of the batch counts as a batch. A batch with an infinite value or NaN changes none of them.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: how fast w and r adapt; above 0, below 1.
        affine: learn γ and β.
        track_running_stats: True; see `RunningStatistics`.
        device: of parameters and statistics.
        dtype: of the parameters.
        bias: learn β.
        step_bound: as above; if None, or without γ and β, there is neither bound nor pull.
        activation: see `BatchNorm2d`.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Source: `studies/flagship`. The choice of w: Mehra 1970, "On the Identification of Variances and Adaptive Kalman
    Filtering". Averages in the backward pass: Yan et al. 2020, "Towards Stabilizing Batch Statistics in
    Backward Propagation of Batch Normalization".
    """

    _checks_memory = True
    _buffer_names = (*STATISTICS, *MEMORY)
    momentum: float
    share: Tensor
    innovation: Tensor
    gradient_share: Tensor
    gradient_average: Tensor
    gradient_latest: Tensor
    gradient_parameters: Tensor
    gradient_push: Tensor
    gradient_measured: Tensor

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
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, bias=bias)
        self.step_bound, self.activation = step_bound, check_activation(activation)
        self.register_buffer("share", torch.ones((), device=device))
        self.register_buffer("innovation", torch.zeros(num_features, device=device))
        self.register_buffer("gradient_share", torch.ones((), device=device))
        for name, buffer in zip(MEMORY, GradientMemory.empty(num_features, device), strict=True):
            self.register_buffer(name, buffer)
        if dtype is not None:
            self.to(dtype)

    def reset_running_stats(self) -> None:
        """Forget every batch: means 0, variances 1, gradients 0."""
        super().reset_running_stats()
        if "gradient_measured" in self._buffers:  # torch's constructor resets once before they are there
            self.share.fill_(1)
            self.gradient_share.fill_(1)
            for name in ("innovation", *MEMORY):
                getattr(self, name).zero_()

    @for_script
    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """The norm of `input`, and its activation of the sum with `residual`; see `OnKernels.forward`."""
        return call(self, input, mask, residual)

    def _normalize(self, x: Tensor, mask: Tensor | None, residual: Tensor | None = None) -> Tensor:
        self._check_input_dim(x)
        if residual is not None:
            check_residual(x, residual)
        taken = self._taken(x, residual)
        slope = SLOPES[self.activation]
        if not self.training or x.numel() == 0:  # an empty batch has nothing to add
            mean, var = self.running_mean, self.running_var
            if taken is not None and operators.preferred(x, reduces=False):
                weight, bias = taken[:2]
                return fused.frozen_norm(x, mean, var, weight, bias, self.eps, slope, residual)
            self._check_memory(x, residual)
            mean, var = (F.per_channel(part, x) for part in (mean, var))
            return activate(F.normalize(x, mean, var, self.weight, self.bias, self.eps), self.activation, residual)
        if taken is not None and mask is None:
            return self._fast(x, taken, slope, residual)
        self._check_memory(x, residual)
        with torch.no_grad():
            mean, var, rate = settle(*self._updated(x, mask))
        memory = GradientMemory._make(self._own(getattr(self, name) for name in MEMORY))
        y = normalize_with_memory(x, mean, var, self.weight, self.bias, rate, memory, self.step_bound, self.eps, mask)
        return activate(y, self.activation, residual)

    def _own(self, buffers: Iterable[Tensor]) -> list[Tensor]:
        """Buffers to be written, or copies while nothing is to be tracked."""
        return list(buffers) if self.track_running_stats else [buffer.clone() for buffer in buffers]

    def _scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("This norm is scripted for evaluation: call eval() before.")
        mean, var = self.running_mean, self.running_var
        y = torch.nn.functional.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        return scripted_activation(y, self.activation)

    def _fast(self, x: Tensor, taken: tuple[Any, ...], slope: float, residual: Tensor | None) -> Tensor:
        """The norm in training, by the kernels."""
        weight, bias = taken[:2]
        buffers = self._own(taken[2:13])
        statistics, memory = fused.RunningStatistics._make(buffers[:6]), GradientMemory._make(buffers[6:])
        least = LEAST_SHARE * self.momentum, LEAST_GRADIENT_SHARE * self.momentum
        numbers = fused.RunningNumbers(self.momentum, self.eps, *least, TOLERATED_DRIFT, self._kept_already())
        return fused.running_norm(x, weight, bias, statistics, memory, numbers, self.step_bound, slope, residual)

    def extra_repr(self) -> str:
        options = f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, step_bound={self.step_bound}"
        return f"{self.num_features}, {options}" + described(self.activation)

    def _updated(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance with this batch in them, which are kept, and its share in A and B."""
        if self._kept_already():
            rate = self._first_batches(self.num_batches_tracked, self.gradient_share)
            return self.running_mean, self.running_var, rate
        batch_mean, batch_var, counts = self._moments(x.to(self.running_mean.dtype), mask)
        batches = self.num_batches_tracked + counts
        scale = (self.running_var + self.eps).rsqrt()
        innovation = (batch_mean - self.running_mean) * scale
        push = (self.gradient_average[1] - self.gradient_latest[1]) * scale.square()
        push = push if self.weight is None else push * self.weight
        gain = self._first_batches(batches, self.momentum)
        share = F.adapted_share(self.share, innovation, self.innovation, gain)
        share = share.clamp(LEAST_SHARE * self.momentum, 1)
        gradient_share = F.adapted_share(self.gradient_share, innovation, push, gain, TOLERATED_DRIFT / len(x))
        gradient_share = gradient_share.clamp(LEAST_GRADIENT_SHARE * self.momentum, 1)
        mean, var = F.take_in(batch_mean, batch_var, self.running_mean, self.running_var, share)
        new, kept = (
            (mean, var, batches, share, innovation, gradient_share),
            [getattr(self, name) for name in STATISTICS],
        )
        if isinstance(counts, Tensor):
            entered = counts > 0
            new = tuple(torch.where(entered, value, before) for value, before in zip(new, kept, strict=True))
        self._keep(*zip(kept, new, strict=True))
        return mean, var, self._first_batches(batches, gradient_share)

    def _moments(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, int | Tensor]:
        """Mean and biased variance of the batch, and 1; of one without a value that counts the running ones, and 0."""
        if mask is None:
            var, mean = torch.var_mean(x, (0, *range(2, x.dim())), correction=0)
            return mean, var, 1
        mean, var, count = F.masked_moments(x, mask)
        mean, var = F.unless_empty(count, (mean, var), (self.running_mean, self.running_var))
        return mean.flatten(), var.flatten(), (count > 0).long()

    def _first_batches(self, batches: Tensor, rate: float | Tensor) -> Tensor:
        """max(rate, 1/t): what makes a moving average the mean of the first batches."""
        return batches.clamp(min=1).to(self.running_mean.dtype).reciprocal().clamp(min=rate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "running_mean" in state_dict:  # what a batch norm's state has not
            fresh = is_fresh(state_dict, prefix)  # old files do not say how many batches: some, if it is not
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(int(not fresh)))
            state_dict.setdefault(prefix + "share", torch.tensor(1.0 if fresh else SETTLED_SHARE))
            state_dict.setdefault(prefix + "innovation", torch.zeros(self.num_features))
            state_dict.setdefault(prefix + "gradient_share", torch.ones(()))
            for name, buffer in zip(MEMORY, GradientMemory.empty(self.num_features), strict=True):
                state_dict.setdefault(prefix + name, buffer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RunningBatchNorm1d(RunningBatchNorm2d):
    """Running batch norm of (N, C) or (N, C, L); see `RunningBatchNorm2d`."""

    accepted_dims = (2, 3)


class RunningBatchNorm3d(RunningBatchNorm2d):
    """Running batch norm of (N, C, D, H, W); see `RunningBatchNorm2d`."""

    accepted_dims = (5,)

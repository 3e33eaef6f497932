"""Running batch norm: trains at batch one and two, with the statistics that evaluation will use."""

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..kernels.ops import GradientMemory, normalize_with_memory
from . import functional as F
from .base import RunningStatistics, recomputing, remember, settle

# What `momentum` is the weight of: so many new values a channel in the statistics of training, so many new images in
# those of evaluation.
RECENT_VALUES, LONG_IMAGES = 20, 100


class RunningBatchNorm2d(RunningStatistics):
    """Running batch norm of (N, C, H, W): y = γ (x − μ) / √(σ² + eps) + β, per channel.

    μ and σ² are running statistics. In training they are `recent_mean` and `recent_var`, which this batch enters first.
    The t-th batch, of n = N·H·W values a channel with mean m and biased variance v, has the share

        w = max(α, 1/t, d)          α = 1 − (1 − momentum)^(n/20)
        μ' = μ + w(m − μ)           σ²' = (1−w)σ² + w v + w(1−w)(m − μ)²

    so that they reach back as far as it takes to have some two hundred values: where maps are large this batch has them
    and the statistics are its own, as in batch norm; a map of one pixel is normalised by the last two hundred images,
    whatever the batch size. d is above 0 only where the weights have moved so fast that the statistics lag behind: with
    q the mean over channels of (v + (m − μ)²) / (σ² + eps), each counted as 16 at most, d = (q/2.5 − 1) / (q − 1) for
    q > 2.5, which brings the mean square of the normalised batch back to 2.5. In evaluation μ and σ² are those of the
    last thousand images or so, `running_mean` and `running_var`: with N/100 in the place of n/20, and d = 0.

    The gradient is batch norm's, with moving averages A and B (rates max(α, 1/t)) in the place of the two means that a
    small batch knows too badly:

        ∂L/∂x = γ/√(σ²'+eps) · (g − A − x̂ B)        A ≈ mean g, B ≈ mean g x̂

    with three restraints, for at a high learning rate a small batch drives γ, β and the layer above without limit.
    Each image's gradient g is bounded: times the learning rate it is no longer than `step_bound` times (γ, β); γ and β
    learn at a tenth of the learning rate; and while the bound is met and the output is so large that a linear layer
    above overshoots, γ and β are pulled towards 0. The learning rate is measured, by how far γ and β have moved, so
    that neither it nor the scale of the loss need be known. `normlab.kernels.ops.normalize_with_memory` has the
    formulas. At a usual learning rate the bound is seldom met, and with N in the hundreds this is batch norm.

    The arguments are those of `torch.nn.BatchNorm2d`, and so are `weight`, `bias`, `running_mean`, `running_var` and
    `num_batches_tracked`; the recent statistics and four buffers `gradient_…` (see `GradientMemory`) come on top. The
    state of a batch norm loads into this layer; its own loads into a batch norm with `strict=False`. Statistics are
    kept and computed in float32 at least. Each forward pass in training mode moves μ and σ², each backward pass A and
    B: under gradient accumulation every part of the batch counts as a batch. A batch with an infinite value or NaN
    changes none of them.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of 20 new values in the recent statistics, of 100 new images in the running ones; above 0,
            below 1.
        affine: learn γ and β.
        device: of parameters and statistics.
        dtype: of the parameters.
        step_bound: as above; if None, or without γ and β, there is neither bound nor pull.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Source: `studies/flagship`. Averages in the backward pass: Yan et al. 2020, "Towards Stabilizing Batch Statistics in
    Backward Propagation of Batch Normalization".
    """

    recent_mean: Tensor
    recent_var: Tensor
    gradient_average: Tensor
    gradient_parameters: Tensor
    gradient_push: Tensor
    gradient_measured: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        step_bound: float | None = 0.006,
    ):
        check(0 < momentum < 1, "momentum", momentum, "a number above 0, below 1")
        bounded = step_bound is None or step_bound > 0
        check(bounded, "step_bound", step_bound, "a number above 0, or None for no bound")
        super().__init__(num_features, eps, momentum, affine, device)
        self.step_bound = step_bound
        self.register_buffer("recent_mean", torch.zeros(num_features, device=device))
        self.register_buffer("recent_var", torch.ones(num_features, device=device))
        for name, buffer in GradientMemory.empty(num_features, device)._asdict().items():
            self.register_buffer(f"gradient_{name}", buffer)
        if dtype is not None:
            self.to(dtype)

    def reset_running_stats(self) -> None:
        """Forget every batch: means 0, variances 1, gradients 0."""
        super().reset_running_stats()
        if "gradient_measured" in self._buffers:  # torch's constructor resets once before they are there
            self.recent_var.fill_(1)
            for buffer in (self.recent_mean, *self._memory()):
                buffer.zero_()

    def forward(self, x: Tensor) -> Tensor:
        self._check_input_dim(x)
        if not self.training or x.numel() == 0:  # an empty batch has nothing to add
            mean, var = (F.per_channel(part, x) for part in (self.running_mean, self.running_var))
            return F.normalize(x, mean, var, self.weight, self.bias, self.eps)
        with torch.no_grad():
            mean, var, rate = settle(*self._updated(x))
        return normalize_with_memory(
            x, mean, var, self.weight, self.bias, rate, self._memory(), self.step_bound, self.eps
        )

    def extra_repr(self) -> str:
        options = f"eps={self.eps}, momentum={self.momentum}, affine={self.affine}, step_bound={self.step_bound}"
        return f"{self.num_features}, {options}"

    def _updated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Recent mean and variance with this batch in them, which are kept, and the rate of the moving averages."""
        values = x.numel() / x.shape[1]
        if recomputing():  # they are in already
            return self.recent_mean, self.recent_var, self._rate(values / RECENT_VALUES, self.num_batches_tracked)
        batches = self.num_batches_tracked + 1
        rate = self._rate(values / RECENT_VALUES, batches)
        var, mean = torch.var_mean(x.to(self.running_mean.dtype), (0, *range(2, x.dim())), correction=0)
        share = F.share_of_batch(mean, var, self.recent_mean, self.recent_var, rate, self.eps)
        recent = F.take_in(mean, var, self.recent_mean, self.recent_var, share)
        slow = self._rate(x.shape[0] / LONG_IMAGES, batches)
        running = F.take_in(mean, var, self.running_mean, self.running_var, slow)
        buffers = (self.recent_mean, self.recent_var, self.running_mean, self.running_var, self.num_batches_tracked)
        remember(*zip(buffers, (*recent, *running, batches), strict=True))
        return *recent, rate

    def _memory(self) -> GradientMemory:
        return GradientMemory(*(getattr(self, f"gradient_{name}") for name in GradientMemory._fields))

    def _rate(self, size: float, batches: Tensor) -> Tensor:
        """max(α, 1/t): the mean of the first batches, then a moving average."""
        alpha = 1 - (1 - self.momentum) ** size
        return batches.to(self.running_mean.dtype).reciprocal().clamp(min=alpha)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "running_mean" in state_dict:  # what a batch norm's state has not
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(1))
            for name in ("mean", "var"):
                state_dict.setdefault(f"{prefix}recent_{name}", state_dict[f"{prefix}running_{name}"])
            for name, buffer in GradientMemory.empty(self.num_features)._asdict().items():
                state_dict.setdefault(f"{prefix}gradient_{name}", buffer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RunningBatchNorm1d(RunningBatchNorm2d):
    """Running batch norm of (N, C) or (N, C, L); see `RunningBatchNorm2d`."""

    accepted_dims = (2, 3)


class RunningBatchNorm3d(RunningBatchNorm2d):
    """Running batch norm of (N, C, D, H, W); see `RunningBatchNorm2d`."""

    accepted_dims = (5,)

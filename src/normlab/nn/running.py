"""Running batch norm: trains at batch one and two, with the statistics that evaluation will use."""

from typing import Any

import torch
from torch import Tensor

from ..errors import check
from ..kernels.ops import GradientMemory, normalize_with_memory
from . import functional as F
from .base import RunningStatistics, recomputing, remember, settle

# The number of new images of which `momentum` is the weight.
IMAGES = 10


class RunningBatchNorm2d(RunningStatistics):
    """Running batch norm of (N, C, H, W): y = γ (x − μ) / √(σ² + eps) + β, per channel.

    μ and σ² are running statistics, in training and in evaluation alike; in training this batch enters them first. A
    batch of N images, the t-th, with mean m and biased variance v, has the share

        w = max(α, 1/t, d)          α = 1 − (1 − momentum)^(N/10)
        μ' = μ + w(m − μ)           σ²' = (1−w)σ² + w v + w(1−w)(m − μ)²

    so that the statistics are those of the last images, some 100 of them, whatever the batch size. d is above 0 only
    where the weights have moved so fast that the statistics lag behind: with q the mean over channels of
    (v + (m − μ)²) / (σ² + eps), each counted as 16 at most, d = (q/1.5 − 1) / (q − 1) for q > 1.5, which brings the
    mean square of the normalised batch back to 1.5.

    The gradient is batch norm's, with moving averages A and B (rates max(α, 1/t)) in the place of the two means that a
    small batch knows too badly:

        ∂L/∂x = γ/√(σ²'+eps) · (g − A − x̂ B)        A ≈ mean g, B ≈ mean g x̂

    where each image's gradient is first bounded so that one image moves γ and β by `step_bound` of their size at most.
    At a high learning rate they and the layer above would otherwise drive each other without limit. The learning rate
    is measured, by how far γ and β have moved, so that neither it nor the scale of the loss need be known; at a usual
    one the bound is seldom met. With N in the hundreds this is batch norm.

    The arguments are those of `torch.nn.BatchNorm2d`, and so are `weight`, `bias`, `running_mean`, `running_var` and
    `num_batches_tracked`; four buffers `gradient_…` (see `GradientMemory`) come on top. The state of a batch norm loads
    into this layer; its own loads into a batch norm with `strict=False`. Statistics are kept and computed in float32 at
    least. Each forward pass in training mode moves μ and σ², each backward pass A and B: under gradient accumulation
    every part of the batch counts as a batch. A batch with an infinite value or NaN changes none of them.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of 10 new images in the running statistics, above 0, below 1.
        affine: learn γ and β.
        device: of parameters and statistics.
        dtype: of the parameters.
        step_bound: as above; no bound if None, or without γ and β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Source: `studies/flagship`. Averages in the backward pass: Yan et al. 2020, "Towards Stabilizing Batch Statistics in
    Backward Propagation of Batch Normalization".
    """

    gradient_average: Tensor
    gradient_parameters: Tensor
    gradient_push: Tensor
    gradient_pace: Tensor

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        step_bound: float | None = 0.0125,
    ):
        check(0 < momentum < 1, "momentum", momentum, "a number above 0, below 1")
        bounded = step_bound is None or step_bound > 0
        check(bounded, "step_bound", step_bound, "a number above 0, or None for no bound")
        super().__init__(num_features, eps, momentum, affine, device)
        self.step_bound = step_bound
        for name, buffer in GradientMemory.empty(num_features, device)._asdict().items():
            self.register_buffer(f"gradient_{name}", buffer)
        if dtype is not None:
            self.to(dtype)

    def reset_running_stats(self) -> None:
        """Forget every batch: mean 0, variance 1, gradients 0."""
        super().reset_running_stats()
        if "gradient_pace" in self._buffers:  # torch's constructor resets once before they are there
            for buffer in self._memory():
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
        """Mean and variance with this batch in them, which are kept, and the rate of the moving averages."""
        alpha = 1 - (1 - self.momentum) ** (x.shape[0] / IMAGES)
        if recomputing():  # they are in already
            return self.running_mean, self.running_var, self._rate(alpha, self.num_batches_tracked)
        batches = self.num_batches_tracked + 1
        rate = self._rate(alpha, batches)
        mean, var = F.follow_batch(x, self.running_mean, self.running_var, rate, self.eps)
        remember((self.running_mean, mean), (self.running_var, var), (self.num_batches_tracked, batches))
        return mean, var, rate

    def _memory(self) -> GradientMemory:
        return GradientMemory(self.gradient_average, self.gradient_parameters, self.gradient_push, self.gradient_pace)

    def _rate(self, alpha: float, batches: Tensor) -> Tensor:
        """max(α, 1/t): the mean of the first batches, then a moving average."""
        return batches.to(self.running_mean.dtype).reciprocal().clamp(min=alpha)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "running_mean" in state_dict:  # what a batch norm's state has not
            state_dict.setdefault(prefix + "num_batches_tracked", torch.tensor(1))
            for name, buffer in GradientMemory.empty(self.num_features)._asdict().items():
                state_dict.setdefault(f"{prefix}gradient_{name}", buffer)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class RunningBatchNorm1d(RunningBatchNorm2d):
    """Running batch norm of (N, C) or (N, C, L); see `RunningBatchNorm2d`."""

    accepted_dims = (2, 3)


class RunningBatchNorm3d(RunningBatchNorm2d):
    """Running batch norm of (N, C, D, H, W); see `RunningBatchNorm2d`."""

    accepted_dims = (5,)

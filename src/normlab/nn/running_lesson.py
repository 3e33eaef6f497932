"""The lesson's running batch norm: running statistics in training too, the gradient through this batch's share."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.plain import normalize_with_share
from . import functional as F
from .base import RunningStatistics, is_fresh, settle
from .registry import register

# The lesson's guard of the first steps: until so many images were seen, no variance counts as less than MIN_VAR.
FEW_SAMPLES = 20
MIN_VAR = 0.01

# The count of statistics that come from elsewhere: the next batch is to enter them with the share α.
SETTLED = -1.0


class LessonRunningNorm2d(RunningStatistics):
    """The lesson's running batch norm of (N, C, H, W): y = γ (x − μ) / √(σ² + eps) + β, per channel.

    μ and σ² are running statistics, in training and in evaluation alike; in training this batch enters them first.
    A batch of `bs` images with n values a channel, mean m and biased variance v has the weight α(bs) and the share w:

        α = 1 − (1 − momentum) / √max(bs − 1, 1)
        C' = (1−α)C + αn            w = αn / C'
        μ' = μ + w(m − μ)           σ²' = (1−w)σ² + w v + w(1−w)(m − μ)²

    The gradient flows through the batch's share, the earlier part is a constant:

        ∂L/∂xᵢ = γ/√(σ²'+eps) · [gᵢ − (w/n)(Σg + x̂ᵢ Σ g x̂)]

    While fewer than 20 images were seen σ² counts as 0.01 at least. A batch of one value a channel is as good as any
    other. Statistics are kept and computed in float32 at least, also when the module is cast to half precision.

    The arguments are those of `torch.nn.BatchNorm2d`, and so are `weight`, `bias`, `running_mean`, `running_var` and
    `num_batches_tracked`; `count` (C above) and `num_samples_tracked` (images seen) come on top. The state of a
    batch norm loads into this layer; its own loads into a batch norm with `strict=False`.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: weight of a new batch of one or two images, above 0, to 1.
        affine: learn γ and β.
        track_running_stats: True; see `RunningStatistics`.
        device: of parameters and statistics.
        dtype: of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Source: fastai course v3 part 2, lesson 10; here in the form that neither cancels nor overflows.
    """

    momentum: float
    count: Tensor
    num_samples_tracked: Tensor

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
    ):
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, bias=bias)
        self.register_buffer("count", torch.zeros((), device=device))
        self.register_buffer("num_samples_tracked", torch.zeros((), dtype=torch.long, device=device))
        if dtype is not None:
            self.to(dtype)

    def reset_running_stats(self) -> None:
        """Forget every batch: mean 0, variance 1, counts 0."""
        super().reset_running_stats()
        if "count" in self._buffers:  # torch's constructor resets once before it is there
            self.count.zero_()
            self.num_samples_tracked.zero_()

    def _normalize(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self._check_input_dim(x)
        if not self.training or x.numel() == 0:  # an empty batch has nothing to add
            return F.normalize_running(x, self._state(), self.weight, self.bias, self.eps, self._min_var())
        with torch.no_grad():
            state, share, images = self._updated(x, mask)
            var = state.var.maximum(self._min_var(images))
            var_share = share * (var == state.var)  # a variance held at its minimum is a constant
            mean, var, share, var_share = settle(state.mean, var, share, var_share)
        return normalize_with_share(x, mean, var, self.weight, self.bias, share, var_share, self.eps, mask)

    def _scripted(self, input: Tensor) -> Tensor:
        if self.training:
            raise RuntimeError("This norm is scripted for evaluation: call eval() before.")
        mean, var = self.running_mean, self.running_var
        if int(self.num_samples_tracked) < 20:
            var = var.clamp(min=0.01)
        return torch.nn.functional.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _updated(self, x: Tensor, mask: Tensor | None) -> tuple[F.RunningState, Tensor, Tensor]:
        """The statistics with this batch in them, which are kept, its share, and the images seen."""
        alpha = F.lesson_alpha(x.shape[0], self.momentum)
        values: Any = x.numel() // x.shape[1] if mask is None else mask.sum()
        if self._kept_already():
            return self._state(), alpha * values / self.count, self.num_samples_tracked
        count = torch.where(self.count < 0, 1.0 * values, self.count)
        before = F.RunningState(self.running_mean, self.running_var, count)
        state, share = F.update_running(x, before, alpha, mask)
        counts = 1 if mask is None else (values > 0).long()
        images = self.num_samples_tracked + counts * x.shape[0]
        self._keep(
            (self.running_mean, state.mean),
            (self.running_var, state.var),
            (self.count, state.total if mask is None else torch.where(values > 0, state.total, self.count)),
            (self.num_batches_tracked, self.num_batches_tracked + counts),
            (self.num_samples_tracked, images),
        )
        return state, share, images

    def _min_var(self, images: Tensor | None = None) -> Tensor:
        images = self.num_samples_tracked if images is None else images
        return (images < FEW_SAMPLES).to(self.running_var.dtype) * MIN_VAR

    def _state(self) -> F.RunningState:
        return F.RunningState(self.running_mean, self.running_var, self.count)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if prefix + "running_mean" in state_dict and prefix + "count" not in state_dict:  # a batch norm's state
            fresh = is_fresh(state_dict, prefix)
            state_dict[prefix + "count"] = torch.tensor(0.0 if fresh else SETTLED)
            state_dict[prefix + "num_samples_tracked"] = torch.tensor(0 if fresh else FEW_SAMPLES)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class LessonRunningNorm1d(LessonRunningNorm2d):
    """The lesson's running batch norm of (N, C) or (N, C, L); see `LessonRunningNorm2d`."""

    accepted_dims = (2, 3)


class LessonRunningNorm3d(LessonRunningNorm2d):
    """The lesson's running batch norm of (N, C, D, H, W); see `LessonRunningNorm2d`."""

    accepted_dims = (5,)


register(
    "running_lesson",
    LessonRunningNorm1d,
    LessonRunningNorm2d,
    LessonRunningNorm3d,
    summary="the lesson's running batch norm: gradient through this batch's share",
    over="the last batches",
    about="the same idea by the lesson's rule",
    source="fastai 2019, part 2, lesson 10",
    cost=3.0,
)

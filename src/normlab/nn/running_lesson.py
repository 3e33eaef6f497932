"""The lesson's running batch norm: running statistics in training too, the gradient through this batch's share."""

from typing import Any

import torch
from torch import Tensor

from ..kernels.plain import normalize_with_share
from . import functional as F
from .base import RunningStatistics, settle
from .registry import register

# The lesson's guard of the first steps: until FEW_SAMPLES images were seen, a variance counts as MIN_VAR at least.
FEW_SAMPLES = 20
MIN_VAR = 0.01

# The count of statistics that come from elsewhere: the next batch is to enter them with the share α.
SETTLED = -1.0


class LessonRunningNorm(RunningStatistics):
    """The lesson's running batch norm of (N, C, *space); see `LessonRunningNorm2d`."""

    momentum: float
    count: Tensor
    num_samples_tracked: Tensor

    def first_state(self) -> dict[str, Tensor]:
        return {"count": torch.zeros(()), "num_samples_tracked": torch.zeros((), dtype=torch.long)}

    def settled_state(self) -> dict[str, Tensor]:
        return {"count": torch.tensor(SETTLED), "num_samples_tracked": torch.tensor(FEW_SAMPLES)}

    def in_evaluation(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return F.normalize_running(x, self._state(), self.weight, self.bias, self.eps, self._min_var())

    def in_training(self, x: Tensor, mask: Tensor | None) -> Tensor:
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


class LessonRunningNorm1d(LessonRunningNorm):
    """The lesson's running batch norm of (N, C) or (N, C, L); see `LessonRunningNorm2d`.

    Example:
        >>> LessonRunningNorm1d(4)(torch.randn(2, 4, 5)).shape
        torch.Size([2, 4, 5])
    """

    accepted_dims = (2, 3)


class LessonRunningNorm2d(LessonRunningNorm):
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
        device: the device of parameters and statistics.
        dtype: the type of the parameters.
        bias: learn β.

    Raises:
        InputError: an argument or the shape of an input is out of range.

    Example:
        >>> norm = LessonRunningNorm2d(4)
        >>> norm(torch.randn(2, 4, 5, 5)).shape, int(norm.num_samples_tracked)
        (torch.Size([2, 4, 5, 5]), 2)

    Source: fastai course v3 part 2, lesson 10; here in the form that neither cancels nor overflows.
    """

    accepted_dims = (4,)


class LessonRunningNorm3d(LessonRunningNorm):
    """The lesson's running batch norm of (N, C, D, H, W); see `LessonRunningNorm2d`.

    Example:
        >>> LessonRunningNorm3d(4)(torch.randn(2, 4, 3, 5, 5)).shape
        torch.Size([2, 4, 3, 5, 5])
    """

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

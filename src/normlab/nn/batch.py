"""Batch norm, as torch has it, with a defined result where torch refuses: a batch of one value a channel."""

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from . import functional as F


class _SingleValue(_BatchNorm):
    """A torch batch norm that also trains on a batch of one value a channel."""

    def forward(self, x: Tensor) -> Tensor:
        # torch raises here, because the unbiased running variance would be 0/0.
        of_batch = self.training or self.running_mean is None
        if of_batch and x.dim() >= 2 and x.numel() == x.shape[1] == self.num_features:
            self._check_input_dim(x)
            self._track_mean(x)
            return F.batch_norm(x, self.weight, self.bias, self.eps)
        return super().forward(x)

    def _track_mean(self, x: Tensor) -> None:
        if self.running_mean is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(x.detach().flatten().to(self.running_mean.dtype), share)


class BatchNorm2d(_SingleValue, nn.BatchNorm2d):
    """Batch norm of (N, C, H, W): y = γ (x − μ) / √(σ² + eps) + β, per channel.

    In training μ and σ² are the mean and the biased variance over batch and space, and the gradient flows through
    them; the running statistics move by `momentum` towards μ and the unbiased variance. In evaluation μ and σ² are
    the running statistics. It is `torch.nn.BatchNorm2d`, arguments, state and all, but for one case: a batch of one
    value a channel (one image, 1×1 map) gives y = β and moves the running mean, while the running variance, of which
    one value says nothing, stays.

    Source: Ioffe and Szegedy 2015, "Batch Normalization".
    """


class BatchNorm1d(_SingleValue, nn.BatchNorm1d):
    """Batch norm of (N, C) or (N, C, L); see `BatchNorm2d`."""


class BatchNorm3d(_SingleValue, nn.BatchNorm3d):
    """Batch norm of (N, C, D, H, W); see `BatchNorm2d`."""

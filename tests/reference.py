"""The formulas of the norms, each written out once, in the float64 of their inputs, and of no code of the package."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of the channels, shaped to go along dimension 1 of x."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def per_image(values: list[float], x: Tensor) -> Tensor:
    """Values of the images, shaped to go along dimension 0 of x."""
    return torch.tensor(values, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))


def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean squared distance from it, per channel over images and space."""
    channels = x.transpose(0, 1).flatten(1)
    mean = channels.sum(1) / channels.shape[1]
    return mean, ((channels - mean[:, None]) ** 2).sum(1) / channels.shape[1]


def scale(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ x̂ + β, γ being 1 and β 0 where they are None."""
    y = x_hat if weight is None else x_hat * per_channel(weight, x_hat)
    return y if bias is None else y + per_channel(bias, x_hat)


def normalize(x, mean, var, weight, bias, eps) -> Tensor:
    """γ (x − μ) / √(σ² + eps) + β with these statistics of the channels."""
    return scale((x - per_channel(mean, x)) / per_channel((var + eps).sqrt(), x), weight, bias)


def batch_norm(x, weight, bias, eps) -> Tensor:
    """Normalised by mean and variance of each channel over images and space."""
    return normalize(x, *channel_moments(x), weight, bias, eps)


def group_norm(x, weight, bias, groups, eps) -> Tensor:
    """Normalised image by image and group by group of the channels."""
    images = []
    for image in x:
        parts = []
        for part in image.chunk(groups):
            mean = part.sum() / part.numel()
            var = ((part - mean) ** 2).sum() / part.numel()
            parts.append((part - mean) / (var + eps).sqrt())
        images.append(torch.cat(parts))
    return scale(torch.stack(images), weight, bias)


def channel_layer_norm(x, weight, bias, eps) -> Tensor:
    """Normalised position by position over the channels."""
    positions = []
    for values in x.movedim(1, -1).flatten(0, -2):
        distance = values - values.sum() / len(values)
        positions.append(distance / ((distance**2).sum() / len(values) + eps).sqrt())
    return scale(_from_positions(positions, x), weight, bias)


def rms_norm(x, weight, eps) -> Tensor:
    """Divided position by position by the root mean square of the channels."""
    positions = [values / ((values**2).sum() / len(values) + eps).sqrt() for values in x.movedim(1, -1).flatten(0, -2)]
    return scale(_from_positions(positions, x), weight, None)


def normalize_with_share(x, grad, mean, var, weight, bias, mean_share, var_share, eps) -> list[Tensor | None]:
    """Y and the gradients of x, γ and β, where these shares of mean and variance are the batch's own.

    ∂L/∂x = γ/√(σ²+eps) · [g − (share of μ · Σg + x̂ · share of σ² · Σ g x̂) / n]
    """
    dims, n = [0, *range(2, x.dim())], x.numel() / x.shape[1]
    deviation = per_channel((var + eps).sqrt(), x)
    x_hat = (x - per_channel(mean, x)) / deviation
    sum_grad, sum_grad_x_hat = grad.sum(dims), (grad * x_hat).sum(dims)
    pulled = per_channel(mean_share * sum_grad, x) + x_hat * per_channel(var_share * sum_grad_x_hat, x)
    return [
        scale(x_hat, weight, bias),
        scale((grad - pulled / n) / deviation, weight, None),
        None if weight is None else sum_grad_x_hat,
        None if bias is None else sum_grad,
    ]


class Sums(NamedTuple):
    """The lesson's running statistics: per channel the sum and the sum of squares, and the count of values."""

    s: Tensor
    q: Tensor
    c: Tensor

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, total: Tensor) -> "Sums":
        mean, var, total = mean.double(), var.double(), total.double()
        return cls(mean * total, (var + mean**2) * total, total)

    @classmethod
    def empty(cls, channels: int) -> "Sums":
        return cls.of(torch.zeros(channels), torch.ones(channels), torch.tensor(0.0))

    def after(self, x: Tensor, alpha: float) -> "Sums":
        """Each interpolated with that of a batch."""
        channels = x.transpose(0, 1).flatten(1)
        batch = channels.sum(1), (channels**2).sum(1), torch.tensor(channels.shape[1]).double()
        return Sums(*((1 - alpha) * before + alpha * new for before, new in zip(self, batch, strict=True)))

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance: S/C and Q/C − (S/C)²."""
        mean = self.s / self.c
        return mean, self.q / self.c - mean**2


class LessonRunningBatchNorm:
    """The lesson's running batch norm, from empty sums; those before a batch are constants to its gradient."""

    def __init__(self, channels: int, momentum: float, eps: float):
        self.sums, self.seen = Sums.empty(channels), 0
        self.momentum, self.eps = momentum, eps

    def __call__(self, training: bool, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        sums = self.sums
        if training:
            sums = sums.after(x, 1 - (1 - self.momentum) / math.sqrt(max(len(x) - 1, 1)))
            self.sums = Sums(*(part.detach() for part in sums))
            self.seen += len(x)
        mean, var = sums.moments()
        if self.seen < 20:
            var = var.clamp(min=0.01)
        return normalize(x, mean, var, weight, bias, self.eps)


def _from_positions(positions: list[Tensor], x: Tensor) -> Tensor:
    """Put back where `x.movedim(1, -1).flatten(0, -2)` took them from."""
    return torch.stack(positions).unflatten(0, (x.shape[0], *x.shape[2:])).movedim(-1, 1)

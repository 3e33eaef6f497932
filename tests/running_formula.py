"""The rule of running batch norm, written out for float64 from its docstrings, apart from the package."""

import math

import torch
from torch import Tensor

import reference


def cosine(a: Tensor, b: Tensor) -> float:
    lengths = a.norm().item() * b.norm().item()
    return (a @ b).item() / lengths if lengths else 0.0


class Formula:
    """The rule as the docstrings have it, written out for float64, with plain numbers where there is one."""

    def __init__(self, channels: int, momentum: float, eps: float, bound: float | None):
        self.running = (torch.zeros(channels).double(), torch.ones(channels).double())
        self.t, self.share, self.gradient_share, self.length = 0, 1.0, 1.0, 0.0
        self.innovation = torch.zeros(channels).double()
        self.average = self.latest = torch.zeros(2, channels).double()
        self.latest_rate, self.step_length = 0.0, 0.0
        self.momentum, self.eps, self.bound = momentum, eps, bound
        self.before: Tensor | None = None
        self.parameters_gradient = torch.zeros(2 * channels).double()
        self.rates: list[float] = []
        self.lr = 1.0

    def step(self, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Output, and the gradients of x, γ and β."""
        self.t += 1
        n = x.numel() / x.shape[1]
        moments = reference.channel_moments(x)
        self.adapt(len(x), moments[0], weight)
        rate = max(self.gradient_share, self.share, 1 / self.t)
        self.running = self.mixed(*self.running, *moments, self.share)
        x_hat = reference.normalize(x, *self.running, None, None, self.eps)
        y, now = reference.scale(x_hat, weight, bias), torch.cat([weight, bias])
        self.measure(now)
        squares = y.flatten(2).mean(2).square().sum(1).mean().item() if x.dim() > 2 else y.square().sum(1).mean().item()
        self.length += rate * (squares - self.length)
        factors = self.factors(grad, now)
        grad = grad * reference.per_image(factors, x)
        dims = [0, *range(2, x.dim())]
        sums = torch.stack([(grad * x_hat).sum(dims), grad.sum(dims)])
        self.average = (1 - self.latest_rate) * self.average + self.latest_rate * self.latest
        self.latest, self.latest_rate = sums / n, rate
        own = self.latest[0] / (rate * x_hat.square().mean(dims)).clamp(min=1)
        b, a = (1 - rate) * self.average + rate * torch.stack([own, self.latest[1]])
        pulled = grad - reference.per_channel(a, x) - x_hat * reference.per_channel(b, x)
        grad_x = pulled * reference.per_channel(weight / (self.running[1] + self.eps).sqrt(), x)
        k = 0.0
        if self.bound is not None and self.lr * self.length > len(x):
            met = sum(factor < 1 for factor in factors) / len(factors)
            k = met / (10 * self.lr) * (1 - len(x) / (self.lr * self.length))
        share = min(1, math.sqrt(len(x) / 64))
        grad_weight, grad_bias = share * sums[0] + k * weight, share * sums[1] + k * bias
        self.parameters_gradient = self.parameters_gradient + torch.cat([grad_weight, grad_bias])
        return [y, grad_x, grad_weight, grad_bias]

    def adapt(self, images: int, m: Tensor, weight: Tensor) -> None:
        """The shares of the batch, by what the distance of its mean from the running one has to do with others."""
        innovation = (m - self.running[0]) / (self.running[1] + self.eps).sqrt()
        drift = (self.average[1] - self.latest[1]) * weight / (self.running[1] + self.eps)
        gain = max(self.momentum, 1 / self.t)
        self.share *= math.exp(gain * cosine(innovation, self.innovation))
        self.share = min(max(self.share, self.momentum / 100), 1.0)
        self.gradient_share *= math.exp(gain * (cosine(innovation, drift) - 0.2 / images))
        self.gradient_share = min(max(self.gradient_share, self.momentum / 10), 1.0)
        self.innovation = innovation

    def mixed(self, mean: Tensor, var: Tensor, m: Tensor, v: Tensor, share: float) -> tuple[Tensor, Tensor]:
        distance = m - mean
        return mean + share * distance, (1 - share) * var + share * v + share * (1 - share) * distance**2

    def measure(self, now: Tensor) -> None:
        """The learning rate, if γ and β have moved, and what the length of this step says of the last batch."""
        if self.before is not None and not torch.equal(now, self.before):
            moved = now - self.before
            length = moved.norm().item() / self.parameters_gradient.norm().item()
            if moved @ self.parameters_gradient < -0.99 * moved.norm() * self.parameters_gradient.norm():
                self.rates.append(length)
                self.lr = math.prod(self.rates) ** (1 / len(self.rates))
                r = self.latest_rate
                self.step_length = (1 - r) * self.step_length + r * length if self.step_length else length
                self.latest_rate *= length / self.step_length
            else:
                self.rates, self.lr = [], math.exp(-80)
            self.parameters_gradient = torch.zeros_like(self.parameters_gradient)
        self.before = now.clone()

    def factors(self, grad: Tensor, now: Tensor) -> list[float]:
        """What the gradient of each image is multiplied by."""
        if self.bound is None:
            return [1.0] * len(grad)
        size = max(now.norm().item(), math.sqrt(len(now) / 2))
        return [min(1.0, self.bound * size / (self.lr * g.norm().item())) for g in grad]

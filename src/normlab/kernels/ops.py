"""Operators whose gradient is written out, so that a training step costs less than through autograd."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of the sums that the learning rate is measured by, so much is kept at each step.
PACE_KEPT = 0.9


class GradientMemory(NamedTuple):
    """What `normalize_with_memory` keeps of the backward passes so far.

    Attributes:
        average: moving averages of g x̂ and of g, (2, C).
        parameters: γ and β at the last backward pass, (2, C).
        push: their gradient, summed over the backward passes since they last moved, (2, C).
        pace: how far they moved and how far they were pushed, sums over the last steps, (2,).
    """

    average: Tensor
    parameters: Tensor
    push: Tensor
    pace: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> "GradientMemory":
        """That of no backward pass."""
        zeros = partial(torch.zeros, device=device)
        return cls(zeros(2, channels), zeros(2, channels), zeros(2, channels), zeros(2))


def normalize_with_share(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_share: Tensor,
    var_share: Tensor,
    eps: float,
) -> Tensor:
    """γ (x − mean) / √(var + eps) + β, where this batch's share of `mean` and `var` carries the gradient.

        ∂L/∂xᵢ = γ/√(var+eps) · [gᵢ − (1/n)(mean_share Σg + var_share x̂ᵢ Σ g x̂)]

    Shares of 1 are batch norm, of 0 a frozen norm, those between running batch norm.

    Args:
        x: (N, C, *space).
        mean: (C,), as computed from `x` with the share `mean_share`.
        var: (C,), likewise, with `var_share`.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        mean_share: between 0 and 1, 0-d or (C,).
        var_share: likewise.
        eps: added to the variance.
    """
    return _NormalizeWithShare.apply(x, mean, var, weight, bias, mean_share, var_share, eps)


class _NormalizeWithShare(torch.autograd.Function):
    @staticmethod
    def forward(x, mean, var, weight, bias, mean_share, var_share, eps):  # types: normalize_with_share
        return _scale_and_shift(x, mean, (var + eps).rsqrt_(), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, mean, var, weight, _, mean_share, var_share, ctx.eps = inputs
        ctx.save_for_backward(x, mean, var, weight, mean_share, var_share)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, var, weight, mean_share, var_share = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt_()
        along = (-1, *[1] * (x.dim() - 2))
        dims = (0, *range(2, x.dim()))
        grad = grads[0].to(mean.dtype)
        x_hat = (x - mean.view(along)).mul_(inverse.view(along))
        sum_grad = grad.sum(dims)
        sum_grad_x_hat = (grad * x_hat).sum(dims)
        scale = inverse if weight is None else inverse * weight
        # scale·grad − (scale/n)(mean_share Σg + x̂ var_share Σ g x̂), in place from x̂ on
        part = scale * (x.shape[1] / x.numel())
        grad_x = x_hat.mul_((part * var_share).mul_(sum_grad_x_hat).view(along))
        grad_x.add_((part * mean_share).mul_(sum_grad).view(along)).neg_().addcmul_(grad, scale.view(along))
        grad_weight = sum_grad_x_hat if ctx.needs_input_grad[3] else None
        grad_bias = sum_grad if ctx.needs_input_grad[4] else None
        return grad_x.to(x.dtype), None, None, grad_weight, grad_bias, None, None, None


def normalize_with_memory(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rate: Tensor,
    memory: GradientMemory,
    step_bound: float | None,
    eps: float,
) -> Tensor:
    """γ (x − mean) / √(var + eps) + β, whose backward pass remembers the batches before.

    With n values a channel and x̂ the normalised input, the backward pass is

        A ← A + rate (Σg/n − A)         B ← B + rate (Σ g x̂/n − B)
        ∂L/∂x = γ/√(var+eps) · (g − A − x̂ B)        ∂L/∂γ = Σ g x̂        ∂L/∂β = Σ g

    where a rate of 1 is batch norm. Before, the gradient g of each image is bounded: it is multiplied by
    min(1, step_bound · s / (η ‖g of the image‖)), with s = max(√C, ‖(γ, β)‖), and η the learning rate, which is
    measured: by how much γ and β have moved over how far their gradient pushed them, summed over the last steps. So no
    image moves γ and β by more than about `step_bound` of their size, whatever the learning rate and the scale of the
    loss are; what flows on to the layers below is bounded with it.

    Args:
        x: (N, C, *space).
        mean: (C,), a constant.
        var: (C,), a constant.
        weight: γ, (C,) or None for 1; without γ or β nothing is bounded.
        bias: β, (C,) or None for 0.
        rate: of the moving averages, 0-d, between 0 and 1.
        memory: changed in place by each backward pass, but not by a gradient that is infinite or NaN.
        step_bound: a share of the size of (γ, β), or None for no bound.
        eps: added to the variance.
    """
    return _NormalizeWithMemory.apply(x, mean, var, weight, bias, rate, *memory, step_bound, eps)


class _NormalizeWithMemory(torch.autograd.Function):
    @staticmethod
    def forward(x, mean, var, weight, bias, rate, average, parameters, push, pace, step_bound, eps):
        return _scale_and_shift(x, mean, (var + eps).rsqrt_(), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, mean, var, weight, bias, rate, *memory, ctx.step_bound, ctx.eps = inputs
        ctx.save_for_backward(x, mean, var, weight, bias, rate)
        # Not saved: it may change before this backward pass, by that of another batch.
        ctx.memory = GradientMemory(*memory)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, var, weight, bias, rate = ctx.saved_tensors
        memory: GradientMemory = ctx.memory
        along = (-1, *[1] * (x.dim() - 2))
        dims = (0, *range(2, x.dim()))
        inverse = (var + ctx.eps).rsqrt()
        grad = grads[0].to(mean.dtype)
        bound, parameters = None, memory.parameters
        if weight is not None and bias is not None:
            bound, parameters = ctx.step_bound, torch.stack([weight, bias]).to(mean.dtype)
        moved = (parameters - memory.parameters).norm()
        step = torch.stack([moved, memory.push.norm()])
        pace = torch.where((step > 0).all(), PACE_KEPT * memory.pace + step, memory.pace)
        if bound is not None:
            size = parameters.norm().clamp(min=x.shape[1] ** 0.5)
            norms = grad.flatten(1).norm(dim=1)
            excess = norms * pace[0] / (pace[1].clamp(min=torch.finfo(pace.dtype).tiny) * size * bound)
            grad = grad / excess.clamp(min=1).view(-1, *[1] * (x.dim() - 1))
        x_hat = (x - mean.view(along)).mul_(inverse.view(along))
        sums = torch.stack([(grad * x_hat).sum(dims), grad.sum(dims)])
        average = torch.lerp(memory.average, sums * (x.shape[1] / x.numel()), rate)
        finite = sums.isfinite().all()
        push = torch.where(moved > 0, sums, memory.push + sums)
        for kept, new in zip(memory, (average, parameters, push, pace), strict=True):
            kept.copy_(torch.where(finite, new, kept))
        scale = inverse if weight is None else inverse * weight
        grad_x = x_hat.mul_((scale * average[0]).view(along)).add_((scale * average[1]).view(along)).neg_()
        grad_x.addcmul_(grad, scale.view(along))
        grad_weight = sums[0] if ctx.needs_input_grad[3] else None
        grad_bias = sums[1] if ctx.needs_input_grad[4] else None
        return grad_x.to(x.dtype), None, None, grad_weight, grad_bias, *[None] * 7


def _scale_and_shift(x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    along = (-1, *[1] * (x.dim() - 2))
    scale = inverse if weight is None else inverse * weight
    y = (x - mean.view(along)).mul_(scale.view(along))
    if bias is not None:
        y.add_(bias.view(along))
    return y.to(x.dtype)

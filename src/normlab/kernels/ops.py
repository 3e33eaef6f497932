"""Operators whose gradient is written out, so that a training step costs less than through autograd."""

from typing import Any

import torch
from torch import Tensor


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
    def forward(ctx: Any, x, mean, var, weight, bias, mean_share, var_share, eps):  # types: normalize_with_share
        inverse = (var + eps).rsqrt_()
        ctx.save_for_backward(x, mean, inverse, weight, mean_share, var_share)
        along = (-1, *[1] * (x.dim() - 2))
        scale = inverse if weight is None else inverse * weight
        y = (x - mean.view(along)).mul_(scale.view(along))
        if bias is not None:
            y.add_(bias.view(along))
        return y.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, inverse, weight, mean_share, var_share = ctx.saved_tensors
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

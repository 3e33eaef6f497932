"""Norms and parts of them in torch's operators, with the gradient written out where that is quicker than autograd's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_traced = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]


def activate(y: Tensor, slope: float) -> Tensor:
    """`y` where it is above 0, else slope·y: ReLU with a slope of 0, `y` itself with 1."""
    if slope == 0:
        return torch.relu(y)
    return y if slope == 1 else torch.nn.functional.leaky_relu(y, slope)


def group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group norm of (N, C, *space) by torch's operator, right for every layout, groups of one value too.

    With the channels last in memory torch's operator on a CPU computes the variance as E[x²] − E[x]², which loses the
    square of mean over deviation, and its backward pass ends the process where `x` wants no gradient. It takes images
    without height and width for contiguous: so they get none.
    """
    # Not torch.nn.functional.group_norm, which refuses groups of one value.
    if x.dim() not in CHANNELS_LAST or (not x.is_cpu and not torch.compiler.is_compiling()) or _is_plain(x):
        return torch.group_norm(x, num_groups, weight, bias, eps)
    y = torch.group_norm(x.flatten(2), num_groups, weight, bias, eps).unflatten(2, x.shape[2:])
    return _laid_like(x, y)


def _is_plain(x: Tensor) -> bool:
    """Whether torch too takes an image for contiguous: where a size is 1 its strides may say anything."""
    return _knows_layout() and x.is_contiguous() and 1 not in x.shape


def _laid_like(x: Tensor, y: Tensor) -> Tensor:
    """`y`, contiguous, with the channels last in memory if those of `x` are."""
    if not _knows_layout() or x.is_contiguous():
        return y
    layout = CHANNELS_LAST[x.dim()]
    return y.contiguous(memory_format=layout) if x.is_contiguous(memory_format=layout) else y


def _knows_layout() -> bool:
    """Whether a tensor lies in memory as it will: an operation that is exported or batched is for others too."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return _traced() is None and _transforms() is None


def normalize_with_share(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean_share: Tensor,
    var_share: Tensor,
    eps: float,
    mask: Tensor | None = None,
) -> Tensor:
    """γ (x − mean) / √(var + eps) + β, where this batch's share of `mean` and `var` carries the gradient.

        ∂L/∂xᵢ = γ/√(var+eps) · [gᵢ − (1/n)(mean_share Σg + var_share x̂ᵢ Σ g x̂)]

    Shares of 1 are batch norm, of 0 a frozen norm, those between running batch norm.

    Args:
        x: (N, C, *space).
        mean: (C,), as computed from `x` with the share `mean_share`.
        var: (C,), in which `x` has the share `var_share`.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        mean_share: between 0 and 1, 0-d or (C,).
        var_share: between 0 and 1, 0-d or (C,).
        eps: added to the variance.
        mask: (N, 1, *space), True where a value is in `mean` and `var`; None for all.
    """
    return _NormalizeWithShare.apply(x, mean, var, weight, bias, mean_share, var_share, eps, mask)


class _NormalizeWithShare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, mean, var, weight, bias, mean_share, var_share, eps, mask):  # types: normalize_with_share
        return scale_and_shift(x, mean, (var + eps).rsqrt_(), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, mean, var, weight, _, mean_share, var_share, ctx.eps, mask = inputs
        ctx.save_for_backward(x, mean, var, weight, mean_share, var_share, mask)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, var, weight, mean_share, var_share, mask = ctx.saved_tensors
        inverse = (var + ctx.eps).rsqrt_()
        along = (-1, *[1] * (x.dim() - 2))
        dims = (0, *range(2, x.dim()))
        grad = grads[0].to(mean.dtype)
        x_hat = (x - mean.view(along)).mul_(inverse.view(along))
        sums = all_sums = torch.stack([grad.sum(dims), (grad * x_hat).sum(dims)])
        if mask is not None:
            part = counted(grad, mask)
            sums = torch.stack([part.sum(dims), (part * x_hat).sum(dims)])
        scale = inverse if weight is None else inverse * weight
        # scale·grad − (scale/n)(mean_share Σg + x̂ var_share Σ g x̂), in place from x̂ on
        part = scale * one_of(x, mask)
        grad_x = x_hat.mul_((part * var_share).mul_(sums[1]).view(along))
        grad_x = counted(grad_x.add_((part * mean_share).mul_(sums[0]).view(along)), mask).neg_()
        grad_x.addcmul_(grad, scale.view(along))
        grad_weight = all_sums[1] if ctx.needs_input_grad[3] else None
        grad_bias = all_sums[0] if ctx.needs_input_grad[4] else None
        return grad_x.to(x.dtype), None, None, grad_weight, grad_bias, None, None, None, None


def counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values` where the mask is True, else 0."""
    return values if mask is None else torch.where(mask, values, 0)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """Values of (C,) that broadcast against `x`, (N, C, *space)."""
    return values.view(-1, *[1] * (x.dim() - 2))


def one_of(x: Tensor, mask: Tensor | None) -> float | Tensor:
    """One over the number of values of a channel."""
    return x.shape[1] / x.numel() if mask is None else 1 / mask.sum().clamp(min=1)


def write(kept: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write `values` into tensors from within a backward pass, that of a transform of `torch.func` too."""
    if torch.compiler.is_compiling() or _transforms() is None or any(map(_is_wrapped, kept)):
        for part, value in zip(kept, values, strict=True):
            part.unsqueeze(0).copy_(value)  # see `normlab.nn.base.remember`
    else:  # these were there before the transform, which refuses to copy_ into them
        torch._foreach_copy_(list(kept), list(values))  # pyright: ignore[reportPrivateImportUsage]


def scale_and_shift(x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """γ (x − mean) · inverse + β, per channel of (N, C, *space), in the type of `x`; 1 and 0 where γ and β are None."""
    along = (-1, *[1] * (x.dim() - 2))
    scale = inverse if weight is None else inverse * weight
    y = (x - mean.view(along)).mul_(scale.view(along))
    if bias is not None:
        y.add_(bias.view(along))
    return y.to(x.dtype)

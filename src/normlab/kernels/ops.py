"""Operators whose gradient is written out, so that a training step costs less than through autograd."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_traced = torch._C._get_tracing_state
_transforms = torch._C._functorch.peek_interpreter_stack  # pyright: ignore[reportAttributeAccessIssue]
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]

# The learning rate is the geometric mean of what this many steps, about, show it to be.
STEPS_REMEMBERED = 100
# With N images γ and β learn at √(N/64) of the learning rate, at most 1: their gradient is a sum over all positions,
# and noisy, but in this way no noisier at two images than at 64.
STEADY_IMAGES = 64
# The least cosine between a step and its gradient at which the step is taken to be along it.
ALONG = 0.99
# How much of γ and β is taken away in a step in which every image meets the bound.
PULL = 0.1


def activate(y: Tensor, slope: float) -> Tensor:
    """`y` where it is above 0, else slope·y: ReLU with a slope of 0, `y` itself with 1."""
    if slope == 0:
        return torch.relu(y)
    return y if slope == 1 else torch.nn.functional.leaky_relu(y, slope)


def parameter_share(images: int) -> float:
    """The share of the learning rate at which γ and β learn from so many images."""
    return min(1, (images / STEADY_IMAGES) ** 0.5)


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


class GradientMemory(NamedTuple):
    """What `normalize_with_memory` keeps of the backward passes so far.

    Attributes:
        average: moving averages of g x̂ and of g, (2, C), without the last batch.
        latest: the means of g x̂ and of g over the last batch, (2, C).
        parameters: γ and β at the last backward pass, (2, C).
        push: the gradient they were given, summed over the backward passes since they last moved, (2, C).
        measured: the learning rate's logarithm; the steps it is known from; the moving averages of the squared length
            of an image's output and of the length of a step over its gradient's; the last batch's rate, (5,).
    """

    average: Tensor
    latest: Tensor
    parameters: Tensor
    push: Tensor
    measured: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> "GradientMemory":
        """That of no backward pass."""
        zeros = partial(torch.zeros, 2, channels, device=device)
        return cls(zeros(), zeros(), zeros(), zeros(), torch.zeros(5, device=device))


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
        var: (C,), likewise, with `var_share`.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        mean_share: between 0 and 1, 0-d or (C,).
        var_share: likewise.
        eps: added to the variance.
        mask: (N, 1, *space), True where a value is in `mean` and `var`; None for all.
    """
    return _NormalizeWithShare.apply(x, mean, var, weight, bias, mean_share, var_share, eps, mask)


class _NormalizeWithShare(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, mean, var, weight, bias, mean_share, var_share, eps, mask):  # types: normalize_with_share
        return _scale_and_shift(x, mean, (var + eps).rsqrt_(), weight, bias)

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
            counted = _counted(grad, mask)
            sums = torch.stack([counted.sum(dims), (counted * x_hat).sum(dims)])
        scale = inverse if weight is None else inverse * weight
        # scale·grad − (scale/n)(mean_share Σg + x̂ var_share Σ g x̂), in place from x̂ on
        part = scale * _one_of(x, mask)
        grad_x = x_hat.mul_((part * var_share).mul_(sums[1]).view(along))
        grad_x = _counted(grad_x.add_((part * mean_share).mul_(sums[0]).view(along)), mask).neg_()
        grad_x.addcmul_(grad, scale.view(along))
        grad_weight = all_sums[1] if ctx.needs_input_grad[3] else None
        grad_bias = all_sums[0] if ctx.needs_input_grad[4] else None
        return grad_x.to(x.dtype), None, None, grad_weight, grad_bias, None, None, None, None


def _counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values` where the mask is True, else 0."""
    return values if mask is None else torch.where(mask, values, 0)


def _one_of(x: Tensor, mask: Tensor | None) -> float | Tensor:
    """One over the number of values of a channel."""
    return x.shape[1] / x.numel() if mask is None else 1 / mask.sum().clamp(min=1)


def write(kept: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Write `values` into tensors from within a backward pass, that of a transform of `torch.func` too."""
    if torch.compiler.is_compiling() or _transforms() is None or any(map(_is_wrapped, kept)):
        for part, value in zip(kept, values, strict=True):
            part.unsqueeze(0).copy_(value)  # see `normlab.nn.base.remember`
    else:  # these were there before the transform, which refuses to copy_ into them
        torch._foreach_copy_(list(kept), list(values))  # pyright: ignore[reportPrivateImportUsage]


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
    mask: Tensor | None = None,
) -> Tensor:
    """γ (x − mean) / √(var + eps) + β, whose backward pass remembers the batches before.

    With N images, n values a channel and x̂ the normalised input, the backward pass is

        g ← g · min(1, step_bound · s / (η ‖g of the image‖))        s = max(√C, ‖(γ, β)‖)
        A ← A + rate (Σg/n − A)         B ← B + rate (Σ g x̂/n − B)
        ∂L/∂x = γ/√(var+eps) · (g − A − x̂ B)
        ∂L/∂γ = p Σ g x̂ + k γ          ∂L/∂β = p Σ g + k β          p = min(1, √(N/64))

    where A and B at a rate of 1 are batch norm's. There x̂² is 1 on average; here it is not, an image of much contrast
    can have ten times as much, and −x̂ · rate · Σ g x̂/n would not remove the part of g along x̂ but turn it round, and
    longer than it was. So of this batch's own Σ g x̂/n a part is subtracted: over max(1, rate · Σ x̂²/n).

    What A and B take from a batch in one step they must give back in the
    others, and a step whose gradient is clipped is a short one: so before the next batch the rate of the last one is
    multiplied by the length of its step over their average. A step that is not along the gradient (momentum, an
    adaptive optimizer) says nothing of this and counts as an average one.

    η is the learning rate. It is measured, by how far γ and β have moved after they were pushed by their gradient: the
    geometric mean over the last steps, so that a step that was clipped, and one that momentum made long, count as one
    step each. Before the first step it is taken to be 1. Where γ and β are absent or frozen nothing is measured, and
    there and without `step_bound` nothing is bounded and k = 0. Otherwise

        k = (b/10η) (1 − N/(ηH)) where ηH > N, else 0

    with b the share of the images that met the bound, and H the moving average of ‖mean of y over space‖², the squared
    length of an image's output. A step of plain gradient descent on a linear layer above moves what that layer says of
    an image by ηH/N times the error: far above 1 it overshoots, and only a smaller output helps. Where a norm follows
    the scale is nothing, and k does no harm.

    Args:
        x: (N, C, *space).
        mean: (C,), a constant.
        var: (C,), a constant.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        rate: of the moving averages, 0-d, between 0 and 1.
        memory: changed in place by each backward pass, but not by a gradient that is infinite or NaN.
        step_bound: a share of the size of (γ, β), or None for no bound.
        eps: added to the variance.
        mask: (N, 1, *space), True where a value is in `mean` and `var`, and counts above; None for all.
    """
    return _NormalizeWithMemory.apply(x, mean, var, weight, bias, rate, mask, *memory, step_bound, eps)


class _NormalizeWithMemory(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, mean, var, weight, bias, rate, mask, average, latest, parameters, push, measured, step_bound, eps):
        return _scale_and_shift(x, mean, (var + eps).rsqrt_(), weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, mean, var, weight, bias, rate, mask, *memory, ctx.step_bound, ctx.eps = inputs
        ctx.save_for_backward(x, mean, var, weight, bias, rate, mask)
        # Not saved: it may change before this backward pass, by that of another batch.
        ctx.memory = GradientMemory(*memory)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, var, weight, bias, rate, mask = ctx.saved_tensors
        memory: GradientMemory = ctx.memory
        along = (-1, *[1] * (x.dim() - 2))
        dims = (0, *range(2, x.dim()))
        inverse = (var + ctx.eps).rsqrt()
        grad = grads[0].to(mean.dtype)
        x_hat = (x - mean.view(along)).mul_(inverse.view(along))
        # A layer keeps its statistics in float32, and may be given float64 all the same.
        rate, kept = rate.to(x_hat.dtype), memory
        memory = GradientMemory._make(part.to(x_hat.dtype) for part in kept)
        average, parameters, push = memory.average, memory.parameters, memory.push
        log_lr, steps, squared_length, step_length, last_rate = memory.measured.unbind()
        pull = 0.0
        if all(ctx.needs_input_grad[3:5]):
            parameters = torch.stack([weight, bias]).to(x_hat.dtype)
            step = _Step.between(memory, parameters)
            log_lr, steps = step.enter(log_lr, steps)
            last_rate, step_length = step.weigh(last_rate, step_length)
            squared_length = torch.lerp(squared_length, _squared_length(x_hat, parameters, mask), rate)
            push = push * step.waits
            if ctx.step_bound is not None:
                lr = log_lr.exp()
                size = parameters.norm().clamp(min=x.shape[1] ** 0.5)
                excess = _counted(grad, mask).flatten(1).norm(dim=1) * (lr / (size * ctx.step_bound))
                grad = grad / excess.clamp(min=1).view(-1, *[1] * (x.dim() - 1))
                tiny = torch.finfo(lr.dtype).tiny
                overshoot = 1 - len(x) / (lr * squared_length).clamp(min=tiny)
                pull = (excess > 1).to(lr.dtype).mean() * overshoot.clamp(min=0) * PULL / lr.clamp(min=tiny)
        sums = counted_sums = torch.stack([(grad * x_hat).sum(dims), grad.sum(dims)])
        if mask is not None:
            counted = _counted(grad, mask)
            counted_sums = torch.stack([(counted * x_hat).sum(dims), counted.sum(dims)])
        latest = counted_sums * _one_of(x, mask)
        average = torch.lerp(average, memory.latest, last_rate)
        square = x_hat.square()
        square = square.mean(dims) if mask is None else _counted(square, mask).sum(dims) * _one_of(x, mask)
        own = torch.stack([latest[0] / (rate * square).clamp(min=1), latest[1]])
        subtracted = torch.lerp(average, own, rate)
        given = torch.add(sums * parameter_share(len(x)), parameters * pull)
        measured = torch.stack([log_lr, steps, squared_length, step_length, rate.to(log_lr.dtype)])
        usable = sums.isfinite().all() if mask is None else sums.isfinite().all() & mask.any()
        new = average, latest, parameters, push + given, measured
        write(kept, [torch.where(usable, value, before) for before, value in zip(memory, new, strict=True)])
        scale = inverse if weight is None else inverse * weight
        grad_x = x_hat.mul_((scale * subtracted[0]).view(along)).add_((scale * subtracted[1]).view(along))
        grad_x = _counted(grad_x, mask).neg_().addcmul_(grad, scale.view(along))
        grad_weight = given[0] if ctx.needs_input_grad[3] else None
        grad_bias = given[1] if ctx.needs_input_grad[4] else None
        return grad_x.to(x.dtype), None, None, grad_weight, grad_bias, *[None] * 9


class _Step(NamedTuple):
    """How γ and β have moved since the last backward pass: all 0-d."""

    waits: Tensor  # they have not: gradients are being accumulated
    shows: Tensor  # they have, and were pushed
    along: Tensor  # and along the gradient
    length: Tensor  # how far, over the length of the gradient; 1 if it does not show

    @classmethod
    def between(cls, memory: GradientMemory, parameters: Tensor) -> "_Step":
        moved = parameters - memory.parameters
        far, pushed = moved.norm(), memory.push.norm()
        shows = (far > 0) & (pushed > 0)
        along = shows & ((moved * memory.push).sum() < -ALONG * far * pushed)
        return cls(far == 0, shows, along, torch.where(shows, far / pushed, 1))

    def enter(self, log_lr: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the learning rate with this step in it, 0 until one shows it; the number of steps."""
        steps = steps + self.shows
        share = steps.clamp(min=1).reciprocal().clamp(min=1 / STEPS_REMEMBERED) * self.shows
        return torch.lerp(log_lr, self.length.log(), share), steps

    def weigh(self, rate: Tensor, step_length: Tensor) -> tuple[Tensor, Tensor]:
        """The rate at which a batch enters moving averages, times the length of its step over the average length."""
        new = torch.where(step_length > 0, torch.lerp(step_length, self.length, rate), self.length)
        new = torch.where(self.along, new, step_length)
        return rate * torch.where(self.along, self.length / new, 1), new


def _squared_length(x_hat: Tensor, parameters: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over images of the squared length of the output's mean over space."""
    if mask is not None and x_hat.dim() > 2:
        pooled = _counted(x_hat, mask).flatten(2).sum(2) / mask.flatten(2).sum(2).clamp(min=1)
    else:
        pooled = x_hat.flatten(2).mean(2) if x_hat.dim() > 2 else x_hat
    return torch.addcmul(parameters[1], pooled, parameters[0]).square_().sum(1).mean()


def _scale_and_shift(x: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    along = (-1, *[1] * (x.dim() - 2))
    scale = inverse if weight is None else inverse * weight
    y = (x - mean.view(along)).mul_(scale.view(along))
    if bias is not None:
        y.add_(bias.view(along))
    return y.to(x.dtype)

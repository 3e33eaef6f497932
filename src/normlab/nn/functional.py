"""Each norm as a plain, differentiable function: the reference that every faster form is tested against.

Tensors are channels first, `x` of shape (N, C, *space) with any number of space dimensions, also none. Statistics are
computed in two passes (mean first, then the mean squared distance from it), in float32 at least: a channel of mean
1000 and deviation 0.1 loses nothing. Variances are biased (divided by n) unless a docstring says otherwise.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.running import State, normalize_with_memory, rate_of, take_in


class RunningState(NamedTuple):
    """What running batch norm remembers: per channel `mean` and `var`, (C,), and `total`, their weight, 0-d."""

    mean: Tensor
    var: Tensor
    total: Tensor


def moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of `x` over `dims`, which stay as size 1, in float32 or float64."""
    x = x if x.dtype == torch.float64 else x.float()
    mean = x.mean(dims, keepdim=True)
    distance = x - mean
    return mean, (distance * distance).mean(dims, keepdim=True)


def masked_moments(x: Tensor, mask: Tensor, dims: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`moments` of the values where `mask` is True, and how many they are; all 0 where there is none.

    Args:
        x: (N, C, *space).
        mask: (N, 1, *space), or another shape that broadcasts to that of `x`.
        dims: which become 1; by default all but the channels, for which the number of values is one, 0-d.
    """
    channels = dims is None
    dims = _all_but_channel(x) if dims is None else dims
    x = x if x.dtype == torch.float64 else x.float()
    values = mask if channels else mask.expand(x.shape)
    found = values.sum(dims, keepdim=True).to(x.dtype)
    n = found.clamp(min=1)
    mean = torch.where(mask, x, 0).sum(dims, keepdim=True) / n
    distance = torch.where(mask, x - mean, 0)
    return mean, (distance * distance).sum(dims, keepdim=True) / n, found.view(()) if channels else found


def batch_moments(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    """Mean and biased variance of each channel, (1, C, 1, …), and of how many values: those where `mask` is True."""
    if mask is not None:
        return masked_moments(x, mask)
    return *moments(x, _all_but_channel(x)), x.numel() // x.shape[1]


def at_least_one(n: Any) -> Any:
    """A number of values, or 1 if there is none."""
    return n.clamp(min=1) if isinstance(n, Tensor) else max(n, 1)


def unless_none(kept: tuple[Tensor | None, Tensor | None], x: Tensor) -> tuple[Tensor, Tensor]:
    """A mean and variance as they broadcast against `x`; 0 and 1 for None."""
    mean, var = (
        x.new_full((), start, dtype=torch.float32) if part is None else per_channel(part, x)
        for part, start in zip(kept, (0.0, 1.0), strict=True)
    )
    return mean, var


def unless_empty(
    count: Tensor, found: tuple[Tensor, Tensor], kept: tuple[Tensor | None, Tensor | None] = (None, None)
) -> tuple[Tensor, Tensor]:
    """The mean and variance `found`; where there was no value those that are `kept`, or 0 and 1."""
    mean, var = (
        start if part is None else part.detach().clone().view(like.shape)
        for start, part, like in zip((0.0, 1.0), kept, found, strict=True)
    )
    return torch.where(count > 0, found[0], mean), torch.where(count > 0, found[1], var)


def normalize(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """γ (x − mean) / √(var + eps) + β, in the dtype of `x`.

    Args:
        x: (N, C, *space).
        mean: any shape that broadcasts against `x`.
        var: the variance, as `mean`.
        weight: γ, (C,) or broadcastable, or None for 1.
        bias: β, as `weight`, or None for 0.
        eps: added to the variance.
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * per_channel(weight, x)
    # Subtracting first keeps the digits that x·scale − mean·scale would cancel.
    y = (x - mean) * scale
    return (y if bias is None else y + per_channel(bias, x)).to(x.dtype)


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """A (C,) tensor shaped to broadcast along dimension 1 of `x`; other shapes are returned as they are."""
    return values.reshape(-1, *[1] * (x.dim() - 2)) if values.dim() == 1 and x.dim() > 2 else values


def batch_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Batch norm with the statistics of this batch, per channel over batch and space; the gradient flows through them.

    Source: Ioffe and Szegedy 2015, "Batch Normalization", algorithm 1.
    """
    mean, var = moments(x, _all_but_channel(x))
    return normalize(x, mean, var, weight, bias, eps)


def group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    mask: Tensor | None = None,
) -> Tensor:
    """Group norm: per image and group of channels, over the group's channels and space where `mask` is True.

    An image of which nothing counts is only scaled and shifted.

    One group is layer norm over channels and space; as many groups as channels is instance norm.

    Source: Wu and He 2018, "Group Normalization", equation 7.
    """
    grouped = x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups * x.shape[2:].numel())
    if mask is None:
        mean, var = moments(grouped, (2,))
    else:
        mean, var, count = masked_moments(grouped, mask.expand(x.shape).reshape(grouped.shape), (2,))
        mean, var = unless_empty(count, (mean, var))
    x_hat = normalize(grouped, mean, var, None, None, eps).reshape(x.shape)
    if weight is not None:
        x_hat = x_hat * per_channel(weight, x)
    return (x_hat if bias is None else x_hat + per_channel(bias, x)).to(x.dtype)


def lesson_alpha(batch_size: int, momentum: float) -> float:
    """α, the weight of a new batch of `batch_size` images: 1 − (1 − momentum) / √max(batch_size − 1, 1).

    The lesson's rule, made total: at batch 1 it is `momentum`, as at batch 2.
    """
    return 1 - (1 - momentum) / math.sqrt(max(batch_size - 1, 1))


def update_running(
    x: Tensor, state: RunningState, alpha: float, mask: Tensor | None = None
) -> tuple[RunningState, Tensor]:
    """The running statistics after this batch; the gradient flows through the batch's own share, not through `state`.

    With batch mean m, batch variance v and n values a channel:

        C' = (1−α)C + αn            w = αn / C'
        μ' = μ + w(m − μ)           σ²' = (1−w)σ² + w v + w(1−w)(m − μ)²

    This equals interpolating sums, sums of squares and counts (S ← (1−α)S + αs, …; μ = S/C, σ² = Q/C − μ²) without
    the cancellation in Q/C − μ². From an empty state (count 0) the share w is 1.

    Args:
        x: (N, C, *space).
        state: before the batch; not changed.
        alpha: α, the weight of a new batch, 0 to 1 (above 0 for an empty state); see `lesson_alpha`.
        mask: (N, 1, *space), True where a value counts; None for all. Without one the state stays.

    Returns:
        the new state, attached to the graph (detach it before keeping it), and the share w, 0-d.
    """
    mean, var, total = state.mean.detach(), state.var.detach(), state.total.detach()
    if mask is None:
        batch_mean, batch_var = (part.view(-1) for part in moments(x, _all_but_channel(x)))
        n = x.numel() // x.shape[1]
    else:
        batch_mean, batch_var, n = masked_moments(x, mask)
        batch_mean, batch_var = (part.view(-1) for part in unless_empty(n, (batch_mean, batch_var), (mean, var)))
    # A layer keeps its statistics in float32, and may be given float64 all the same.
    var, total = var.to(batch_var.dtype), total.to(batch_var.dtype)
    kept = total * (1 - alpha)
    total = kept + alpha * n
    total = total if mask is None else total.clamp(min=torch.finfo(total.dtype).tiny)
    share = alpha * n / total
    distance = batch_mean - mean
    # kept / total rather than 1 − share: from an empty state it is 0 to the last digit, however far the mean jumps.
    beside = kept / total * distance
    var = torch.lerp(var, torch.addcmul(batch_var, beside, distance), share)
    return RunningState(batch_mean - beside, var, total), share


def running_batch_norm(
    x: Tensor,
    state: State,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    momentum: float = 0.1,
    step_bound: float | None = 0.006,
) -> tuple[Tensor, State]:
    """Running batch norm as `RunningBatchNorm2d` has it: γ (x − μ') / √(σ²' + eps) + β, with this batch in μ' and σ²'.

    Args:
        x: (N, C, *space).
        state: before the batch, at first `State.empty(C)`; not changed.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        eps: added to the variance.
        momentum: how fast the shares adapt.
        step_bound: how far one image may move (γ, β) in a step, as a part of their length; None for no bound and pull.

    Returns:
        y, and the state after the batch. Each backward pass through y changes that, in place.
    """
    with torch.no_grad():
        mean, var = (part.view(-1) for part in moments(x, _all_but_channel(x)))
        new = take_in(state, mean, var, len(x), weight, momentum, eps)
        new = State._make(part.clone() for part in new)
    rate, memory = rate_of(new), new.memory
    return normalize_with_memory(x, new.running_mean, new.running_var, weight, bias, rate, memory, step_bound, eps), new


def lesson_running_batch_norm(
    x: Tensor,
    state: RunningState,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    alpha: float = 0.1,
    min_var: Tensor | None = None,
) -> tuple[Tensor, RunningState]:
    """The lesson's rule, with this batch in the statistics: γ (x − μ') / √(max(σ²', min_var) + eps) + β.

    μ' and σ²' are those of `update_running`, whose share w of the batch carries the gradient:

        ∂L/∂xᵢ = γ/√(σ²'+eps) · [gᵢ − (w/n)(Σg + x̂ᵢ Σ g x̂)]

    Returns:
        y and the new state (attached to the graph; detach it before keeping it).

    Source: fastai course v3 part 2, lesson 10, "running batch norm".
    """
    new, _ = update_running(x, state, alpha)
    return normalize_running(x, new, weight, bias, eps, min_var), new


def normalize_running(
    x: Tensor,
    state: RunningState,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    min_var: Tensor | None = None,
) -> Tensor:
    """γ (x − μ) / √(max(σ², min_var) + eps) + β with the statistics of `state`."""
    var = state.var if min_var is None else torch.where(state.var < min_var, min_var, state.var)
    return normalize(x, per_channel(state.mean, x), per_channel(var, x), weight, bias, eps)


def _all_but_channel(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))

"""The rule of running batch norm in torch's operators: its constants, its state, and both its passes.

This is the reference, explained in `docs/running.md`. Its twins are `csrc/running.h` and `gpu_running.py`. They take
the constants in the order of `Constants`; tests hold them equal to what is here.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plain import counted, one_of, per_channel, scale_and_shift, write


class Constants(NamedTuple):
    """The constants of the rule, in the order in which its twins take them."""

    least_share: float = 0.01  # w, over momentum: statistics reach back over a thousand batches at most
    least_gradient_share: float = 0.1  # r, over momentum: averages of gradients reach back over a hundred
    tolerated_drift: float = 0.2  # over N: the cosine of e and d above which r grows
    steps_remembered: float = 100  # the learning rate is the geometric mean of about this many steps
    steady_images: float = 64  # from this many images on γ and β learn at the full rate
    along: float = 0.99  # the least cosine at which a step is one along its gradient, which shows η
    pull: float = 0.1  # of γ and β, taken away in a step in which every image meets the bound
    unknown: float = -80.0  # log η after a step that is not along its gradient: no image meets a bound then


# In use; `cpu.use_constants` changes them, for a study or a test.
CONSTANTS = Constants()


class State(NamedTuple):
    """The buffers of the layer, by their names there: float32 or wider, but for `num_batches_tracked`, int64.

    The forward pass writes the first six and reads two more. The backward pass writes those from there on, the memory.
    """

    running_mean: Tensor  # μ, (C,)
    running_var: Tensor  # σ², (C,)
    num_batches_tracked: Tensor  # t
    share: Tensor  # w: of a batch in the running statistics
    innovation: Tensor  # e of the last batch, (C,)
    gradient_share: Tensor  # r: of a batch in the averages of gradients
    gradient_average: Tensor  # A of g and B of g x̂, (2, C), without the last batch
    gradient_latest: Tensor  # the same two means over the last batch, (2, C)
    parameters_before: Tensor  # γ and β at the last backward pass, (2, C)
    parameters_gradient: Tensor  # their gradient, summed over the backward passes since they moved, (2, C)
    log_learning_rate: Tensor  # the logarithm of η
    learning_rate_steps: Tensor  # how many steps η is known from
    output_square: Tensor  # H: the average squared length of an image's output
    step_length: Tensor  # the average length of a step over its gradient's
    latest_gradient_share: Tensor  # the share at which the last batch is to enter A and B

    @classmethod
    def empty(cls, channels: int, device: torch.device | str | None = None) -> "State":
        """That of no batch."""
        zeros, ones = partial(torch.zeros, device=device), partial(torch.ones, device=device)
        statistics = zeros(channels), ones(channels), zeros((), dtype=torch.int64), ones(()), zeros(channels), ones(())
        return cls(*statistics, *(zeros(2, channels) for _ in range(4)), *(zeros(()) for _ in range(5)))

    @property
    def memory(self) -> tuple[Tensor, ...]:
        """What backward passes write."""
        return self[MEMORY]


STATISTICS = slice(0, 6)  # of `State`: what forward passes write
READ = slice(0, 8)  # what they read
MEMORY = slice(6, 15)  # what backward passes read and write


def upgrade(state: dict[str, Any], prefix: str) -> None:
    """Gives buffers in a layer's state from before they had these names those of today, and their order, in place."""
    measured = state.pop(prefix + "gradient_measured", None)
    if measured is None:
        return
    for name, value in zip(State._fields[10:], measured, strict=True):
        state[prefix + name] = value
    for name, before in (("parameters_before", "gradient_parameters"), ("parameters_gradient", "gradient_push")):
        if prefix + before in state:
            state[prefix + name] = state.pop(prefix + before)
    for name in ("gradient_average", "gradient_latest"):  # B, then A
        if prefix + name in state:
            state[prefix + name] = state[prefix + name].flip(0)


# --- forward ----------------------------------------------------------------------------------------------------------


def take_in(
    state: State,
    mean: Tensor,
    var: Tensor,
    images: int,
    weight: Tensor | None,
    momentum: float,
    eps: float,
    counts: int | Tensor = 1,
) -> State:
    """The state after a batch, as new tensors; those of the backward pass stay.

        e = (m − μ) / √(σ² + eps)           d = γ/(σ² + eps) · (A − mean g)
        log w ← log w + max(momentum, 1/t) · cos(e, e')
        log r ← log r + max(momentum, 1/t) · (cos(e, d) − tolerated_drift/N)
        μ ← μ + w (m − μ)                   σ² ← (1−w) σ² + w v + w(1−w) (m − μ)²

    Args:
        state: before; not changed.
        mean: m, (C,).
        var: v, (C,), biased.
        images: N.
        weight: γ, (C,) or None for 1.
        momentum: how fast w and r adapt.
        eps: added to the variance.
        counts: 0 if no value of this batch counts, so that the state stays, else 1.
    """
    batches = state.num_batches_tracked + counts
    scale = (state.running_var + eps).rsqrt()
    innovation = (mean - state.running_mean) * scale
    drift = (state.gradient_average[0] - state.gradient_latest[0]) * scale.square()
    drift = drift if weight is None else drift * weight
    gain = at_first(batches, momentum, scale.dtype)
    least, least_gradient = CONSTANTS.least_share * momentum, CONSTANTS.least_gradient_share * momentum
    share = grow(state.share, innovation, state.innovation, gain).clamp(least, 1)
    tolerated = CONSTANTS.tolerated_drift / images
    gradient_share = grow(state.gradient_share, innovation, drift, gain, tolerated).clamp(least_gradient, 1)
    beside = (1 - share) * (mean - state.running_mean)
    new_var = torch.lerp(state.running_var, torch.addcmul(var, beside, mean - state.running_mean), share)
    new = (mean - beside, new_var, batches, share, innovation, gradient_share)
    if isinstance(counts, Tensor):
        kept = state[STATISTICS]
        new = tuple(torch.where(counts > 0, value, before) for value, before in zip(new, kept, strict=True))
    return State(*new, *state.memory)


def grow(share: Tensor, innovation: Tensor, cause: Tensor, gain: Tensor, tolerated: float = 0.0) -> Tensor:
    """The share of a batch in a moving average, times e^(gain · (cos(innovation, cause) − tolerated)).

    The cause of an innovation may be that the running mean lags: then that of the batch before points the same way. Or
    it is the drift that the last gradient gave the layer below.

    Args:
        share: 0-d, above 0.
        innovation: e of this batch, (C,).
        cause: (C,).
        gain: 0-d.
        tolerated: the cosine at which the share stays.

    Source: Mehra 1970, "On the Identification of Variances and Adaptive Kalman Filtering": the gain of a Kalman filter
    is best where innovations are white.
    """
    lengths = (innovation.norm() * cause.norm()).clamp(min=torch.finfo(share.dtype).tiny)
    return share * (((innovation * cause).sum() / lengths - tolerated) * gain).exp()


def at_first(batches: Tensor, rate: float | Tensor, dtype: torch.dtype) -> Tensor:
    """max(rate, 1/t): what makes a moving average the mean of the first batches."""
    return batches.clamp(min=1).to(dtype).reciprocal().clamp(min=rate)


def rate_of(state: State) -> Tensor:
    """The share of the last batch in the averages of the backward pass: max(r, w, 1/t).

    Where the statistics move fast, as adaptive optimizers make them, averages of gradients must be as young as they.
    With w = 1 the backward pass is batch norm's.
    """
    share = torch.maximum(state.gradient_share, state.share)
    return at_first(state.num_batches_tracked, share, state.running_mean.dtype)


# --- backward ---------------------------------------------------------------------------------------------------------


def normalize_with_memory(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    rate: Tensor,
    memory: Sequence[Tensor],
    step_bound: float | None,
    eps: float,
    mask: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """γ (x − mean) / √(var + eps) + β, whose backward pass remembers the batches before.

    With N images, n values a channel and x̂ the normalised input, the backward pass is

        g ← g · min(1, step_bound · s / (η ‖g of the image‖))        s = max(√C, ‖(γ, β)‖)
        A ← A + rate (Σg/n − A)         B ← B + rate (Σ g x̂/n − B)
        ∂L/∂x = γ/√(var+eps) · (g − A − x̂ B)
        ∂L/∂γ = p Σ g x̂ + k γ          ∂L/∂β = p Σ g + k β          p = min(1, √(N/64))
        k = (b/10η) (1 − N/(ηH)) where ηH > N, else 0

    At a rate of 1 A and B are batch norm's. There x̂² is 1 on average. Here an image of much contrast can have ten times
    as much, and −x̂ · rate · Σ g x̂/n would turn the part of g along x̂ round. So of this batch's own Σ g x̂/n a part is
    subtracted: over max(1, rate · Σ x̂²/n).

    What A and B take from a batch in one step they must give back in the others, and a step that was clipped is short.
    So before the next batch the rate of the last one is multiplied by the length of its step over the average length. A
    step that is not along the gradient (momentum, an adaptive optimizer) says nothing of this and counts as an average
    one.

    η is the learning rate, measured by how far γ and β moved along their gradient. It is the geometric mean over the
    last steps, so that one that was clipped counts as one. Before the first step it is 1. Momentum and adaptive
    optimizers do not go along the gradient: of their steps η is not known. There, where γ and β are absent or frozen,
    and without `step_bound`, nothing is bounded and k = 0.

    b is the share of the images that met the bound, and H the moving average of ‖mean of y over space‖². A step of
    plain gradient descent on a linear layer above moves what that layer says of an image by ηH/N times the error. Far
    above 1 it overshoots, and only a smaller output helps. Where a norm follows, the scale is nothing, and k does no
    harm.

    With a `share` s it is γ ((1 − s) x̂ + s i) + β, i being instance norm of x. The bound, the measured learning rate, p
    and k are those of the whole:

        ∂L/∂x = (1−s) γ/√(var+eps) · (g − A − x̂ B) + s γ ∂L/∂i ∂i/∂x
        ∂L/∂γ = p Σ g ((1−s) x̂ + s i) + k γ          ∂L/∂s = γ Σ g (i − x̂)

    Args:
        x: (N, C, *space).
        mean: (C,), a constant.
        var: (C,), a constant.
        weight: γ, (C,) or None for 1.
        bias: β, (C,) or None for 0.
        rate: of the moving averages, 0-d, between 0 and 1.
        memory: see `State.memory`; changed in place by each backward pass, but not by a gradient with NaN or infinity.
        step_bound: a share of the size of (γ, β), or None for no bound.
        eps: added to the variance.
        mask: (N, 1, *space), True where a value is in `mean` and `var`, and counts above; None for all.
        share: s, (C,), from 0 to 1; None for 0.
    """
    return _NormalizeWithMemory.apply(x, mean, var, weight, bias, rate, mask, share, *memory, step_bound, eps)


class _NormalizeWithMemory(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        x, mean, var, weight, bias, rate, mask, share, gradient_average, gradient_latest, parameters_before,
        parameters_gradient, log_learning_rate, learning_rate_steps, output_square, step_length, latest_gradient_share,
        step_bound, eps,
    ):  # fmt: skip
        if share is None:
            return scale_and_shift(x, mean, (var + eps).rsqrt_(), weight, bias)
        own, running = parts_of(weight, share)
        y = scale_and_shift(x, mean, (var + eps).rsqrt_(), running, bias)
        return y + (instance_norm(x, mask, eps)[0] * per_channel(own, x)).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, mean, var, weight, bias, rate, mask, share, *memory, ctx.step_bound, ctx.eps = inputs
        ctx.save_for_backward(x, mean, var, weight, bias, rate, mask, share)
        # Not saved: it may change before this backward pass, by that of another batch.
        ctx.memory = memory

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        x, mean, var, weight, bias, rate, mask, share = ctx.saved_tensors
        running = weight if share is None else parts_of(weight, share)[1]
        along = (-1, *[1] * (x.dim() - 2))
        dims = (0, *range(2, x.dim()))
        inverse = (var + ctx.eps).rsqrt()
        grad = grads[0].to(mean.dtype)
        x_hat = (x - mean.view(along)).mul_(inverse.view(along))
        # A layer keeps its statistics in float32, and may be given float64 all the same.
        rate, memory = rate.to(x_hat.dtype), [part.to(x_hat.dtype) for part in ctx.memory]
        average, latest_before, parameters, gradient, log_lr, steps, square, step_length, last_rate = memory
        pull = 0.0
        if all(ctx.needs_input_grad[3:5]):
            now = torch.stack([weight, bias]).to(x_hat.dtype)
            step = _Step.between(parameters, now, gradient)
            parameters = now
            log_lr, steps = step.enter(log_lr, steps)
            last_rate, step_length = step.weigh(last_rate, step_length)
            square = torch.lerp(square, _output_square(x_hat, torch.stack([running, bias]).to(x_hat.dtype), mask), rate)
            gradient = gradient * step.waits
            if ctx.step_bound is not None:
                lr = log_lr.exp()
                size = parameters.norm().clamp(min=x.shape[1] ** 0.5)
                excess = counted(grad, mask).flatten(1).norm(dim=1) * (lr / (size * ctx.step_bound))
                grad = grad / excess.clamp(min=1).view(-1, *[1] * (x.dim() - 1))
                tiny = torch.finfo(lr.dtype).tiny
                overshoot = 1 - len(x) / (lr * square).clamp(min=tiny)
                pull = (excess > 1).to(lr.dtype).mean() * overshoot.clamp(min=0) * CONSTANTS.pull / lr.clamp(min=tiny)
        sums = counted_sums = torch.stack([grad.sum(dims), (grad * x_hat).sum(dims)])
        if mask is not None:
            part = counted(grad, mask)
            counted_sums = torch.stack([part.sum(dims), (part * x_hat).sum(dims)])
        latest = counted_sums * one_of(x, mask)
        average = torch.lerp(average, latest_before, last_rate)
        x_square = x_hat.square()
        x_square = x_square.mean(dims) if mask is None else counted(x_square, mask).sum(dims) * one_of(x, mask)
        of_batch = torch.stack([latest[0], latest[1] / (rate * x_square).clamp(min=1)])
        subtracted = torch.lerp(average, of_batch, rate)
        of_x_hat, slower = sums[1], parameter_share(len(x))
        through_own, of_share = None, None
        if share is not None:
            through_own, of_x_hat, of_share = _of_own(x, grad, weight, share, of_x_hat, mask, ctx.eps)
        given = torch.add(torch.stack([of_x_hat, sums[0]]) * slower, parameters * pull)
        usable = sums.isfinite().all() if mask is None else sums.isfinite().all() & mask.any()
        new = average, latest, parameters, gradient + given, log_lr, steps, square, step_length, rate
        write(ctx.memory, [torch.where(usable, value, before) for before, value in zip(memory, new, strict=True)])
        scale = inverse if running is None else inverse * running
        grad_x = x_hat.mul_((scale * subtracted[1]).view(along)).add_((scale * subtracted[0]).view(along))
        grad_x = counted(grad_x, mask).neg_().addcmul_(grad, scale.view(along))
        if through_own is not None:
            grad_x = grad_x.add_(through_own)
        grad_weight = given[0] if ctx.needs_input_grad[3] else None
        grad_bias = given[1] if ctx.needs_input_grad[4] else None
        return grad_x.to(x.dtype), None, None, grad_weight, grad_bias, None, None, of_share, *[None] * 11


class _Step(NamedTuple):
    """How γ and β have moved since the last backward pass: all 0-d."""

    waits: Tensor  # they have not: gradients are being accumulated
    shows: Tensor  # they have, and had a gradient
    along: Tensor  # and along the gradient
    length: Tensor  # how far, over the length of the gradient; 1 if it does not show

    @classmethod
    def between(cls, before: Tensor, now: Tensor, gradient: Tensor) -> "_Step":
        moved = now - before
        far, force = moved.norm(), gradient.norm()
        shows = (far > 0) & (force > 0)
        along = shows & ((moved * gradient).sum() < -CONSTANTS.along * far * force)
        return cls(far == 0, shows, along, torch.where(shows, far / force, 1))

    def enter(self, log_lr: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """The logarithm of the learning rate with this step in it, 0 until one shows it; the number of steps.

        A step that is not along its gradient, of momentum or an adaptive optimizer, says that it is not known.
        """
        known = steps + self.along
        share = known.clamp(min=1).reciprocal().clamp(min=1 / CONSTANTS.steps_remembered)
        entered = torch.where(self.along, torch.lerp(log_lr, self.length.log(), share), log_lr)
        lost = self.shows & ~self.along
        return torch.where(lost, CONSTANTS.unknown, entered), torch.where(lost, 0, known)

    def weigh(self, rate: Tensor, step_length: Tensor) -> tuple[Tensor, Tensor]:
        """The rate at which a batch enters moving averages, times the length of its step over the average length."""
        new = torch.where(step_length > 0, torch.lerp(step_length, self.length, rate), self.length)
        new = torch.where(self.along, new, step_length)
        return rate * torch.where(self.along, self.length / new, 1), new


def parameter_share(images: int) -> float:
    """p, the share of the learning rate at which γ and β learn from a batch of `images`."""
    return min(1, (images / CONSTANTS.steady_images) ** 0.5)


def parts_of(weight: Tensor | None, share: Tensor) -> tuple[Tensor, Tensor]:
    """γ s of instance norm, and γ (1 − s) of the running part."""
    return (share, 1 - share) if weight is None else (share * weight, (1 - share) * weight)


def instance_norm(x: Tensor, mask: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """The norm i = (x − m) / √(v + eps), by mean and variance over space of each image; and 1 / √(v + eps).

    The latter is (N, C, 1, …), and both are in float32 at least. Of an image without a value that counts m is 0 and
    v is 1.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    space = tuple(range(2, x.dim()))
    if mask is None:
        var, mean = torch.var_mean(wide, space, correction=0, keepdim=True)
    else:
        values = mask.sum(space, keepdim=True)
        mean = counted(wide, mask).sum(space, keepdim=True) / values.clamp(min=1)
        var = counted(wide - mean, mask).square().sum(space, keepdim=True) / values.clamp(min=1)
        var = torch.where(values > 0, var, 1)
    inverse = (var + eps).rsqrt()
    return (wide - mean) * inverse, inverse


def _of_own(
    x: Tensor,
    grad: Tensor,
    weight: Tensor | None,
    share: Tensor,
    of_x_hat: Tensor,
    mask: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient of x through i, Σ g ((1−s) x̂ + s i), and γ Σ g (i − x̂), where `of_x_hat` is Σ g x̂."""
    i, inverse = instance_norm(x, mask, eps)
    of_i = (grad * i).sum((0, *range(2, x.dim())))
    through = _through_instance_norm(grad, i, inverse, mask).mul_(per_channel(parts_of(weight, share)[0], x))
    of_share = of_i - of_x_hat
    mixed = torch.lerp(of_x_hat, of_i, share.to(of_i.dtype))
    return through, mixed, of_share if weight is None else of_share * weight


def _through_instance_norm(grad: Tensor, i: Tensor, inverse: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of x, where `grad` is that of i: (g − mean g − i mean(g i)) / √(v + eps)."""
    space = tuple(range(2, i.dim()))
    one = 1 / i.shape[2:].numel() if mask is None else 1 / mask.sum(space, keepdim=True).clamp(min=1)
    of_mean, of_scale = grad.sum(space, keepdim=True) * one, (grad * i).sum(space, keepdim=True) * one
    return (grad - counted(of_mean + i * of_scale, mask)) * inverse


def _output_square(x_hat: Tensor, parameters: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over images of the squared length of the output's mean over space; that of instance norm is 0."""
    if mask is not None and x_hat.dim() > 2:
        pooled = counted(x_hat, mask).flatten(2).sum(2) / mask.flatten(2).sum(2).clamp(min=1)
    else:
        pooled = x_hat.flatten(2).mean(2) if x_hat.dim() > 2 else x_hat
    return torch.addcmul(parameters[1], pooled, parameters[0]).square_().sum(1).mean()

"""The rule of running batch norm in Triton, as `running` has it: what a single program does once a pass."""

import triton
import triton.language as tl

from .gpu_parts import INFINITY, all_finite, lerp, merged, weight_or_one

TINY = tl.constexpr(1.1754943508222875e-38)  # the least normal float32


@triton.jit
def _grown(share, a, b, least_cosine, gain, least):
    """A share that grows with the cosine of two vectors, between `least` and 1; NaN stays."""
    lengths = tl.sqrt(tl.sum(a * a, 0)) * tl.sqrt(tl.sum(b * b, 0))
    cosine = tl.sum(a * b, 0) / tl.where(lengths < TINY, TINY, lengths)
    grown = share * tl.exp((cosine - least_cosine) * gain)
    return tl.where(grown < least, least, tl.where(grown > 1, 1.0, grown))


@triton.jit
def finish_running(
    rows_of_parts, rows, saved, weight, running_mean, running_var, num_batches_tracked, share, innovation,
    gradient_share, gradient_average, gradient_latest, rate, momentum, eps, N, C,
    RECOMPUTING: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
    least_share: tl.constexpr, least_gradient_share: tl.constexpr, tolerated_drift: tl.constexpr,
    steps_remembered: tl.constexpr, steady_images: tl.constexpr, along: tl.constexpr, pull: tl.constexpr,
    unknown: tl.constexpr,
):  # fmt: skip
    """Running batch norm's statistics with this batch in them; see `running.take_in`. `rate` is written."""
    c = tl.arange(0, BLOCK)
    inside = c < C
    mean = tl.load(running_mean + c, mask=inside, other=0.0)
    var = tl.load(running_var + c, mask=inside, other=1.0)
    batches = tl.load(num_batches_tracked)
    w, r = tl.load(share), tl.load(gradient_share)
    seen = batches
    if not RECOMPUTING:
        seen = batches + 1
        number, batch_mean, squares = merged(rows_of_parts, rows, 3 * C, C, c, inside, BR)
        scale = tl.rsqrt(var + eps)
        distance = batch_mean - mean
        e = distance * scale
        last_e = tl.load(innovation + c, mask=inside, other=0.0)
        drift = tl.load(gradient_average + c, mask=inside, other=0.0)
        drift -= tl.load(gradient_latest + c, mask=inside, other=0.0)
        drift *= scale * scale * weight_or_one(weight, c, inside)
        gain = tl.maximum(momentum, 1.0 / seen.to(tl.float32))
        old_w, old_r = w, r
        w = _grown(old_w, e, last_e, 0.0, gain, least_share * momentum)
        r = _grown(old_r, e, drift, tolerated_drift / N, gain, least_gradient_share * momentum)
        new_mean = batch_mean - (1 - w) * distance
        new_var = lerp(var, squares / number + (1 - w) * distance * distance, w)
        finite = all_finite(new_mean) & all_finite(new_var) & all_finite(e)
        finite = finite & (tl.abs(w) < INFINITY) & (tl.abs(r) < INFINITY)
        tl.store(running_mean + c, tl.where(finite, new_mean, mean), mask=inside)
        tl.store(running_var + c, tl.where(finite, new_var, var), mask=inside)
        tl.store(innovation + c, tl.where(finite, e, last_e), mask=inside)
        tl.store(share, tl.where(finite, w, old_w))
        tl.store(gradient_share, tl.where(finite, r, old_r))
        tl.store(num_batches_tracked, tl.where(finite, seen, batches))
        mean, var = new_mean, new_var
    tl.store(rate, tl.maximum(tl.maximum(r, w), 1.0 / tl.maximum(seen, 1).to(tl.float32)))
    tl.store(saved + c, mean, mask=inside)
    tl.store(saved + C + c, tl.rsqrt(var + eps), mask=inside)


@triton.jit
def finish_running_gradient(
    sums, saved, weight, bias, weight_grad, bias_grad, gradient_average, gradient_latest, parameters_before,
    parameters_gradient, log_learning_rate, learning_rate_steps, output_square, step_length, latest_gradient_share,
    coefficients, factor, rate_of_batch, step_bound, parameter_share, N, C, S,
    LEARNS: tl.constexpr, BOUNDED: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
    least_share: tl.constexpr, least_gradient_share: tl.constexpr, tolerated_drift: tl.constexpr,
    steps_remembered: tl.constexpr, steady_images: tl.constexpr, along: tl.constexpr, pull: tl.constexpr,
    unknown: tl.constexpr,
):  # fmt: skip
    """Running batch norm's averages with this batch in them; see `running.normalize_with_memory`.

    `sums`: those of `products`, (5, N, C).
    """
    c = tl.arange(0, BLOCK)
    inside = c < C
    inverse = tl.load(saved + C + c, mask=inside, other=0.0)
    scale = inverse * weight_or_one(weight, c, inside)
    rate = tl.load(rate_of_batch)
    log_lr, steps, square = tl.load(log_learning_rate), tl.load(learning_rate_steps), tl.load(output_square)
    mean_length, last_rate = tl.load(step_length), tl.load(latest_gradient_share)
    gradient_weight = tl.load(parameters_gradient + c, mask=inside, other=0.0)
    gradient_bias = tl.load(parameters_gradient + C + c, mask=inside, other=0.0)
    if LEARNS:
        now_weight = tl.load(weight + c, mask=inside, other=0.0)
        now_bias = tl.load(bias + c, mask=inside, other=0.0)
        moved_weight = now_weight - tl.load(parameters_before + c, mask=inside, other=0.0)
        moved_bias = now_bias - tl.load(parameters_before + C + c, mask=inside, other=0.0)
        far = tl.sqrt(tl.sum(moved_weight * moved_weight + moved_bias * moved_bias, 0))
        force = tl.sqrt(tl.sum(gradient_weight * gradient_weight + gradient_bias * gradient_bias, 0))
        product = tl.sum(moved_weight * gradient_weight + moved_bias * gradient_bias, 0)
        shows = (far > 0) & (force > 0)
        is_along = shows & (product < -along * far * force)
        length = tl.where(shows, far / tl.where(shows, force, 1.0), 1.0)
        steps += is_along.to(tl.float32)
        of_step = tl.maximum(1.0 / tl.maximum(steps, 1.0), 1.0 / steps_remembered)
        log_lr = tl.where(is_along, lerp(log_lr, tl.log(length), of_step), log_lr)
        lost = shows & (product >= -along * far * force)
        log_lr, steps = tl.where(lost, unknown, log_lr), tl.where(lost, 0.0, steps)
        new_length = tl.where(mean_length > 0, lerp(mean_length, length, last_rate), length)
        last_rate *= tl.where(is_along, length / new_length, 1.0)
        mean_length = tl.where(is_along, new_length, mean_length)
        gradient_weight = tl.where(far > 0, 0.0, gradient_weight)
        gradient_bias = tl.where(far > 0, 0.0, gradient_bias)
        lr = tl.exp(log_lr)
        size = tl.sum(now_weight * now_weight + now_bias * now_bias, 0)
        # The length of an image's gradient, over its bound.
        excess_of = lr / (tl.sqrt(tl.maximum(size, C * 1.0)) * step_bound)

    sum_g = tl.zeros((BLOCK,), tl.float32)
    sum_gd = tl.zeros((BLOCK,), tl.float32)
    sum_dd = tl.zeros((BLOCK,), tl.float32)
    over, lengths = 0.0, 0.0
    for first in range(0, N, BN):
        n = first + tl.arange(0, BN)
        here = (n[:, None] < N) & inside[None, :]
        at = sums + n[:, None].to(tl.int64) * C + c[None, :]
        of_image = tl.full((BN,), 1.0, tl.float32)
        if LEARNS:
            squares = tl.load(at + 2 * N * C, mask=here, other=0.0)
            pooled = tl.load(at + 3 * N * C, mask=here, other=0.0) * (inverse * now_weight / S)[None, :]
            pooled += now_bias[None, :]
            lengths += tl.sum(tl.sum(tl.where(here, pooled * pooled, 0.0), 1), 0)
            if BOUNDED:
                excess = tl.sqrt(tl.sum(squares, 1)) * excess_of
                over += tl.sum((excess > 1).to(tl.float32), 0)
                of_image = tl.where(excess > 1, 1.0 / excess, 1.0)
        if factor is not None:
            tl.store(factor + n, of_image, mask=n < N)
        sum_g += tl.sum(of_image[:, None] * tl.load(at, mask=here, other=0.0), 0)
        sum_gd += tl.sum(of_image[:, None] * tl.load(at + N * C, mask=here, other=0.0), 0)
        sum_dd += tl.sum(tl.load(at + 4 * N * C, mask=here, other=0.0), 0)

    of_weight, of_bias = sum_gd * inverse, sum_g
    finite = all_finite(of_weight) & all_finite(of_bias)
    values = N * S * 1.0
    average_weight = tl.load(gradient_average + C + c, mask=inside, other=0.0)
    average_bias = tl.load(gradient_average + c, mask=inside, other=0.0)
    latest_weight = tl.load(gradient_latest + C + c, mask=inside, other=0.0)
    latest_bias = tl.load(gradient_latest + c, mask=inside, other=0.0)
    new_weight = lerp(average_weight, latest_weight, last_rate)
    new_bias = lerp(average_bias, latest_bias, last_rate)
    own = of_weight / values / tl.maximum(rate * (sum_dd * inverse * inverse / values), 1.0)
    tl.store(coefficients + c, -lerp(new_weight, own, rate) * scale * inverse, mask=inside)
    tl.store(coefficients + C + c, -lerp(new_bias, of_bias / values, rate) * scale, mask=inside)
    given_weight, given_bias = of_weight * parameter_share, of_bias * parameter_share
    if LEARNS:
        square = lerp(square, lengths / N, rate)
        if BOUNDED:
            overshoot = 1 - N / tl.maximum(lr * square, TINY)
            pulled = over / N * tl.maximum(overshoot, 0.0) * pull / tl.maximum(lr, TINY)
            given_weight += now_weight * pulled
            given_bias += now_bias * pulled
    tl.store(weight_grad + c, given_weight, mask=inside)
    tl.store(bias_grad + c, given_bias, mask=inside)
    stored = inside & finite
    tl.store(gradient_average + c, new_bias, mask=stored)
    tl.store(gradient_average + C + c, new_weight, mask=stored)
    tl.store(gradient_latest + c, of_bias / values, mask=stored)
    tl.store(gradient_latest + C + c, of_weight / values, mask=stored)
    tl.store(parameters_gradient + c, gradient_weight + given_weight, mask=stored)
    tl.store(parameters_gradient + C + c, gradient_bias + given_bias, mask=stored)
    if LEARNS:
        tl.store(parameters_before + c, now_weight, mask=stored)
        tl.store(parameters_before + C + c, now_bias, mask=stored)
    tl.store(log_learning_rate, log_lr, mask=finite)
    tl.store(learning_rate_steps, steps, mask=finite)
    tl.store(output_square, square, mask=finite)
    tl.store(step_length, mean_length, mask=finite)
    tl.store(latest_gradient_share, rate, mask=finite)

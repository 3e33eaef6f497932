"""What runs on a GPU: the norms' passes in Triton; `gpu` launches them.

A tensor is seen as (N, C, S): images, channels, space. A program works through tiles of BN images, BC channels and BS
positions. A sum over a tensor is taken in parts, each by a program of its own that writes one row, and a kernel of a
single program, `_finish_…`, puts the rows together and does what is done once. With EACH_IMAGE the parts of each image
stay apart. What is by channel here and by image and group there, means say, is by `part`: image · parts_per_image +
channel // channels_per_part. Numbers and names are those of `csrc`.
"""

import triton
import triton.language as tl

from .gpu_parts import all_finite, lerp, merged, weight_or_one


@triton.jit
def _tile(t, n_blocks, N, C, S, LAST: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """The tile of this number: its images and channels, with dimensions of 1, the places in memory, the mask."""
    n = (t % n_blocks).to(tl.int64) * BN + tl.arange(0, BN)[:, None, None]
    c = tl.program_id(1) * BC + tl.arange(0, BC)[None, :, None]
    s = (t // n_blocks) * BS + tl.arange(0, BS)[None, None, :]
    if LAST:
        places = (n * S + s) * C + c
    else:
        places = (n * C + c) * S + s
    return n, c, places, (n < N) & (c < C) & (s < S)


@triton.jit
def _sum(tile, EACH_IMAGE: tl.constexpr):
    """Over space, and over images too; the dimensions stay."""
    found = tl.sum(tile, 2)[:, :, None]
    if not EACH_IMAGE:
        found = tl.sum(found, 0)[None, :, :]
    return found


@triton.jit
def _load(values, places, mask):
    return tl.load(values + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _affine_of(x, n, c, inside, saved, weight, bias, parts, parts_per_image, channels_per_part):
    """X − mean; the norm of x, before any activation; what the norm multiplies by."""
    part = n * parts_per_image + c // channels_per_part
    mean = tl.load(saved + part, mask=inside, other=0.0)
    scale = tl.load(saved + parts + part, mask=inside, other=0.0) * weight_or_one(weight, c, inside)
    distance = x - mean
    z = distance * scale
    if bias is not None:
        z += tl.load(bias + c, mask=inside, other=0.0)
    return distance, z, scale, part


# --- passes over the tensor -------------------------------------------------------------------------------------------


@triton.jit
def moments(
    x, rows_of_parts, n_blocks, tiles, N, C, S,
    EACH_IMAGE: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Writes (row, 3, images or 1, C): number, mean, and sum of squared distances from it."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    n, c, places, mask = _tile(row, n_blocks, N, C, S, LAST, BN, BC, BS)
    first = _load(x, places, mask)
    # Distances from a mean that is nearly theirs: squares of what is far from 0 leave no digits for the variance.
    pilot = _sum(first, EACH_IMAGE) / tl.maximum(_sum(mask.to(tl.float32), EACH_IMAGE), 1.0)
    number = tl.zeros((BN, BC, BS), tl.float32)
    total = tl.zeros((BN, BC, BS), tl.float32)
    squares = tl.zeros((BN, BC, BS), tl.float32)
    for t in range(row, tiles, rows):
        n, c, places, mask = _tile(t, n_blocks, N, C, S, LAST, BN, BC, BS)
        distance = tl.where(mask, _load(x, places, mask) - pilot, 0.0)
        number += mask.to(tl.float32)
        total += distance
        squares += distance * distance
    number = _sum(number, EACH_IMAGE)
    total = _sum(total, EACH_IMAGE)
    several = tl.maximum(number, 1.0)
    squares = _sum(squares, EACH_IMAGE) - total * total / several
    if EACH_IMAGE:
        to = rows_of_parts + ((row // n_blocks) * 3 * N + n) * C + c
        stride = N * C
        inside = (n < N) & (c < C)
    else:
        to = rows_of_parts + row * 3 * C + c
        stride = C
        inside = c < C
    tl.store(to, number, mask=inside)
    tl.store(to + stride, pilot + total / several, mask=inside)
    tl.store(to + 2 * stride, tl.where(squares < 0, 0.0, squares), mask=inside)  # so that NaN stays


@triton.jit
def affine(
    x, residual, y, saved, weight, bias, parts, parts_per_image, channels_per_part, slope, n_blocks, N, C, S,
    ACTIVATED: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Y = weight (x − mean) inverse + bias + residual, with the activation after it."""
    n, c, places, mask = _tile(tl.program_id(0), n_blocks, N, C, S, LAST, BN, BC, BS)
    inside = (n < N) & (c < C)
    values = _load(x, places, mask)
    d, z, scale, part = _affine_of(values, n, c, inside, saved, weight, bias, parts, parts_per_image, channels_per_part)
    if residual is not None:
        z += _load(residual, places, mask)
    if ACTIVATED:
        z = tl.where(z < 0, z * slope, z)
    tl.store(y + places, z, mask=mask)


@triton.jit
def products(
    g, x, saved, weight, bias, rows_of_sums, parts, parts_per_image, channels_per_part, slope, n_blocks, tiles, N, C, S,
    SUMS: tl.constexpr, ACTIVATED: tl.constexpr, EACH_IMAGE: tl.constexpr, LAST: tl.constexpr,
    BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Writes (row, SUMS, images or 1, C): Σg, Σ g d and, if 5, Σg², Σd, Σd², with d = x − mean, g before activation."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    sum_g = tl.zeros((BN, BC, BS), tl.float32)
    sum_gd = tl.zeros((BN, BC, BS), tl.float32)
    if SUMS == 5:
        sum_gg = tl.zeros((BN, BC, BS), tl.float32)
        sum_d = tl.zeros((BN, BC, BS), tl.float32)
        sum_dd = tl.zeros((BN, BC, BS), tl.float32)
    n, c, places, mask = _tile(row, n_blocks, N, C, S, LAST, BN, BC, BS)
    for t in range(row, tiles, rows):
        n, c, places, mask = _tile(t, n_blocks, N, C, S, LAST, BN, BC, BS)
        grad, values = _load(g, places, mask), _load(x, places, mask)
        d, z, scale, part = _affine_of(
            values, n, c, (n < N) & (c < C), saved, weight, bias, parts, parts_per_image, channels_per_part
        )
        d = tl.where(mask, d, 0.0)
        if ACTIVATED:
            grad = tl.where(z > 0, grad, grad * slope)
        sum_g += grad
        sum_gd += grad * d
        if SUMS == 5:
            sum_gg += grad * grad
            sum_d += d
            sum_dd += d * d
    if EACH_IMAGE:
        to = rows_of_sums + ((row // n_blocks) * SUMS * N + n) * C + c
        stride = N * C
        inside = (n < N) & (c < C)
    else:
        to = rows_of_sums + row * SUMS * C + c
        stride = C
        inside = c < C
    tl.store(to, _sum(sum_g, EACH_IMAGE), mask=inside)
    tl.store(to + stride, _sum(sum_gd, EACH_IMAGE), mask=inside)
    if SUMS == 5:
        tl.store(to + 2 * stride, _sum(sum_gg, EACH_IMAGE), mask=inside)
        tl.store(to + 3 * stride, _sum(sum_d, EACH_IMAGE), mask=inside)
        tl.store(to + 4 * stride, _sum(sum_dd, EACH_IMAGE), mask=inside)


@triton.jit
def combine(
    g, x, out, saved, weight, bias, coefficients, factor, parts, parts_per_image, channels_per_part, slope, n_blocks,
    N, C, S,
    ACTIVATED: tl.constexpr, LAST: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Out = factor g weight inverse + q (x − mean) + r, with g before the activation; `coefficients` are q, then r."""
    n, c, places, mask = _tile(tl.program_id(0), n_blocks, N, C, S, LAST, BN, BC, BS)
    grad, values = _load(g, places, mask), _load(x, places, mask)
    inside = (n < N) & (c < C)
    d, z, scale, part = _affine_of(values, n, c, inside, saved, weight, bias, parts, parts_per_image, channels_per_part)
    if ACTIVATED:
        grad = tl.where(z > 0, grad, grad * slope)
    if factor is not None:
        grad *= tl.load(factor + n, mask=n < N, other=0.0)
    q = tl.load(coefficients + part, mask=inside, other=0.0)
    r = tl.load(coefficients + parts + part, mask=inside, other=0.0)
    tl.store(out + places, grad * scale + d * q + r, mask=mask)


@triton.jit
def activation_backward(y, g, out, slope, size, BLOCK: tl.constexpr):
    """What the activation lets through of g, where y is what it gave."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = _load(g, i, i < size)
    tl.store(out + i, tl.where(_load(y, i, i < size) > 0, grad, grad * slope), mask=i < size)


@triton.jit
def position_forward(
    x, y, weight, bias, saved, eps, N, C, S,
    CENTRED: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The norm of each position over its channels."""
    blocks = tl.cdiv(S, BS)
    n, c, places, mask = _tile_of_positions(tl.program_id(0), blocks, C, S, LAST, BC, BS)
    values = _load(x, places, mask)
    s = (tl.program_id(0) % blocks) * BS + tl.arange(0, BS)[None, :]
    mean = tl.zeros((1, BS), tl.float32)
    if CENTRED:
        mean = tl.sum(values, 0)[None, :] / C
    d = tl.where(mask, values - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(d * d, 0)[None, :] / C + eps)
    z = d * inverse * weight_or_one(weight, c, c < C)
    if bias is not None:
        z += tl.load(bias + c, mask=c < C, other=0.0)
    tl.store(y + places, z, mask=mask)
    tl.store(saved + n * S + s, mean, mask=s < S)
    tl.store(saved + (N + n) * S + s, inverse, mask=s < S)


@triton.jit
def position_backward(
    g, x, out, weight, saved, rows_of_sums, tiles, N, C, S,
    CENTRED: tl.constexpr, LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Its gradient; writes (row, 2, C), parts of those of weight and bias."""
    row, rows = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(S, BS)
    of_weight = tl.zeros((BC, BS), tl.float32)
    of_bias = tl.zeros((BC, BS), tl.float32)
    for t in range(row, tiles, rows):
        n, c, places, mask = _tile_of_positions(t, blocks, C, S, LAST, BC, BS)
        s = (t % blocks) * BS + tl.arange(0, BS)[None, :]
        mean = tl.load(saved + n * S + s, mask=s < S, other=0.0)
        inverse = tl.load(saved + (N + n) * S + s, mask=s < S, other=0.0)
        grad = _load(g, places, mask)
        x_hat = tl.where(mask, (_load(x, places, mask) - mean) * inverse, 0.0)
        of_weight += grad * x_hat
        of_bias += grad
        grad *= weight_or_one(weight, c, c < C)
        along = grad - x_hat * (tl.sum(grad * x_hat, 0)[None, :] / C)
        if CENTRED:
            along -= tl.sum(grad, 0)[None, :] / C
        tl.store(out + places, along * inverse, mask=mask)
    c = tl.arange(0, BC)
    tl.store(rows_of_sums + row * 2 * C + c, tl.sum(of_weight, 1), mask=c < C)
    tl.store(rows_of_sums + (row * 2 + 1) * C + c, tl.sum(of_bias, 1), mask=c < C)


@triton.jit
def _tile_of_positions(t, blocks, C, S, LAST: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr):
    """All channels of BS positions of an image: the image, the channels, places in memory, the mask."""
    n = (t // blocks).to(tl.int64)
    c = tl.arange(0, BC)[:, None]
    s = (t % blocks) * BS + tl.arange(0, BS)[None, :]
    if LAST:
        places = (n * S + s) * C + c
    else:
        places = (n * C + c) * S + s
    return n, c, places, (c < C) & (s < S)


# --- what is done once ------------------------------------------------------------------------------------------------


@triton.jit
def finish_moments(rows_of_parts, rows, mean_and_var, C, BR: tl.constexpr, BLOCK: tl.constexpr):
    """Mean and biased variance of each channel."""
    c = tl.arange(0, BLOCK)
    number, mean, squares = merged(rows_of_parts, rows, 3 * C, C, c, c < C, BR)
    tl.store(mean_and_var + c, mean, mask=c < C)
    tl.store(mean_and_var + C + c, squares / number, mask=c < C)


@triton.jit
def finish_batch(
    rows_of_parts, rows, saved, running_mean, running_var, num_batches, momentum, eps, C,
    BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and 1/√(var + eps) of each channel; enters the batch in the running statistics."""
    c = tl.arange(0, BLOCK)
    inside = c < C
    number, mean, squares = merged(rows_of_parts, rows, 3 * C, C, c, inside, BR)
    var = squares / number
    if running_mean is not None:
        finite = all_finite(mean) & all_finite(var)
        batches = tl.load(num_batches) + finite.to(tl.int64)
        share = tl.where(momentum < 0, 1.0 / batches.to(tl.float32), momentum)
        kept_mean = tl.load(running_mean + c, mask=inside, other=0.0)
        kept_var = tl.load(running_var + c, mask=inside, other=0.0)
        unbiased = squares / tl.maximum(number - 1, 1.0)
        tl.store(running_mean + c, tl.where(finite, lerp(kept_mean, mean, share), kept_mean), mask=inside)
        tl.store(running_var + c, tl.where(finite, lerp(kept_var, unbiased, share), kept_var), mask=inside)
        tl.store(num_batches, batches)
    tl.store(saved + c, mean, mask=inside)
    tl.store(saved + C + c, tl.rsqrt(var + eps), mask=inside)


@triton.jit
def finish_frozen(saved, mean, var, eps, C, BLOCK: tl.constexpr):
    """The mean and 1/√(var + eps) of statistics that are known."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(saved + c, tl.load(mean + c, mask=c < C), mask=c < C)
    tl.store(saved + C + c, tl.rsqrt(tl.load(var + c, mask=c < C, other=0.0) + eps), mask=c < C)


@triton.jit
def finish_group(
    rows_of_parts, rows, saved, parts, groups, eps, N, C, channels_per_part, BR: tl.constexpr, BLOCK: tl.constexpr
):
    """The mean and 1/√(var + eps) of one group of one image."""
    part = tl.program_id(0)
    of_part = rows_of_parts + (part // groups) * C + (part % groups) * channels_per_part
    c = tl.arange(0, BLOCK)
    inside = c < channels_per_part
    number, means, squares = merged(of_part, rows, 3 * N * C, N * C, c, inside, BR)
    count = tl.sum(tl.where(inside, number, 0.0), 0)
    pivot = tl.load(of_part + N * C)
    mean = pivot + tl.sum(tl.where(inside, number * (means - pivot), 0.0), 0) / count
    var = tl.sum(tl.where(inside, squares + number * (means - mean) * (means - mean), 0.0), 0) / count
    tl.store(saved + part, mean)
    tl.store(saved + parts + part, tl.rsqrt(var + eps))


@triton.jit
def _total(sums, rows, row_stride, c, inside, BR: tl.constexpr):
    """Of each channel `c`, over the rows."""
    total = tl.zeros(c.shape, tl.float32)
    for first in range(0, rows, BR):
        r = first + tl.arange(0, BR)[:, None]
        total += tl.sum(tl.load(sums + r * row_stride + c[None, :], mask=(r < rows) & inside[None, :], other=0.0), 0)
    return total


@triton.jit
def finish_batch_gradient(
    rows_of_sums, rows, saved, weight, weight_grad, bias_grad, coefficients, share_of_each, C,
    BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of weight and bias, and `combine`'s coefficients; `share_of_each`: the batch's, over its values."""
    c = tl.arange(0, BLOCK)
    inside = c < C
    inverse = tl.load(saved + C + c, mask=inside, other=0.0)
    of_bias = _total(rows_of_sums, rows, 2 * C, c, inside, BR)
    of_weight = _total(rows_of_sums + C, rows, 2 * C, c, inside, BR) * inverse
    part = -share_of_each * inverse * weight_or_one(weight, c, inside)
    tl.store(weight_grad + c, of_weight, mask=inside)
    tl.store(bias_grad + c, of_bias, mask=inside)
    tl.store(coefficients + c, part * inverse * of_weight, mask=inside)
    tl.store(coefficients + C + c, part * of_bias, mask=inside)


@triton.jit
def finish_group_gradient(
    rows_of_sums, rows, saved, weight, of_images, coefficients, parts, groups, N, C, S, channels_per_part,
    BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one group of one image: its part in the gradients of weight and bias, (2, N, C), and the coefficients."""
    part = tl.program_id(0)
    first = (part // groups) * C + (part % groups) * channels_per_part
    c = tl.arange(0, BLOCK)
    inside = c < channels_per_part
    inverse = tl.load(saved + parts + part)
    of_bias = _total(rows_of_sums + first, rows, 2 * N * C, c, inside, BR)
    of_weight = _total(rows_of_sums + N * C + first, rows, 2 * N * C, c, inside, BR) * inverse
    tl.store(of_images + first + c, of_weight, mask=inside)
    tl.store(of_images + N * C + first + c, of_bias, mask=inside)
    scale = weight_or_one(weight, (part % groups) * channels_per_part + c, inside) * inverse / (channels_per_part * S)
    tl.store(coefficients + part, -tl.sum(scale * of_weight, 0) * inverse)
    tl.store(coefficients + parts + part, -tl.sum(scale * of_bias, 0))

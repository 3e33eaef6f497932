"""What several kernels in Triton are made of."""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def lerp(start, end, share):
    return tl.where(share < 0.5, start + share * (end - start), end - (end - start) * (1 - share))


@triton.jit
def all_finite(values):
    return tl.min((tl.abs(values) < INFINITY).to(tl.int32), 0) == 1


@triton.jit
def weight_or_one(weight, c, mask):
    if weight is None:  # with an else: what stands after a return is compiled too
        of_channels = tl.full(c.shape, 1.0, tl.float32)
    else:
        of_channels = tl.load(weight + c, mask=mask, other=0.0)
    return of_channels


@triton.jit
def merged(parts_of, rows, row_stride, stride, c, inside, BR: tl.constexpr):
    """Number, mean and sum of squared distances of each channel `c`, from the rows that `moments` wrote."""
    pivot = tl.load(parts_of + stride + c, mask=inside, other=0.0)
    number = tl.zeros(c.shape, tl.float32)
    total = tl.zeros(c.shape, tl.float32)
    for first in range(0, rows, BR):
        r = first + tl.arange(0, BR)[:, None]
        at, mask = parts_of + r * row_stride + c[None, :], (r < rows) & inside[None, :]
        of_row = tl.load(at, mask=mask, other=0.0)
        number += tl.sum(of_row, 0)
        total += tl.sum(of_row * (tl.load(at + stride, mask=mask, other=0.0) - pivot[None, :]), 0)
    number = tl.maximum(number, 1.0)
    mean = pivot + total / number
    squares = tl.zeros(c.shape, tl.float32)
    for first in range(0, rows, BR):
        r = first + tl.arange(0, BR)[:, None]
        at, mask = parts_of + r * row_stride + c[None, :], (r < rows) & inside[None, :]
        distance = tl.load(at + stride, mask=mask, other=0.0) - mean[None, :]
        of_row = tl.load(at + 2 * stride, mask=mask, other=0.0)
        squares += tl.sum(tl.where(mask, of_row + tl.load(at, mask=mask, other=0.0) * distance * distance, 0.0), 0)
    return number, mean, squares

"""The kernels on a GPU: launches of those in `gpu_kernels`, by the names and with the arguments of those in `csrc`.

Nothing here waits for the GPU or asks it for a value, so a step can be recorded in a CUDA graph.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportReturnType=false
# A launch has other arguments than the function that Triton makes a kernel of.

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import gpu_kernels as kernels
from . import gpu_running, running

PROGRAMS = 512  # take a sum over a tensor, about: four for each multiprocessor of a large GPU
TILE = 2048  # values
WARPS = 8
WIDE, NARROW = 64, 16  # channels of a tile: of a pass, and of a sum, which then has fewer rows
AT_ONCE = 8192  # values that a program on its own, which finishes a sum, loads at once
WARPS_ALONE = 16  # of it


class Shape(NamedTuple):
    """A tensor's images, channels and space, and whether its channels are last in memory."""

    images: int
    channels: int
    space: int
    last: bool

    def merged(self) -> "Shape":
        """With all images as one where they lie in memory like it."""
        return Shape(1, self.channels, self.images * self.space, True) if self.last else self


class Plan(NamedTuple):
    """How the tiles of a tensor are handed out to programs.

    Attributes:
        sizes: of a tile: images, channels, space.
        blocks: of images of a tile's size.
        tiles: of all channels of a tile.
        columns: blocks of channels.
        rows: programs that share the tiles of a sum; for sums of whole images a multiple of `blocks`.
    """

    sizes: tuple[int, int, int]
    blocks: int
    tiles: int
    columns: int
    rows: int

    @classmethod
    def of(cls, shape: Shape, each_image: bool = False, tile: int | None = None, widest: int = WIDE) -> "Plan":
        """For sums over all images, or over each, in tiles of `tile` values, by default `TILE`.

        Where channels are last a tile has `widest` of them at most.
        """
        tile = tile or TILE
        images, channels, space = map(_power, shape[:3])
        if shape.last:
            of_channels = min(channels, widest)
            of_space = min(space, tile // of_channels)
        else:
            of_space = min(space, tile)
            of_channels = min(channels, max(1, 32 // of_space))  # so that neighbours in memory are read together
        of_images = min(images, tile // (of_channels * of_space))
        blocks = _parts(shape.images, of_images)
        tiles = blocks * _parts(shape.space, of_space)
        columns = _parts(shape.channels, of_channels)
        most = max(1, PROGRAMS // columns)
        whole = blocks if each_image else 1
        rows = whole * _shares(tiles // whole, most // whole)
        return cls((of_images, of_channels, of_space), blocks, tiles, columns, rows)

    def launch_all(self, kernel: Any, *arguments: Any, shape: Shape, **constants: Any) -> None:
        """A program for each tile."""
        self._launch((self.tiles, self.columns), kernel, *arguments, self.blocks, *shape[:3], shape.last, **constants)

    def launch_rows(self, kernel: Any, *arguments: Any, shape: Shape, **constants: Any) -> None:
        """A program for each row."""
        sizes = self.blocks, self.tiles, *shape[:3], shape.last
        self._launch((self.rows, self.columns), kernel, *arguments, *sizes, **constants)

    def _launch(self, grid, kernel, *arguments, **constants):
        *arguments, last = arguments
        images, channels, space = self.sizes
        warps = max(1, WARPS * images * channels * space // TILE)
        kernel[grid](*arguments, **constants, LAST=last, BN=images, BC=channels, BS=space, num_warps=warps)


class Parts(NamedTuple):
    """How the means and 1/√(var + eps) of a norm are counted: of each channel, or of each group of each image."""

    number: int
    per_image: int
    channels: int


def run(kernel: str, arguments: tuple[int, int, int, int, bool], tensors: tuple, *numbers: Any) -> Any:
    """The pass of this name."""
    x = tensors[0]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # on a CPU: Triton's interpreter
        return PASSES[kernel](Shape(*arguments[1:]), *tensors, *numbers)


def _channel_moments(shape: Shape, x: Tensor, mean_and_var: Tensor) -> None:
    _finish(kernels.finish_moments, shape.channels, _moments(shape, x), mean_and_var)


def _batch_forward(
    shape, x, y, weight, bias, saved, residual, running_mean, running_var, num_batches, slope, momentum, eps
):
    kept = running_mean, running_var, num_batches
    _finish(kernels.finish_batch, shape.channels, _moments(shape, x), saved, *kept, momentum, eps)
    _affine(shape, x, residual, y, saved, weight, bias, _of_channels(shape), slope)


def _batch_backward(shape, g, x, out, weight, bias, saved, weight_grad, bias_grad, slope, share):
    parts, merged = _of_channels(shape), shape.merged()
    norm = saved, weight, bias
    rows = _products(merged, g, x, norm, parts, slope, 2, each_image=False)
    coefficients = torch.empty_like(saved)
    to = saved, weight, weight_grad, bias_grad, coefficients
    share_of_each = share / (shape.images * shape.space)
    _finish(kernels.finish_batch_gradient, shape.channels, rows, *to, share_of_each)
    _combine(merged, g, x, out, norm, coefficients, None, parts, slope)


def _frozen_forward(shape, x, y, weight, bias, saved, residual, mean, var, slope, eps):
    grid = (_parts(shape.channels, 1024),)
    kernels.finish_frozen[grid](saved, mean, var, eps, shape.channels, BLOCK=1024)
    _affine(shape, x, residual, y, saved, weight, bias, _of_channels(shape), slope)


def _running_forward(
    shape, x, y, weight, bias, saved, residual, running_mean, running_var, num_batches_tracked, share, innovation,
    gradient_share, gradient_average, gradient_latest, slope, momentum, eps, recomputing,
):  # fmt: skip
    """Returns the share of this batch in the averages of the backward pass."""
    rate = saved.new_empty(())
    rows = saved[:0] if recomputing else _moments(shape, x)
    kept = running_mean, running_var, num_batches_tracked, share, innovation, gradient_share
    to = saved, weight, *kept, gradient_average, gradient_latest, rate, momentum, eps, shape.images
    constants = {"RECOMPUTING": recomputing, **running.CONSTANTS._asdict()}
    _finish(gpu_running.finish_running, shape.channels, rows, *to, **constants)
    _affine(shape, x, residual, y, saved, weight, bias, _of_channels(shape), slope)
    return rate


def _running_backward(
    shape, g, x, out, weight, bias, saved, weight_grad, bias_grad, *memory_and_numbers,
):  # fmt: skip
    *memory, slope, rate, step_bound, learns = memory_and_numbers
    parts, bounded = _of_channels(shape), learns and step_bound >= 0
    norm = saved, weight, bias
    rows = _products(shape, g, x, norm, parts, slope, 5, each_image=True)
    sums = rows.sum(0) if len(rows) > 1 else rows
    coefficients = torch.empty_like(saved)
    factor = saved.new_empty(shape.images) if bounded else None
    block = _power(shape.channels)
    gpu_running.finish_running_gradient[(1,)](
        sums, *norm, weight_grad, bias_grad, *memory, coefficients, factor, rate, step_bound,
        running.parameter_share(shape.images), *shape[:3],
        LEARNS=learns, BOUNDED=bounded, **running.CONSTANTS._asdict(),
        BN=min(_power(shape.images), max(1, AT_ONCE // block)), BLOCK=block, num_warps=WARPS_ALONE,
    )  # fmt: skip
    _combine(shape, g, x, out, norm, coefficients, factor, parts, slope)


def _activation_backward(shape, y, g, out, slope):
    grid = (_parts(y.numel(), TILE),)
    kernels.activation_backward[grid](y, g, out, slope, y.numel(), BLOCK=TILE, num_warps=WARPS)


def _group_forward(shape, x, y, weight, bias, saved, slope, groups, eps):
    parts = _of_groups(shape, groups)
    rows = _moments(shape, x, each_image=True)
    block, at_once = _block(parts.channels, len(rows))
    sizes = parts.number, groups, eps, shape.images, shape.channels, parts.channels
    kernels.finish_group[(parts.number,)](rows, len(rows), saved, *sizes, BR=at_once, BLOCK=block)
    _affine(shape, x, None, y, saved, weight, bias, parts, slope)


def _group_backward(shape, g, x, out, weight, bias, saved, weight_grad, bias_grad, slope, groups):
    parts = _of_groups(shape, groups)
    norm = saved, weight, bias
    rows = _products(shape, g, x, norm, parts, slope, 2, each_image=True)
    coefficients, of_images = torch.empty_like(saved), saved.new_empty(2, *shape[:2])
    block, at_once = _block(parts.channels, len(rows))
    to = saved, weight, of_images, coefficients, parts.number, groups, *shape[:3], parts.channels
    kernels.finish_group_gradient[(parts.number,)](rows, len(rows), *to, BR=at_once, BLOCK=block)
    torch.sum(of_images[0], 0, out=weight_grad)
    torch.sum(of_images[1], 0, out=bias_grad)
    _combine(shape, g, x, out, norm, coefficients, None, parts, slope)


def _position_forward(shape, x, y, weight, bias, saved, slope, centred, eps):
    sizes, tiles = _of_positions(shape)
    arguments = x, y, weight, bias, saved, eps, *shape[:3]
    kernels.position_forward[(tiles,)](*arguments, CENTRED=centred, LAST=shape.last, **sizes, num_warps=WARPS)


def _position_backward(shape, g, x, out, weight, bias, saved, weight_grad, bias_grad, slope, centred):
    sizes, tiles = _of_positions(shape)
    programs = min(tiles, PROGRAMS)
    rows = saved.new_empty(programs, 2, shape.channels)
    arguments = g, x, out, weight, saved, rows, tiles, *shape[:3]
    kernels.position_backward[(programs,)](*arguments, CENTRED=centred, LAST=shape.last, **sizes, num_warps=WARPS)
    torch.sum(rows[:, 0], 0, out=weight_grad)
    torch.sum(rows[:, 1], 0, out=bias_grad)


PASSES: dict[str, Callable[..., Any]] = {
    "channel_moments": _channel_moments,
    "batch_forward": _batch_forward,
    "batch_backward": _batch_backward,
    "frozen_forward": _frozen_forward,
    "running_forward": _running_forward,
    "running_backward": _running_backward,
    "activation_backward": _activation_backward,
    "group_forward": _group_forward,
    "group_backward": _group_backward,
    "position_forward": _position_forward,
    "position_backward": _position_backward,
}


def _moments(shape: Shape, x: Tensor, each_image: bool = False) -> Tensor:
    """Rows of numbers, means and sums of squared distances."""
    shape = shape if each_image else shape.merged()
    plan = Plan.of(shape, each_image, widest=NARROW)
    rows = _rows(shape, plan, x, 3, each_image)
    plan.launch_rows(kernels.moments, x, rows, shape=shape, EACH_IMAGE=each_image)
    return rows


def _products(shape, g, x, norm, parts, slope, sums, each_image) -> Tensor:
    """Rows of `sums` sums."""
    tile = TILE if sums == 2 else TILE // 2  # each sum of each value has its register
    plan = Plan.of(shape, each_image, tile, NARROW)
    rows = _rows(shape, plan, x, sums, each_image)
    constants = {"SUMS": sums, "ACTIVATED": slope != 1, "EACH_IMAGE": each_image}
    plan.launch_rows(kernels.products, g, x, *norm, rows, *parts, slope, shape=shape, **constants)
    return rows


def _rows(shape: Shape, plan: Plan, x: Tensor, sums: int, each_image: bool) -> Tensor:
    rows, images = (plan.rows // plan.blocks, shape.images) if each_image else (plan.rows, 1)
    return x.new_empty(rows, sums, images, shape.channels, dtype=torch.float32)


def _finish(kernel: Any, channels: int, rows: Tensor, *arguments: Any, **constants: Any) -> None:
    block, at_once = _block(channels, len(rows))
    arguments = rows, len(rows), *arguments, channels
    kernel[(1,)](*arguments, **constants, BR=at_once, BLOCK=block, num_warps=WARPS_ALONE)


def _affine(shape, x, residual, y, saved, weight, bias, parts, slope):
    shape = shape.merged() if parts.per_image == 0 else shape
    arguments = x, residual, y, saved, weight, bias, *parts, slope
    Plan.of(shape).launch_all(kernels.affine, *arguments, shape=shape, ACTIVATED=slope != 1)


def _combine(shape, g, x, out, norm, coefficients, factor, parts, slope):
    arguments = g, x, out, *norm, coefficients, factor, *parts, slope
    Plan.of(shape).launch_all(kernels.combine, *arguments, shape=shape, ACTIVATED=slope != 1)


def _of_channels(shape: Shape) -> Parts:
    return Parts(shape.channels, 0, 1)


def _of_groups(shape: Shape, groups: int) -> Parts:
    return Parts(shape.images * groups, groups, shape.channels // groups)


def _of_positions(shape: Shape) -> tuple[dict[str, int], int]:
    channels = _power(shape.channels)
    space = min(_power(shape.space), 64, max(1, TILE // channels))
    return {"BC": channels, "BS": space}, shape.images * _parts(shape.space, space)


def _block(channels: int, rows: int) -> tuple[int, int]:
    block = _power(channels)
    return block, min(_power(rows), max(1, AT_ONCE // block))


def _shares(tiles: int, most: int) -> int:
    """Over how many programs, `most` at most, tiles are spread evenly."""
    return _parts(tiles, _parts(tiles, max(1, most)))


def _power(n: int) -> int:
    """The least power of 2 that is no less; Triton's own takes ten times as long."""
    return 1 << max(n - 1, 0).bit_length()


def _parts(n: int, size: int) -> int:
    return -(-n // size)

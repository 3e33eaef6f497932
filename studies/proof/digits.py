"""Scenes of many MNIST digits: where are they, or where are the round ones? Every digit and image has its contrast."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from segmentation import (
    Pair,
    dice_elsewhere,
    dice_here,
    loss,
    make_dynunet,
    make_segresnet,
    make_unet,
    samples,
    standardise,
)
from torch import Tensor, nn
from torch.nn.functional import interpolate

from normlab.data import load_dataset

__all__ = ["dice_elsewhere", "dice_here", "loss"]  # plans name them here

SIDE = 64  # pixels
ROUND, FEW = (0, 6, 8), 6  # the digits to be told from others, of fewer in an image
TRAIN, VALID = 320, 64  # images; as many more of the other scanner
VALID_SEED = 2**31  # no plan has it


def make_model(norm: str) -> nn.Module:
    """The U-Net."""
    return make_unet(2, norm)


def make_residual(norm: str) -> nn.Module:
    """The SegResNet."""
    return make_segresnet(2, norm)


def make_dynamic(norm: str) -> nn.Module:
    """The DynUNet."""
    return make_dynunet(2, norm)


def make_raw(seed: int) -> Pair:
    """Images as the scanner gives them. Every seed trains on scenes of its own; all are judged on the same ones."""
    return make_scenes(seed, TRAIN, VALID, raw=True)


def make_standardised(seed: int) -> Pair:
    """The same images, each with mean 0 and deviation 1."""
    return make_scenes(seed, TRAIN, VALID, raw=False)


def make_round(seed: int) -> Pair:
    """Standardised images of fewer digits, where only 0, 6 and 8 are the object: their shape tells, not their light."""
    return make_scenes(seed, TRAIN, VALID, raw=False, wanted=ROUND, many=FEW)


def make_scenes(
    seed: int, train: int, valid: int, raw: bool, wanted: Sequence[int] = range(10), many: int = 10
) -> Pair:
    """Scenes to train on, and of each scanner scenes to validate; the digits of one are never in the other.

    Args:
        seed: of the scenes to train on.
        train: how many of them.
        valid: how many to validate, of each scanner.
        raw: whether gain and offset of an image are left as they are.
        wanted: the digits that are the object.
        many: digits of an image.
    """
    train_digits, valid_digits = digits()
    scenes, objects = draw(*train_digits, train, seed, wanted, many)
    valid_scenes, valid_objects = draw(*valid_digits, 2 * valid, VALID_SEED, wanted, many)
    elsewhere = torch.arange(2 * valid) >= valid
    images = scan(scenes, False, seed)
    valid_images = torch.cat([scan(valid_scenes[:valid], False, VALID_SEED), scan(valid_scenes[valid:], True, seed=1)])
    if not raw:
        images, valid_images = standardise(images), standardise(valid_images)
    return samples(images, objects), samples(valid_images, valid_objects, elsewhere)


def draw(pool: Tensor, kinds: Tensor, n: int, seed: int, wanted: Sequence[int], many: int) -> tuple[Tensor, Tensor]:
    """`n` scenes in 0 to 1 on a dark ground, and where a wanted digit is, both (n, SIDE, SIDE).

    A digit is 16 to 28 pixels wide. Its contrast is 0.2 to 1.
    """
    random = torch.Generator().manual_seed(seed)
    scenes, objects = torch.zeros(n, SIDE, SIDE), torch.zeros(n, SIDE, SIDE, dtype=torch.bool)
    chosen = torch.randint(len(pool), (n, many), generator=random)
    for scene, where, own in zip(scenes, objects, chosen, strict=True):
        for digit, kind in zip(pool[own], kinds[own].tolist(), strict=True):
            size = int(torch.randint(16, 29, (), generator=random))
            top, left = torch.randint(SIDE - size + 1, (2,), generator=random).tolist()
            contrast = uniform(random, 0.2, 1.0)
            drawn = interpolate(digit[None, None], size=(size, size), mode="bilinear")[0, 0]
            place = (slice(top, top + size), slice(left, left + size))
            scene[place] = torch.maximum(scene[place], contrast * drawn)
            if kind in wanted:
                where[place] |= drawn > 0.4
    return scenes, objects


def scan(scenes: Tensor, elsewhere: bool, seed: int) -> Tensor:
    """The scenes as a scanner shows them: noise, and in each image a gain and an offset of its own.

    The other scanner has more of all three, and shows dark things darker.
    """
    random = torch.Generator().manual_seed(seed)
    n = (len(scenes), 1, 1)
    gain = uniform(random, 1.5, 2.5, n) if elsewhere else uniform(random, 0.5, 1.5, n)
    offset = uniform(random, 0.5, 1.0, n) if elsewhere else uniform(random, -0.5, 0.5, n)
    noise = (0.25 if elsewhere else 0.2) * torch.randn(scenes.shape, generator=random)
    return gain * ((scenes**1.5 if elsewhere else scenes) + noise) + offset


def uniform(random: torch.Generator, low: float, high: float, size: tuple[int, ...] = ()) -> Tensor:
    """Numbers from `low` to `high`."""
    return low + (high - low) * torch.rand(size, generator=random)


@lru_cache(maxsize=1)
def digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """MNIST's digits for training and for validation, each (N, 28, 28), and which they are, (N,)."""
    data = load_dataset("mnist")
    return (data.x_train[:, 0], data.y_train), (data.x_valid[:, 0], data.y_valid)

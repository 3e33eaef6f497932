"""Scenes of many MNIST digits: where are they? Every digit and every image has a contrast of its own."""

from functools import lru_cache

import torch
from segmentation import dice_elsewhere, dice_here, loss, make_dynunet, make_segresnet, make_unet, samples, standardise
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

from normlab.data import load_dataset

__all__ = ["dice_elsewhere", "dice_here", "loss"]  # plans name them here

SIDE, DIGITS = 64, 10  # pixels, and digits of an image
TRAIN, VALID = 320, 64  # images; as many more of the other scanner
VALID_SEED = 2**31  # no plan has it
Pair = tuple[TensorDataset, TensorDataset]


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


def make_scenes(seed: int, train: int, valid: int, raw: bool) -> Pair:
    """So many scenes to train on, and so many of each scanner to validate; digits of one are never in the other."""
    train_digits, valid_digits = digits()
    scenes, objects = draw(train_digits, train, seed)
    valid_scenes, valid_objects = draw(valid_digits, 2 * valid, VALID_SEED)
    elsewhere = torch.arange(2 * valid) >= valid
    images = scan(scenes, False, seed)
    valid_images = torch.cat([scan(valid_scenes[:valid], False, VALID_SEED), scan(valid_scenes[valid:], True, seed=1)])
    if not raw:
        images, valid_images = standardise(images), standardise(valid_images)
    return samples(images, objects), samples(valid_images, valid_objects, elsewhere)


def draw(pool: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """`n` scenes in 0 to 1 on a dark ground, and where a digit is, both (n, SIDE, SIDE).

    A digit is 16 to 28 pixels wide. Its contrast is 0.2 to 1.
    """
    random = torch.Generator().manual_seed(seed)
    scenes, objects = torch.zeros(n, SIDE, SIDE), torch.zeros(n, SIDE, SIDE, dtype=torch.bool)
    chosen = pool[torch.randint(len(pool), (n, DIGITS), generator=random)]
    for scene, where, own in zip(scenes, objects, chosen, strict=True):
        for digit in own:
            size = int(torch.randint(16, 29, (), generator=random))
            top, left = torch.randint(SIDE - size + 1, (2,), generator=random).tolist()
            contrast = uniform(random, 0.2, 1.0)
            drawn = interpolate(digit[None, None], size=(size, size), mode="bilinear")[0, 0]
            place = (slice(top, top + size), slice(left, left + size))
            scene[place] = torch.maximum(scene[place], contrast * drawn)
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
def digits() -> tuple[Tensor, Tensor]:
    """MNIST's digits for training and for validation, (N, 28, 28)."""
    data = load_dataset("mnist")
    return data.x_train[:, 0], data.x_valid[:, 0]

"""Cells under a microscope: where are their nuclei?

The frames of ndev-sampledata show one scratch that cells close. Its first frames train, its last ones judge. The other
site is the image of stardist. Both show nuclei that were stained.
"""

import io
import zipfile
from functools import lru_cache

import numpy as np
import torch
from packages import open_wheel
from segmentation import Pair, dice_elsewhere, dice_here, loss, make_dynunet, make_pair, make_segresnet, make_unet
from torch import Tensor, nn

__all__ = ["dice_elsewhere", "dice_here", "loss"]  # plans name them here

SIDE = 64  # pixels of a tile
TRAIN_FRAMES, VALID_FRAMES = slice(0, 6), slice(7, 10)  # of ten; the seventh is left out, between them
STAINED, NUCLEI = 0, 2  # channels
FEWEST = 40  # pixels of nuclei in a tile
NDEV = (
    "ndev-sampledata==0.0.3",
    "ndev_sampledata-0.0.3-py3-none-any.whl",
    "e9e30806bd154c3919cc1744e01124ad978fa974f72ddf5f7f0a0bd74d840355",
)
STARDIST = (
    "stardist==0.9.2",
    "stardist-0.9.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023",
)


def make_model(norm: str) -> nn.Module:
    """The U-Net."""
    return make_unet(2, norm)


def make_residual(norm: str) -> nn.Module:
    """The SegResNet."""
    return make_segresnet(2, norm)


def make_dynamic(norm: str) -> nn.Module:
    """The DynUNet."""
    return make_dynunet(2, norm)


def make_raw() -> Pair:
    """Tiles as they are, in units of the training tiles' deviation."""
    return make_tiles(*load(), raw=True)


def make_standardised() -> Pair:
    """Each tile with mean 0 and deviation 1."""
    return make_tiles(*load(), raw=False)


def make_tiles(frames: Tensor, nuclei: Tensor, image: Tensor, image_nuclei: Tensor, raw: bool) -> Pair:
    """The tiles of the first frames, and those of the last ones and of another site's image.

    Args:
        frames: ten, (10, H, W).
        nuclei: where nuclei are in them.
        image: of the other site, (H, W).
        image_nuclei: where nuclei are in it.
        raw: whether tiles are left as they are, but for one factor and one offset.
    """
    train, here = (cut(frames[part], nuclei[part]) for part in (TRAIN_FRAMES, VALID_FRAMES))
    return make_pair(train, here, cut(image[None], image_nuclei[None]), raw)


def cut(frames: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles that do not overlap, (N, SIDE, SIDE), of frames (T, H, W); those with hardly a nucleus are left out."""
    tiles, where = (
        part.unfold(1, SIDE, SIDE).unfold(2, SIDE, SIDE).reshape(-1, SIDE, SIDE) for part in (frames, objects)
    )
    kept = where.sum((1, 2)) >= FEWEST
    return tiles[kept], where[kept]


@lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `make_tiles` takes: the frames and the image of the two packages, and where nuclei are."""
    ndev, stardist = open_wheel(*NDEV), open_wheel(*STARDIST)
    assay = read(ndev, "ndev_sampledata/samples/scratch-assay-labeled-10T-2Ch.tiff")
    image, mask = (read(stardist, f"stardist/data/images/{name}.tif") for name in ("img2d", "mask2d"))
    return assay[STAINED], assay[NUCLEI] > 0, image, mask > 0


def read(wheel: zipfile.ZipFile, file: str) -> Tensor:
    """A TIFF file of a wheel, as float32."""
    import tifffile

    return torch.from_numpy(tifffile.imread(io.BytesIO(wheel.read(file))).astype(np.float32))

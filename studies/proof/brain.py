"""A head in three dimensions: where is the brain?

The left half of Colin's head trains, its right half judges. The other site is a macaque's brain, whose image has no
skull. All are of mricron-data.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from packages import open_debian
from segmentation import Pair, dice_elsewhere, dice_here, loss, make_dynunet, make_pair, make_segresnet, make_unet
from torch import Tensor, nn

__all__ = ["dice_elsewhere", "dice_here", "loss"]  # plans name them here

SIDE, STEP = 32, 12  # voxels of a patch, and from one patch that trains to the next
FEWEST, MOST = 0.05, 0.95  # share of the brain in a patch
HEAD, BRAIN, MACAQUE = "ch2", "ch2bet", "inia19-t1-brain"
MRICRON = (
    "mricron-data=1.2.20211006+dfsg-4",
    "mricron-data_1.2.20211006+dfsg-4_all.deb",
    "d40aa0ed66cf89bf6cafa049ad3884703c9d975c2ee2737525b7196528df9d6f",
)


def make_model(norm: str) -> nn.Module:
    """The U-Net."""
    return make_unet(3, norm)


def make_residual(norm: str) -> nn.Module:
    """The SegResNet."""
    return make_segresnet(3, norm)


def make_dynamic(norm: str) -> nn.Module:
    """The DynUNet."""
    return make_dynunet(3, norm)


def make_raw() -> Pair:
    """Patches as they are, in units of the training patches' deviation."""
    return make_patches(*load(), raw=True)


def make_standardised() -> Pair:
    """Each patch with mean 0 and deviation 1."""
    return make_patches(*load(), raw=False)


def make_patches(head: Tensor, brain: Tensor, macaque: Tensor, raw: bool) -> Pair:
    """Patches of the left half, and those of the right half and of the macaque.

    Args:
        head: (X, Y, Z), from left to right, as coarse as the task has it.
        brain: where the brain is in it.
        macaque: a brain without its skull, 0 around it.
        raw: whether patches are left as they are, but for one factor and one offset.
    """
    middle = len(head) // 2
    train = cut(head[:middle], brain[:middle], STEP)
    here = cut(head[middle:], brain[middle:], SIDE // 2)
    return make_pair(train, here, cut(macaque, macaque > 0, SIDE), raw)


def cut(volume: Tensor, objects: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Patches (N, SIDE, SIDE, SIDE) with some of the object and some of what is around it."""
    patches, where = (windows(part, step) for part in (volume, objects))
    share = where.float().mean((1, 2, 3))
    kept = (share >= FEWEST) & (share <= MOST)
    return patches[kept], where[kept]


def windows(volume: Tensor, step: int) -> Tensor:
    """All patches whose corners are `step` voxels apart."""
    for dim in range(3):
        volume = volume.unfold(dim, SIDE, step)
    return volume.reshape(-1, SIDE, SIDE, SIDE)


@lru_cache(maxsize=1)
def load() -> tuple[Tensor, Tensor, Tensor]:
    """What `make_patches` takes: head and brain at 2 mm, the macaque at 1 mm."""
    folder = open_debian(*MRICRON) / "usr" / "share" / "mricron" / "templates"
    head, brain, macaque = (read(folder / f"{name}.nii.gz") for name in (HEAD, BRAIN, MACAQUE))
    return head, brain > 0, macaque


def read(path: Path) -> Tensor:
    """A NIfTI file as float32, at every second voxel in each direction."""
    import nibabel

    return torch.from_numpy(np.asarray(nibabel.load(path).dataobj, dtype=np.float32)[::2, ::2, ::2].copy())

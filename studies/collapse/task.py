"""The tasks: nets of MONAI in which `running` collapsed with AdamW find objects in images that are made up."""

import numpy as np
import torch
from monai.data import Dataset, create_test_image_2d, create_test_image_3d
from monai.losses import DiceCELoss
from monai.networks.nets import SegResNet, VNet
from torch import Tensor, nn

from normlab.integrations import register_monai

TRAIN, VALID, CLASSES = 160, 48, 3
register_monai()


def make_segresnet(norm: str) -> nn.Module:
    """A SegResNet in 2-D with the norm of this name."""
    return SegResNet(2, init_filters=8, in_channels=1, out_channels=CLASSES, norm=f"normlab_{norm}")


def make_segresnet_3d(norm: str) -> nn.Module:
    """A small SegResNet in 3-D with the norm of this name."""
    sizes = {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
    return SegResNet(3, init_filters=8, in_channels=1, out_channels=CLASSES, norm=f"normlab_{norm}", **sizes)


def make_vnet() -> nn.Module:
    """A VNet in 2-D. It has batch norms, and no argument for others: the study converts them."""
    return VNet(spatial_dims=2, in_channels=1, out_channels=CLASSES, dropout_prob_down=0.0, dropout_prob_up=(0.0, 0.0))


def make_standardised() -> tuple[Dataset, Dataset]:
    """Each image has mean 0 and deviation 1."""
    return make_images(TRAIN, seed=0), make_images(VALID, seed=1)


def make_raw() -> tuple[Dataset, Dataset]:
    """Each image has a contrast and a brightness of its own."""
    return make_images(TRAIN, seed=0, raw=True), make_images(VALID, seed=1, raw=True)


def make_standardised_3d() -> tuple[Dataset, Dataset]:
    return make_images(64, seed=0, dims=3), make_images(16, seed=1, dims=3)


def make_raw_3d() -> tuple[Dataset, Dataset]:
    return make_images(64, seed=0, dims=3, raw=True), make_images(16, seed=1, dims=3, raw=True)


def make_images(n: int, seed: int, dims: int = 2, raw: bool = False) -> Dataset:
    """Samples with an image and a label of two kinds of objects: (1, 64, 64), or (1, 32, 32, 32)."""
    random = np.random.RandomState(seed)
    samples = []
    for _ in range(n):
        options = {"num_seg_classes": CLASSES - 1, "noise_max": 0.5, "random_state": random}
        if dims == 2:
            image, label = create_test_image_2d(64, 64, num_objs=8, rad_max=10, **options)
        else:
            image, label = create_test_image_3d(32, 32, 32, num_objs=6, rad_max=7, rad_min=3, **options)
        gain, offset = random.uniform(0.6, 1.4), random.uniform(-0.4, 0.4)
        image = image * gain + offset if raw else (image - image.mean()) / image.std()
        samples.append({"image": image[None].astype("float32"), "label": label[None].astype("int64")})
    return Dataset(samples)


def loss(output: Tensor, label: Tensor) -> Tensor:
    """The sum of Dice loss and cross entropy."""
    return DiceCELoss(softmax=True, to_onehot_y=True)(output, label)


def dice(output: Tensor, label: Tensor) -> Tensor:
    """The mean over images and both kinds of objects; a kind that is neither there nor found counts as 1."""
    found = output.argmax(1, keepdim=True)
    scores = []
    for kind in range(1, CLASSES):
        mine, theirs = (part.eq(kind).flatten(1).sum(1) for part in (found, label))
        both = (found.eq(kind) & label.eq(kind)).flatten(1).sum(1)
        scores.append(torch.where(mine + theirs > 0, 2 * both / (mine + theirs).clamp(min=1), 1.0))
    return torch.stack(scores).mean()

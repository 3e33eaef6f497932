"""A study of your own net and data: MONAI's U-Net, batches of dicts, five norms, batches of one and two images.

    normlab study run examples/study_monai.toml --out runs/study_monai

`study_monai.toml` names the functions of this file. The images are made up. Put your own net in `make_model`, and your
own data sets in `make_data`.
"""

import numpy as np
from monai.data import Dataset, create_test_image_2d
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import nn

from normlab.integrations import register_monai

register_monai()  # MONAI knows every norm of normlab as "normlab_…"


def make_model(norm: str) -> nn.Module:
    """A U-Net with the norm of this name. A function without `norm` is converted, see `normlab.convert`."""
    return UNet(2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2), norm=f"normlab_{norm}")


def make_data() -> tuple[Dataset, Dataset]:
    """Samples to train with and to judge by. The study makes batches of them, in an order that the seed says."""
    return make_images(64, seed=0), make_images(32, seed=1)


def make_raw_data() -> tuple[Dataset, Dataset]:
    """The same with a contrast and a brightness of its own for each image, as if scanners differed."""
    return make_images(64, seed=0, raw=True), make_images(32, seed=1, raw=True)


def make_images(n: int, seed: int, raw: bool = False) -> Dataset:
    """Samples with an image (1, 48, 48) of mean 0 and deviation 1, unless it is raw, and its label."""
    random = np.random.RandomState(seed)
    samples = []
    for _ in range(n):
        image, label = create_test_image_2d(48, 48, num_objs=5, rad_max=10, random_state=random)
        image = (image - image.mean()) / image.std()
        gain, offset = random.uniform(0.5, 2.0), random.uniform(-1.0, 1.0)
        image = image * gain + offset if raw else image
        samples.append({"image": image[None].astype("float32"), "label": (label > 0)[None].astype("int64")})
    return Dataset(samples)


def loss(output, label):
    """The sum of Dice loss and cross entropy."""
    return DiceCELoss(sigmoid=True)(output, label)

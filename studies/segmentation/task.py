"""The task: a small U-Net of MONAI's finds objects in images that are made up, standardised or raw.

`python studies/segmentation/task.py` trains the network that is fine-tuned, and writes pretrained.safetensors.
"""

from pathlib import Path

import numpy as np
import torch
from monai.data import DataLoader, Dataset, create_test_image_2d
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import nn

from normlab.integrations import register_monai
from normlab.study.weights import load_weights, save_weights
from normlab.training import Learner, Metrics, dice

SIDE, TRAIN, FEW, VALID = 64, 96, 32, 64
WEIGHTS = Path(__file__).parent / "pretrained.safetensors"
register_monai()


def make_model(norm: str) -> nn.Module:
    """A U-Net with the norm of this name."""
    return make_unet(f"normlab_{norm}")


def make_pretrained() -> nn.Module:
    """A U-Net with batch norm that was trained on standardised images at batch 16. The study converts its norms."""
    net = make_unet("batch")
    load_weights(net, WEIGHTS)
    return net


def make_unet(norm: str) -> nn.Module:
    return UNet(2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2), norm=norm)


def make_volume_model(norm: str) -> nn.Module:
    """A U-Net in 3-D, for the volumes of studies/collapse."""
    return UNet(3, 1, 3, channels=(8, 16, 32), strides=(2, 2), norm=f"normlab_{norm}")


def make_standardised() -> tuple[Dataset, Dataset]:
    """Each image has mean 0 and deviation 1, as MONAI's `NormalizeIntensity` makes it."""
    return make_images(TRAIN, seed=0), make_images(VALID, seed=1)


def make_raw() -> tuple[Dataset, Dataset]:
    """Each image has a contrast and a brightness of its own, as if scanners differed."""
    return make_images(TRAIN, seed=0, raw=True), make_images(VALID, seed=1, raw=True)


def make_few_raw() -> tuple[Dataset, Dataset]:
    """A third of the raw images to train with."""
    return make_images(FEW, seed=0, raw=True), make_images(VALID, seed=1, raw=True)


def make_images(n: int, seed: int, raw: bool = False) -> Dataset:
    """Samples with an image and a label, both (1, 64, 64); each image has a noise of its own, up to 0.5."""
    random = np.random.RandomState(seed)
    samples = []
    for _ in range(n):
        image, label = create_test_image_2d(SIDE, SIDE, num_objs=8, rad_max=10, noise_max=0.5, random_state=random)
        gain, offset = random.uniform(0.6, 1.4), random.uniform(-0.4, 0.4)
        image = image * gain + offset if raw else (image - image.mean()) / image.std()
        samples.append({"image": image[None].astype("float32"), "label": (label > 0)[None].astype("int64")})
    return Dataset(samples)


def loss(output, label):
    """The sum of Dice loss and cross entropy."""
    return DiceCELoss(sigmoid=True)(output, label)


def pretrain() -> None:
    """Train on 256 images that no study sees, at batch 16, and write the weights."""
    torch.manual_seed(0)
    net = make_unet("batch")
    batches = DataLoader(make_images(256, seed=2), batch_size=16, shuffle=True)
    adamw = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.01)
    valid = DataLoader(make_images(VALID, seed=1), batch_size=16)
    learner = Learner(net, batches, valid, loss_func=loss, optimizer=adamw, callbacks=[Metrics(dice=dice)])
    print(f"Dice {learner.fit(12)[-1]['valid']['dice']:.4f} on images held out")
    save_weights(net, WEIGHTS, "studies/segmentation/task.py")


if __name__ == "__main__":
    pretrain()

"""A U-Net of MONAI's at batch 2: which norm? Runs in two minutes on a CPU.

    python examples/segment.py

The images are made up, each with a contrast of its own, as if scanners differed. Put your own data in `make_images`,
and your own net in `make_net`.
"""

import numpy as np
import torch
from monai.data.synthetic import create_test_image_2d
from monai.losses import DiceCELoss
from monai.networks.nets import UNet
from torch import Tensor

import normlab

NORMS = ("batch", "running", "group", "instance")
EPOCHS, BATCH = 6, 2


def make_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 64, 64) and labels of the same shape."""
    numbers = np.random.RandomState(seed)
    pairs = [create_test_image_2d(64, 64, num_objs=5, rad_max=12, random_state=numbers) for _ in range(n)]
    images, labels = (torch.tensor(np.stack(parts), dtype=torch.float32)[:, None] for parts in zip(*pairs, strict=True))
    contrast = torch.tensor(numbers.uniform([0.6, -0.4], [1.4, 0.4], (n, 2)), dtype=torch.float32)
    return images * contrast[:, :1, None, None] + contrast[:, 1:, None, None], (labels > 0).float()


def make_net(norm: str) -> torch.nn.Module:
    """A fresh U-Net, its batch norms replaced by the norm of this name."""
    torch.manual_seed(0)
    net = UNet(2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2), norm="batch")
    return normlab.convert(net, norm).model


def dice(net: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    """Twice the overlap over the sum of both areas, the mean of all images."""
    net.eval()
    with torch.no_grad():
        found = (net(images) > 0).float()
    overlap, area = (found * labels).sum((1, 2, 3)), (found + labels).sum((1, 2, 3))
    return (2 * overlap / area.clamp(min=1)).mean().item()


def train(net: torch.nn.Module, images: Tensor, labels: Tensor) -> None:
    """AdamW with a rate that falls to 0."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    steps = EPOCHS * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9)
    loss = DiceCELoss(sigmoid=True)
    for _ in range(EPOCHS):
        for index in torch.randperm(len(images)).split(BATCH):
            net.train()
            optimizer.zero_grad()
            loss(net(images[index]), labels[index]).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def main() -> None:
    images, labels = make_images(80, seed=0)
    held_out = make_images(32, seed=1)
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    for norm in NORMS:
        net = make_net(norm)
        train(net, images, labels)
        print(f"{norm:10}Dice {dice(net, *held_out):.3f} on held-out images", flush=True)
        if norm == "batch":
            print(normlab.diagnose(net, batches, loss=DiceCELoss(sigmoid=True)))


if __name__ == "__main__":
    main()

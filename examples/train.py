"""A U-Net of MONAI's on dict batches: AdamW, bfloat16, a moving average of the weights, Dice. A minute on a CPU."""

import numpy as np
import torch
from monai.data import DataLoader, Dataset, create_test_image_2d
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

from normlab.training import EMA, Checkpoint, Distributed, Learner, Metrics, ShowProgress, dice


def made_up(n: int, seed: int) -> Dataset:
    random = np.random.RandomState(seed)
    pairs = [create_test_image_2d(64, 64, num_objs=5, rad_max=12, random_state=random) for _ in range(n)]
    return Dataset([{"image": image[None], "label": (label > 0)[None].astype(int)} for image, label in pairs])


torch.manual_seed(0)
net = UNet(2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2), norm="batch")
train = DataLoader(made_up(80, seed=0), batch_size=2, shuffle=True)
valid = DataLoader(made_up(32, seed=1), batch_size=4)
loss = DiceCELoss(sigmoid=True)
adamw = torch.optim.AdamW(net.parameters(), lr=3e-3)
checkpoint = Checkpoint("run/last.ckpt", seconds=60)
callbacks = [Distributed(), Metrics(dice=dice), EMA(0.98), ShowProgress(), checkpoint]
learner = Learner(net, train, valid, loss_func=loss, optimizer=adamw, precision="bfloat16", callbacks=callbacks)
checkpoint.resume(learner)  # goes on after a crash, or if it is called again
learner.fit(6)

"""A U-Net of MONAI's on dict batches: AdamW, bfloat16, a moving average of the weights, Dice. A minute on a CPU.

python examples/train.py
"""

import numpy as np
import torch
from monai.data import DataLoader, Dataset, create_test_image_2d
from monai.losses import DiceCELoss
from monai.networks.nets import UNet

from normlab.training import (
    EMA,
    Checkpoint,
    Distributed,
    Learner,
    Metrics,
    ScheduleParameter,
    ShowProgress,
    dice,
    schedules,
)


def made_up(n: int, seed: int) -> Dataset:
    numbers = np.random.RandomState(seed)
    pairs = [create_test_image_2d(64, 64, num_objs=5, rad_max=12, random_state=numbers) for _ in range(n)]
    return Dataset([{"image": image[None], "label": (label > 0)[None].astype(int)} for image, label in pairs])


torch.manual_seed(0)
net = UNet(2, in_channels=1, out_channels=1, channels=(8, 16, 32), strides=(2, 2), norm="batch")
checkpoint = Checkpoint("run/last.ckpt", seconds=60)
learner = Learner(
    net,
    DataLoader(made_up(80, seed=0), batch_size=2, shuffle=True),
    DataLoader(made_up(32, seed=1), batch_size=4),
    loss_func=DiceCELoss(sigmoid=True),
    optimizer=torch.optim.AdamW(net.parameters(), lr=3e-3),
    precision="bfloat16",
    callbacks=[
        Distributed(),
        Metrics(dice=dice),
        EMA(0.98),
        ScheduleParameter("lr", schedules.cosine(3e-3, 0.0)),
        ShowProgress(),
        checkpoint,
    ],
)
checkpoint.resume(learner)  # goes on after a crash
learner.fit(6)

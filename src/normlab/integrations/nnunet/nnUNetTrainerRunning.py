"""nnU-Net's trainer with running batch norm. nnU-Net looks for its trainers by name in files of a folder, such as this.

    export nnUNet_extTrainer=$(python -c "from normlab.integrations import NNUNET; print(NNUNET)")
    nnUNetv2_train 4 3d_fullres 0 -tr nnUNetTrainerRunning

The variable is needed for predictions too. For another norm, copy the file into a folder of your own, and change the
names of class and norm.
"""

import functools
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer  # pyright: ignore[reportMissingImports]
from torch import nn

from normlab.surgery import convert


class nnUNetTrainerRunning(nnUNetTrainer):
    """The net of the plans, with running batch norm in the place of its norms. All else is nnU-Net's.

    With several processes each has its own statistics: nnU-Net's `convert_sync_batchnorm` leaves this norm alone.
    """

    @staticmethod
    @functools.wraps(nnUNetTrainer.build_network_architecture)  # its arguments changed in version 2.8
    def build_network_architecture(*args: Any, **kwargs: Any) -> nn.Module:
        net = nnUNetTrainer.build_network_architecture(*args, **kwargs)
        return convert(net, "running", inplace=True).model

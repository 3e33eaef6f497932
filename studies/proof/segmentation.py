"""What the tasks of segmentation share: MONAI's networks, loss and metrics, images as they are or standardised.

A label has two channels: the object, and the site. The site is 1 throughout an image that another scanner took.
"""

import torch
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from normlab.integrations import register_monai
from normlab.training import dice

Pair = tuple[TensorDataset, TensorDataset]
Cuts = tuple[Tensor, Tensor]  # images (N, *space), and where the object is in them

register_monai()
dice_and_cross_entropy = DiceCELoss(sigmoid=True)


def make_unet(dims: int, norm: str) -> nn.Module:
    """A U-Net with three resolutions."""
    return UNet(dims, 1, 1, channels=(8, 16, 32), strides=(2, 2), norm=f"normlab_{norm}")


def make_segresnet(dims: int, norm: str) -> nn.Module:
    """A SegResNet with three resolutions."""
    return SegResNet(dims, 8, 1, 1, norm=f"normlab_{norm}", blocks_down=(1, 1, 1), blocks_up=(1, 1))


def make_dynunet(dims: int, norm: str) -> nn.Module:
    """nnU-Net's network with three resolutions."""
    kernels, strides, filters = (3, 3, 3), (1, 2, 2), (8, 16, 32)
    return DynUNet(dims, 1, 1, kernels, strides, strides[1:], filters=filters, norm_name=f"normlab_{norm}")


def loss(output: Tensor, label: Tensor) -> Tensor:
    """The sum of Dice loss and cross entropy."""
    return dice_and_cross_entropy(output, label[:, :1].float())


def dice_here(output: Tensor, label: Tensor) -> Tensor:
    """The Dice score of each image of the site that the network was trained at; NaN for the others."""
    return dice(output, label[:, 0]).where(~is_elsewhere(label), torch.nan)


def dice_elsewhere(output: Tensor, label: Tensor) -> Tensor:
    """The Dice score of each image of another site; NaN for the others."""
    return dice(output, label[:, 0]).where(is_elsewhere(label), torch.nan)


def is_elsewhere(label: Tensor) -> Tensor:
    """Whether each image is of another site, (N,)."""
    return label[:, 1].flatten(1)[:, 0] == 1


def standardise(images: Tensor) -> Tensor:
    """Each image gets mean 0 and deviation 1, as MONAI's `NormalizeIntensity` makes it."""
    dims = tuple(range(1, images.dim()))
    deviation = images.std(dims, keepdim=True).clamp(min=1e-6)
    return (images - images.mean(dims, keepdim=True)) / deviation


def in_one_unit(images: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Both with one offset and one factor, those that give `images` mean 0 and deviation 1."""
    mean, deviation = images.mean(), images.std()
    return (images - mean) / deviation, (valid - mean) / deviation


def make_pair(train: Cuts, here: Cuts, there: Cuts, raw: bool) -> Pair:
    """The data sets to train and to validate on, of images and where the object is in them.

    Args:
        train: to train on.
        here: of the same site, held out.
        there: of another site.
        raw: whether images are left as they are, but for one factor and one offset; or each is standardised.
    """
    images, objects = train
    valid, valid_objects = (torch.cat(parts) for parts in zip(here, there, strict=True))
    images, valid = in_one_unit(images, valid) if raw else (standardise(images), standardise(valid))
    return samples(images, objects), samples(valid, valid_objects, torch.arange(len(valid)) >= len(here[0]))


def samples(images: Tensor, objects: Tensor, elsewhere: Tensor | bool = False) -> TensorDataset:
    """A data set of images and labels.

    Args:
        images: (N, *space).
        objects: (N, *space), where the object is.
        elsewhere: (N,), which images are of another site; or all, or none.
    """
    site = torch.as_tensor(elsewhere).expand(len(objects)).reshape(-1, *[1] * (objects.dim() - 1)).expand_as(objects)
    return TensorDataset(images[:, None].float(), torch.stack([objects.long(), site.long()], 1))

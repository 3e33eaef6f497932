"""The nets to try norms in, by name: `build_model("convnet", norm="running", num_classes=10)`."""

from torch import nn

from ..errors import unknown
from ..nn import NORMS
from .convnet import GeneralRelu, build_convnet, conv_block, convnet, init_convolutions
from .resnet import build_resnet

MODELS = {"convnet": build_convnet, "resnet": build_resnet}


def build_model(name: str, norm: str, num_classes: int, in_channels: int = 1) -> nn.Module:
    """A new network of the name `name` with the norm `norm` in it, initialised from torch's global seed.

    Raises:
        InputError: an unknown name, with the nearest match.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    return MODELS[name](norm, num_classes, in_channels)


__all__ = ["MODELS", "GeneralRelu", "build_model", "conv_block", "convnet", "init_convolutions"]

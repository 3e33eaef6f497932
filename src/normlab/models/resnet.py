"""A small residual net for small images, with any norm."""

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import NORMS, build_norm
from .convnet import init_convolutions

WIDTHS = (16, 32, 64)
BLOCKS_PER_STAGE = 2


class BasicBlock(nn.Module):
    """relu(x + norm(conv(relu(norm(conv(x)))))), where x is thinned out by `stride` and filled up with zero channels.

    With an activating norm both branch layers end in it, and nothing follows the sum.

    Args:
        in_channels: of the input.
        out_channels: of the output, as many at least.
        stride: of the first convolution.
        norm: the registered name.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: str):
        super().__init__()
        self.stride, self.new_channels = stride, out_channels - in_channels
        self.conv1, self.norm1, self.activation = _conv_norm(in_channels, out_channels, stride, norm)
        self.conv2, self.norm2, _ = _conv_norm(out_channels, out_channels, 1, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        shortcut = F.pad(x[..., :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        return self.activation(y + shortcut)


def build_resnet(norm: str, num_classes: int, in_channels: int = 3) -> nn.Module:
    """A residual net of 13 convolutions, with a registered norm after each.

    For images of about 32×32, initialised, 0.17 million parameters: a convolution to 16 channels, three stages of two
    blocks (16 channels, 32 at half the size, 64 at a quarter), average pool, linear. A convolution has a bias unless
    the norm has one. No γ starts at zero: in runs this short, blocks that start as their shortcut cost half the
    progress.

    Source: He, Zhang, Ren and Sun 2016, "Deep Residual Learning for Image Recognition", section 4.2, shortcut A.
    """
    layers: list[nn.Module] = [*_conv_norm(in_channels, WIDTHS[0], 1, norm)]
    channels = WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        for block in range(BLOCKS_PER_STAGE):
            stride = 2 if stage > 0 and block == 0 else 1
            layers.append(BasicBlock(channels, width, stride, norm))
            channels = width
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    return init_convolutions(model)


def _conv_norm(in_channels: int, out_channels: int, stride: int, norm: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A 3×3 convolution, its norm, and the activation after them, which does nothing if the norm activates."""
    registered = NORMS[norm]
    layer = build_norm(norm, out_channels)
    has_bias = getattr(layer, "bias", None) is not None
    conv = registered.convs[1](in_channels, out_channels, 3, stride, padding=1, bias=not has_bias)
    return conv, layer, nn.Identity() if registered.activates else nn.ReLU()

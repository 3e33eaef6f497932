"""The lesson's convolutional net, with any norm, and what it is built from."""

from collections.abc import Callable, Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import NORMS, build_norm

WIDTHS = (8, 16, 32, 64, 64)


class GeneralRelu(nn.Module):
    """min(relu(x) − sub, maxv), where relu is leaky with slope `leak` below 0; each part only if it is given."""

    def __init__(self, leak: float | None = None, sub: float | None = None, maxv: float | None = None):
        super().__init__()
        self.leak, self.sub, self.maxv = leak, sub, maxv

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x) if self.leak is None else F.leaky_relu(x, self.leak)
        if self.sub is not None:
            x = x - self.sub
        return x if self.maxv is None else x.clamp(max=self.maxv)

    def extra_repr(self) -> str:
        return f"leak={self.leak}, sub={self.sub}, maxv={self.maxv}"


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    norm: Callable[[int], nn.Module] | None = None,
    *,
    stride: int = 2,
    bias: bool | None = None,
    activation: nn.Module | None = None,
    conv: Callable[..., nn.Module] = nn.Conv2d,
    activates: bool = False,
) -> nn.Sequential:
    """Convolution, activation, norm, in this order (the lesson's); padding is half the kernel.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        kernel_size: of the convolution.
        norm: builds the norm from the number of channels; no norm if None.
        stride: of the convolution.
        bias: of the convolution; by default unless the norm has one.
        activation: `GeneralRelu()` by default.
        conv: builds the convolution.
        activates: whether the norm is the activation too, and stands in the place of both.
    """
    layer = None if norm is None else norm(out_channels)
    bias = getattr(layer, "bias", None) is None if bias is None else bias
    layers = [conv(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)]
    if not activates:
        layers.append(GeneralRelu() if activation is None else activation)
    return nn.Sequential(*layers) if layer is None else nn.Sequential(*layers, layer)


def convnet(
    blocks: Callable[[int, int, int], nn.Module], num_classes: int, in_channels: int = 1, widths: Sequence[int] = WIDTHS
) -> nn.Sequential:
    """A classifier of images: a block for each width (kernel 5, then 3), average pool, linear.

    Args:
        blocks: builds a block from its input channels, output channels and kernel size.
        num_classes: outputs.
        in_channels: of the images.
        widths: output channels of the blocks.
    """
    channels = [in_channels, *widths]
    body = [blocks(channels[i], channels[i + 1], 5 if i == 0 else 3) for i in range(len(widths))]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], num_classes))


def init_convolutions(model: nn.Module, uniform: bool = False) -> nn.Module:
    """Kaiming initialisation (normal or uniform, fan-in, slope 0.1) of every convolution in `model`; biases zero."""
    fill = nn.init.kaiming_uniform_ if uniform else nn.init.kaiming_normal_
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            fill(module.weight, a=0.1)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def build_convnet(norm: str, num_classes: int, in_channels: int = 1) -> nn.Module:
    """The lesson's net, initialised, with a registered norm in each block.

    A convolution has a bias unless the norm has one. An activating norm takes the place of activation and norm both.
    """
    registered = NORMS[norm]
    layer = None if norm == "none" else partial(build_norm, norm)
    block = partial(conv_block, norm=layer, conv=registered.convs[1], activates=registered.activates)
    return init_convolutions(convnet(block, num_classes, in_channels))

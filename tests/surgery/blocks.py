"""The block patterns of torchvision, timm and segmentation_models, written from memory of how they are built."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

C = 8
BLOCKS: dict[str, Callable[[], nn.Module]] = {}


def pattern(name: str) -> Callable[[Any], Any]:
    """Keeps a builder of a model of (N, C, H, W) under a name."""

    def keep(builder: Any) -> Any:
        BLOCKS[name] = builder
        return builder

    return keep


def conv(
    kernel: int = 3, groups: int = 1, bias: bool = False, inputs: int = C, outputs: int = C, stride: int = 1
) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


# --- torchvision ------------------------------------------------------------------------------------------------------


@pattern("torchvision resnet.BasicBlock")
class BasicBlock(nn.Module):
    def __init__(self, norm_layer=nn.BatchNorm2d):
        super().__init__()
        self.conv1, self.bn1 = conv(), norm_layer(C)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = conv(), norm_layer(C)
        self.downsample = nn.Sequential(conv(1), norm_layer(C))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


@pattern("torchvision resnet.Bottleneck, one ReLU for all")
class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = conv(1, outputs=4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(groups=2, inputs=4, outputs=4), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = conv(1, inputs=4), nn.BatchNorm2d(C)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x
        return self.relu(out)


class FrozenBatchNorm2d(nn.Module):
    """As torchvision.ops.misc: buffers, and no counter."""

    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        return x * scale + (b - rm * scale)


BLOCKS["torchvision detection backbone: FrozenBatchNorm2d"] = lambda: BasicBlock(FrozenBatchNorm2d)


class DenseLayer(nn.Module):
    def __init__(self, inputs, memory_efficient):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(inputs), nn.ReLU(inplace=True)
        self.conv1 = conv(1, inputs=inputs)
        self.norm2, self.relu2, self.conv2 = nn.BatchNorm2d(C), nn.ReLU(inplace=True), conv(outputs=4)
        self.memory_efficient = memory_efficient

    def bn_function(self, inputs: list[Tensor]) -> Tensor:
        return self.conv1(self.relu1(self.norm1(torch.cat(inputs, 1))))

    def forward(self, input):
        previous = [input] if isinstance(input, Tensor) else input
        if self.memory_efficient and any(x.requires_grad for x in previous):
            bottleneck = checkpoint(lambda *inputs: self.bn_function(inputs), *previous, use_reentrant=False)
        else:
            bottleneck = self.bn_function(previous)
        return self.conv2(self.relu2(self.norm2(bottleneck)))


@pattern("torchvision densenet: norm first, a list, checkpoints")
class DenseBlock(nn.ModuleDict):
    def __init__(self):
        super().__init__()
        for i in range(2):
            self.add_module(f"denselayer{i + 1}", DenseLayer(C + 4 * i, memory_efficient=i == 1))

    def forward(self, init_features):
        features = [init_features]
        for _, layer in self.items():
            features.append(layer(features))
        return F.relu(torch.cat(features, 1), inplace=True)


class BasicConv2d(nn.Module):
    def __init__(self, inputs, outputs, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


GoogLeNetOutputs = namedtuple("GoogLeNetOutputs", ["logits", "aux_logits2", "aux_logits1"])


@pattern("torchvision inception and googlenet: branches, a named tuple")
class Inception(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch1 = BasicConv2d(C, 4, kernel_size=1)
        self.branch2 = nn.Sequential(BasicConv2d(C, 4, kernel_size=1), BasicConv2d(4, 4, kernel_size=3, padding=1))
        self.branch7 = nn.Sequential(BasicConv2d(C, 4, kernel_size=(1, 7), padding=(0, 3)))
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), BasicConv2d(C, 4, kernel_size=1))
        self.aux = nn.Linear(C, 3)

    def forward(self, x):
        aux = self.aux(x.mean((2, 3))) if self.training else None
        y = torch.cat([self.branch1(x), self.branch2(x), self.branch7(x), self.pool(x)], 1)
        return GoogLeNetOutputs(y.flatten(1), aux, None)


class Conv2dNormActivation(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=3, groups=1, activation=nn.ReLU, norm=nn.BatchNorm2d):
        layers = [conv(kernel, groups, inputs=inputs, outputs=outputs), norm(outputs)]
        super().__init__(*layers, *([] if activation is None else [activation(inplace=True)]))


class SqueezeExcitation(nn.Module):
    def __init__(self, features, scale=nn.Hardsigmoid):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(features, 4, 1), nn.Conv2d(4, features, 1)
        self.activation, self.scale_activation = nn.ReLU(), scale()

    def forward(self, x):
        scale = self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x)))))
        return scale * x


class StochasticDepth(nn.Module):
    def forward(self, x):
        return x if not self.training else x * torch.empty(len(x), 1, 1, 1).bernoulli_(0.8) / 0.8


def inverted(activation, norm, scale=None) -> nn.Sequential:
    expand = Conv2dNormActivation(C, 16, 1, activation=activation, norm=norm)
    depthwise = Conv2dNormActivation(16, 16, 3, 16, activation=activation, norm=norm)
    project = Conv2dNormActivation(16, C, 1, activation=None, norm=norm)
    return nn.Sequential(expand, depthwise, *([] if scale is None else [SqueezeExcitation(16, scale)]), project)


class InvertedResidual(nn.Module):
    def __init__(self, activation, norm=nn.BatchNorm2d, scale=None):
        super().__init__()
        self.block, self.stochastic_depth = inverted(activation, norm, scale), StochasticDepth()

    def forward(self, input):
        return self.stochastic_depth(self.block(input)) + input


BLOCKS["torchvision mobilenetv2"] = lambda: InvertedResidual(nn.ReLU6)
BLOCKS["torchvision mobilenetv3: SE, Hardswish, eps and momentum"] = lambda: InvertedResidual(
    nn.Hardswish, partial(nn.BatchNorm2d, eps=0.001, momentum=0.01), nn.Hardsigmoid
)
BLOCKS["torchvision efficientnet: SE, SiLU"] = lambda: InvertedResidual(nn.SiLU, nn.BatchNorm2d, nn.Sigmoid)
BLOCKS["torchvision mnasnet: momentum 0.0003"] = lambda: InvertedResidual(
    nn.ReLU, partial(nn.BatchNorm2d, momentum=1 - 0.9997)
)
BLOCKS["torchvision wide resnet, without biases learning"] = lambda: nn.Sequential(BasicBlock(), Bottleneck())
BLOCKS["torchvision vgg_bn"] = lambda: nn.Sequential(
    conv(bias=True), nn.BatchNorm2d(C), nn.ReLU(inplace=True), nn.MaxPool2d(2, 2),
    conv(bias=True), nn.BatchNorm2d(C), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    nn.Linear(4 * C, 8), nn.ReLU(True), nn.Dropout(), nn.Linear(8, 3),
)  # fmt: skip


@pattern("torchvision shufflenetv2: chunk and shuffle")
class ShuffleUnit(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch2 = nn.Sequential(
            conv(1, inputs=4, outputs=4), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            conv(3, 4, inputs=4, outputs=4), nn.BatchNorm2d(4),
            conv(1, inputs=4, outputs=4), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        )  # fmt: skip

    def forward(self, x):
        x1, x2 = x.chunk(2, dim=1)
        out = torch.cat((x1, self.branch2(x2)), 1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


@pattern("torchvision squeezenet: no norm")
class Fire(nn.Module):
    def __init__(self):
        super().__init__()
        self.squeeze, self.expand = conv(1, bias=True, outputs=4), conv(3, bias=True, inputs=4)

    def forward(self, x):
        return self.expand(F.relu(self.squeeze(x)))


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


@pattern("torchvision convnext: LayerNorm2d, layer_scale")
class ConvNeXtBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = LayerNorm2d(C, eps=1e-6)
        self.dwconv, self.ln = conv(7, C, bias=True), nn.LayerNorm(C, eps=1e-6)
        self.fc1, self.fc2 = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.layer_scale = nn.Parameter(torch.ones(C, 1, 1) * 1e-1)

    def forward(self, x):
        y = self.dwconv(self.norm(x)).permute(0, 2, 3, 1)
        y = self.fc2(F.gelu(self.fc1(self.ln(y)))).permute(0, 3, 1, 2)
        return x + self.layer_scale * y


@pattern("torchvision vit and swin: tokens")
class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_proj = nn.Conv2d(C, C, 2, 2)
        self.ln_1, self.ln_2 = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attention = nn.MultiheadAttention(C, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))
        self.class_token = nn.Parameter(torch.zeros(1, 1, C))

    def forward(self, x):
        x = self.conv_proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], 1)
        y = self.ln_1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return (x + self.mlp(self.ln_2(x)))[:, 0]


class ASPPPooling(nn.Sequential):
    def __init__(self):
        super().__init__(nn.AdaptiveAvgPool2d(1), conv(1), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x):
        size = x.shape[-2:]
        for mod in self:
            x = mod(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


@pattern("torchvision deeplabv3: ASPP with a norm of one pixel, an ordered dict")
class DeepLabV3(nn.Module):
    def __init__(self):
        super().__init__()
        dilated = nn.Sequential(nn.Conv2d(C, C, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(C), nn.ReLU())
        self.backbone = BasicBlock()
        self.convs = nn.ModuleList([nn.Sequential(conv(1), nn.BatchNorm2d(C), nn.ReLU()), dilated, ASPPPooling()])
        self.project = nn.Sequential(conv(1, inputs=3 * C), nn.BatchNorm2d(C), nn.ReLU(), nn.Dropout(0.5))
        self.aux_classifier = nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), nn.Dropout(0.1), nn.Conv2d(C, 2, 1))

    def forward(self, x):
        features = self.backbone(x)
        out = self.project(torch.cat([module(features) for module in self.convs], dim=1))
        return OrderedDict(out=F.interpolate(out, scale_factor=2.0), aux=self.aux_classifier(features))


@pattern("torchvision lraspp: a gate")
class LRASPP(nn.Module):
    def __init__(self):
        super().__init__()
        self.cbr = nn.Sequential(conv(1), nn.BatchNorm2d(C), nn.ReLU(inplace=True))
        self.scale = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(1), nn.Sigmoid())

    def forward(self, x):
        return {"out": self.cbr(x) * self.scale(x)}


@pattern("torchvision retinanet: one head for all levels, group norm")
class RetinaHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.fpn = nn.ModuleList([Conv2dNormActivation(C, C), Conv2dNormActivation(C, C)])
        self.head = nn.Sequential(conv(), nn.GroupNorm(2, C), nn.ReLU(), conv(), nn.BatchNorm2d(C), nn.ReLU())

    def forward(self, x):
        levels = [layer(x if i == 0 else F.max_pool2d(x, 2)) for i, layer in enumerate(self.fpn)]
        return [self.head(level) for level in levels]


@pattern("torchvision raft: instance norm and batch norm encoders, run again and again")
class RAFT(nn.Module):
    def __init__(self):
        super().__init__()
        self.feature = Conv2dNormActivation(C, C, norm=nn.InstanceNorm2d)
        self.context = Conv2dNormActivation(C, C)
        self.update = nn.Sequential(conv(inputs=2 * C), nn.BatchNorm2d(C), nn.Tanh())

    def forward(self, x):
        hidden, flow = self.context(x), []
        for _ in range(3):
            hidden = self.update(torch.cat([hidden, self.feature(x)], 1))
            flow.append(hidden)
        return flow


@pattern("torchvision r2plus1d: video")
class R2Plus1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(
            nn.Conv3d(C, C, (1, 3, 3), padding=(0, 1, 1), bias=False), nn.BatchNorm3d(C), nn.ReLU(inplace=True),
            nn.Conv3d(C, C, (3, 1, 1), padding=(1, 0, 0), bias=False), nn.BatchNorm3d(C),
        )  # fmt: skip

    def forward(self, x):
        return self.conv1(x[:, :, None].expand(-1, -1, 3, -1, -1))


# --- timm -------------------------------------------------------------------------------------------------------------


class BatchNormAct2d(nn.BatchNorm2d):
    """Norm, dropout and activation in one, with children of its own."""

    def __init__(self, num_features, act=nn.ReLU, drop=None):
        super().__init__(num_features)
        self.drop, self.act = nn.Identity() if drop is None else drop, act()

    def forward(self, x):
        training = self.training or (self.running_mean is None)
        statistics = self.running_mean, self.running_var
        x = F.batch_norm(x, *statistics, self.weight, self.bias, training, self.momentum, self.eps)
        return self.act(self.drop(x))


class GroupNormAct(nn.GroupNorm):
    def __init__(self, num_channels, num_groups=2):
        super().__init__(num_groups, num_channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)
        self._fast_norm = False

    def forward(self, x):
        return self.act(self.drop(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)))


class FrozenBatchNormAct2d(FrozenBatchNorm2d):
    def __init__(self, num_features):
        super().__init__(num_features)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(super().forward(x))


class SplitBatchNorm2d(nn.BatchNorm2d):
    """In training a norm of its own for each split of the batch."""

    def __init__(self, num_features, num_splits=2):
        super().__init__(num_features)
        self.num_splits = num_splits
        self.aux_bn = nn.ModuleList([nn.BatchNorm2d(num_features) for _ in range(num_splits - 1)])

    def forward(self, input):
        if not self.training:
            return super().forward(input)
        first, *others = input.split(len(input) // self.num_splits)
        return torch.cat([super().forward(first), *(a(x) for a, x in zip(self.aux_bn, others, strict=False))], dim=0)


class EvoNorm2dB0(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.eps, self.momentum = 1e-3, 0.1
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.v = nn.Parameter(torch.ones(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        along = (1, -1, 1, 1)
        var = x.float().var(dim=(0, 2, 3), unbiased=False) if self.training else self.running_var
        if self.training:
            self.running_var.copy_(self.running_var * (1 - self.momentum) + var.detach() * self.momentum)
        left = (var + self.eps).sqrt().view(along)
        right = x * self.v.view(along) + (x.var((2, 3), keepdim=True, unbiased=False) + self.eps).sqrt()
        return x / left.max(right) * self.weight.view(along) + self.bias.view(along)


class StdConv2d(nn.Conv2d):
    def forward(self, x):
        shape = 1, self.out_channels, -1
        weight = F.batch_norm(self.weight.reshape(shape), None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class ScaledStdConv2d(nn.Conv2d):
    """With a gain, of NFNet."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, 3, padding=1)
        self.gain = nn.Parameter(torch.full((outputs, 1, 1, 1), 0.7))

    def forward(self, x):
        weight = F.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None, self.gain.view(-1), training=True, momentum=0.0
        )
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class BlurPool2d(nn.Module):
    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        self.register_buffer("filt", (row[:, None] * row)[None, None].repeat(C, 1, 1, 1), persistent=False)

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1), "reflect"), self.filt, groups=C)


@pattern("timm attention pool")
class AttentionPool(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Sequential(conv(), nn.BatchNorm2d(C)), nn.LayerNorm(C)
        self.latent, self.kv = nn.Parameter(torch.randn(1, 1, C)), nn.Linear(C, 2 * C)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        k, v = self.kv(x).chunk(2, dim=-1)
        return self.norm(F.scaled_dot_product_attention(self.latent.expand(len(x), -1, -1), k, v))[:, 0]


BLOCKS["timm BatchNormAct2d"] = lambda: nn.Sequential(conv(), BatchNormAct2d(C), conv(), BatchNormAct2d(C, nn.SiLU))
BLOCKS["timm BatchNormAct2d without activation"] = lambda: nn.Sequential(conv(), BatchNormAct2d(C, nn.Identity))
BLOCKS["timm GroupNormAct"] = lambda: nn.Sequential(conv(), GroupNormAct(C), conv(), nn.BatchNorm2d(C))
BLOCKS["timm FrozenBatchNormAct2d"] = lambda: nn.Sequential(conv(), FrozenBatchNormAct2d(C))
BLOCKS["timm SplitBatchNorm2d"] = lambda: nn.Sequential(conv(), SplitBatchNorm2d(C), nn.ReLU())
BLOCKS["timm EvoNorm2dB0"] = lambda: nn.Sequential(conv(), EvoNorm2dB0(C), conv(), nn.BatchNorm2d(C))
BLOCKS["timm StdConv2d before a norm"] = lambda: nn.Sequential(StdConv2d(C, C, 3, padding=1), nn.BatchNorm2d(C))
BLOCKS["timm NFNet: ScaledStdConv2d"] = lambda: nn.Sequential(ScaledStdConv2d(C, C), nn.SiLU(), ScaledStdConv2d(C, C))
BLOCKS["timm BlurPool2d"] = lambda: nn.Sequential(conv(), nn.BatchNorm2d(C), nn.ReLU(), BlurPool2d(), nn.BatchNorm2d(C))
BLOCKS["timm LayerNorm2d"] = lambda: nn.Sequential(conv(), LayerNorm2d(C), conv(1), nn.BatchNorm2d(C), nn.GELU())


@pattern("timm repvgg and mobileone: three branches, one of a norm alone")
class RepVGGBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.reparam_conv = None
        self.identity = nn.BatchNorm2d(C)
        self.conv_kxk, self.conv_1x1 = (
            Conv2dNormActivation(C, C, 3, activation=None),
            Conv2dNormActivation(C, C, 1, activation=None),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        if self.reparam_conv is not None:
            return self.act(self.reparam_conv(x))
        return self.act(self.conv_1x1(x) + self.conv_kxk(x) + self.identity(x))

    def reparameterize(self):
        kernel, bias = 0, 0
        for branch in (self.conv_kxk, self.conv_1x1):
            norm, weight = branch[1], branch[0].weight
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            kernel = kernel + F.pad(weight * scale[:, None, None, None], [1 - weight.shape[-1] // 2] * 4)
            bias = bias + norm.bias - norm.running_mean * scale
        self.reparam_conv = nn.Conv2d(C, C, 3, padding=1)
        self.reparam_conv.weight.data, self.reparam_conv.bias.data = kernel.data, bias.data


@pattern("timm levit: ConvNorm and LinearNorm that fuse themselves")
class LeViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(linear=conv(1), bn=nn.BatchNorm2d(C)))
        self.linear, self.bn = nn.Linear(C, C, bias=False), nn.BatchNorm1d(C)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.linear(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)

    @torch.no_grad()
    def fuse(self):
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps) ** 0.5
        return self.linear.weight * scale[:, None], self.bn.bias - self.bn.running_mean * scale


@pattern("timm ghostnet: cheap features beside")
class GhostModule(nn.Module):
    def __init__(self):
        super().__init__()
        self.primary_conv = Conv2dNormActivation(C, 4, 1)
        self.cheap_operation = Conv2dNormActivation(4, 4, 3, 4)

    def forward(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap_operation(x1)], dim=1)[:, :C, :, :]


@pattern("timm hrnet: lists of lists, None among them")
class HighResolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList([nn.Sequential(BasicBlock()), nn.Sequential(BasicBlock())])
        down = nn.Sequential(nn.Sequential(conv(stride=2), nn.BatchNorm2d(C)))
        up = nn.Sequential(conv(1), nn.BatchNorm2d(C), nn.Upsample(scale_factor=2))
        self.fuse_layers = nn.ModuleList([nn.ModuleList([nn.Identity(), up]), nn.ModuleList([down, nn.Identity()])])
        self.relu = nn.ReLU(False)

    def forward(self, x):
        ys = [branch(part) for branch, part in zip(self.branches, (x, F.avg_pool2d(x, 2)), strict=True)]
        return [self.relu(sum(layer(y) for layer, y in zip(row, ys, strict=True))) for row in self.fuse_layers]


@pattern("timm cspnet: split channels")
class CrossStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv_exp, self.blocks = Conv2dNormActivation(C, C, 1), nn.Sequential(Conv2dNormActivation(4, 4))
        self.conv_transition = Conv2dNormActivation(C, C, 1, activation=nn.LeakyReLU)

    def forward(self, x):
        xs, xb = self.conv_exp(x).split(4, dim=1)
        return self.conv_transition(torch.cat([xs, self.blocks(xb)], 1))


@pattern("timm resnest: split attention")
class SplitAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn0, self.act0 = conv(groups=2, outputs=2 * C), nn.BatchNorm2d(2 * C), nn.ReLU(inplace=True)
        self.fc1, self.bn1, self.fc2 = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C), nn.Conv2d(C, 2 * C, 1)

    def forward(self, x):
        x = self.act0(self.bn0(self.conv(x)))
        n, _, h, w = x.shape
        x = x.reshape(n, 2, C, h, w)
        gap = x.sum(dim=1).mean((2, 3), keepdim=True)
        attention = self.fc2(F.relu(self.bn1(self.fc1(gap)))).view(n, 2, C).softmax(1).view(n, 2, C, 1, 1)
        return (x * attention).sum(dim=1).contiguous()


@pattern("timm xcit: batch norm among tokens laid out as images")
class LocalPatchInteraction(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn, self.conv2 = conv(3, C, bias=True), nn.BatchNorm2d(C), conv(3, C, bias=True)
        self.norm = nn.LayerNorm(C)

    def forward(self, x):
        n, _, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2)).permute(0, 2, 1).reshape(n, C, h, w)
        return self.conv2(self.bn(F.gelu(self.conv1(tokens)))).reshape(n, C, h * w).permute(0, 2, 1)


class GlobalResponseNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps = 1e-6
        self.weight, self.bias = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))

    def forward(self, x):
        g = x.norm(p=2, dim=(2, 3), keepdim=True)
        n = g / (g.mean(dim=1, keepdim=True) + self.eps)
        return x + torch.addcmul(self.bias.view(1, -1, 1, 1), self.weight.view(1, -1, 1, 1), x * n)


BLOCKS["timm edgenext and convnextv2: GRN"] = lambda: nn.Sequential(conv(), nn.BatchNorm2d(C), GlobalResponseNorm())
BLOCKS["timm regnet: SE between"] = lambda: nn.Sequential(
    Conv2dNormActivation(C, C, 1), Conv2dNormActivation(C, C, 3, 2), SqueezeExcitation(C, nn.Sigmoid),
    Conv2dNormActivation(C, C, 1, activation=None),
)  # fmt: skip


# --- segmentation_models ----------------------------------------------------------------------------------------------


class Conv2dReLU(nn.Sequential):
    def __init__(self, inputs, outputs, kernel=3, use_batchnorm: Any = True):
        norm: nn.Module = nn.Identity()
        relu: nn.Module = nn.ReLU(inplace=True)
        if use_batchnorm == "inplace":
            norm, relu = InPlaceABN(outputs), nn.Identity()
        elif use_batchnorm:
            norm = nn.BatchNorm2d(outputs)
        super().__init__(conv(kernel, inputs=inputs, outputs=outputs, bias=not use_batchnorm), norm, relu)


class InPlaceABN(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.eps, self.momentum = 1e-5, 0.1
        self.weight, self.bias = nn.Parameter(torch.ones(num_features)), nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        y = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.leaky_relu(y, 0.01, inplace=True)


class SCSEModule(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.cSE = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(features, 2, 1), nn.ReLU(), nn.Conv2d(2, features, 1), nn.Sigmoid()
        )
        self.sSE = nn.Sequential(nn.Conv2d(features, 1, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.cSE(x) + x * self.sSE(x)


class DecoderBlock(nn.Module):
    def __init__(self, skip=C, use_batchnorm: Any = True):
        super().__init__()
        self.conv1, self.attention1 = Conv2dReLU(C + skip, C, use_batchnorm=use_batchnorm), SCSEModule(C + skip)
        self.conv2, self.attention2 = Conv2dReLU(C, C, use_batchnorm=use_batchnorm), SCSEModule(C)

    def forward(self, x, skip=None):
        x = F.interpolate(x, size=skip.shape[2:], mode="nearest")
        x = self.attention1(torch.cat([x, skip], dim=1))
        return self.attention2(self.conv2(self.conv1(x)))


class Unet(nn.Module):
    def __init__(self, use_batchnorm: Any):
        super().__init__()
        self.encoder, self.down = BasicBlock(), Conv2dNormActivation(C, C)
        self.blocks = nn.ModuleList([DecoderBlock(use_batchnorm=use_batchnorm)])

    def forward(self, x):
        features = [x, self.encoder(x)]
        features.append(self.down(F.max_pool2d(features[-1], 2)))
        features = features[1:][::-1]
        x = features[0]
        for block, skip in zip(self.blocks, features[1:], strict=True):
            x = block(x, skip)
        return x


BLOCKS["smp unet: scSE"] = lambda: Unet(True)
BLOCKS["smp unet without norms in the decoder"] = lambda: Unet(False)
BLOCKS["smp unet: in-place ABN"] = lambda: Unet("inplace")


@pattern("smp unet++: a module dict of dense skips")
class UnetPlusPlus(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([BasicBlock(), BasicBlock()])
        self.blocks = nn.ModuleDict({"x_0_0": DecoderBlock(), "x_0_1": DecoderBlock(2 * C)})

    def forward(self, x):
        first = self.encoder[0](x)
        second = self.encoder[1](F.max_pool2d(first, 2))
        dense = {"x_0_0": self.blocks["x_0_0"](second, first)}
        return self.blocks["x_0_1"](second, torch.cat([dense["x_0_0"], first], dim=1))


@pattern("smp manet: position attention and SE of both")
class MAnet(nn.Module):
    def __init__(self):
        super().__init__()
        self.top, self.center, self.bottom = conv(1, bias=True), conv(1, bias=True), conv(bias=True)
        self.hl = nn.Sequential(Conv2dReLU(C, C), Conv2dReLU(C, C, 1))
        self.SE_ll = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, 2, 1), nn.ReLU(), nn.Conv2d(2, C, 1), nn.Sigmoid()
        )

    def forward(self, x):
        n, _, h, w = x.shape
        top, center = self.top(x).flatten(2), self.center(x).flatten(2).transpose(1, 2)
        attended = (center @ top).flatten(1).softmax(1).view(n, h * w, h * w) @ self.bottom(x).flatten(2).transpose(
            1, 2
        )
        x = x + attended.reshape(n, C, h, w)
        x = self.hl(x)
        return x * self.SE_ll(x)


class TransposeX2(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(nn.ConvTranspose2d(inputs, outputs, 4, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


BLOCKS["smp linknet: TransposeX2"] = lambda: nn.Sequential(Conv2dReLU(C, 4, 1), TransposeX2(4, 4), Conv2dReLU(4, C, 1))


@pattern("smp fpn: group norm, merged by a sum")
class FPNDecoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.p5, self.p4 = nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 1)
        self.encoder = BasicBlock()
        self.seg_blocks = nn.ModuleList(
            [nn.Sequential(conv(), nn.GroupNorm(4, C), nn.ReLU(inplace=True)) for _ in range(2)]
        )

    def forward(self, x):
        x = self.encoder(x)
        p5 = self.p5(F.max_pool2d(x, 2))
        p4 = F.interpolate(p5, scale_factor=2.0) + self.p4(x)
        sizes = [block(p) for block, p in zip(self.seg_blocks, (F.interpolate(p5, scale_factor=2.0), p4), strict=True)]
        return torch.stack(sizes).sum(dim=0)


class ConvBnRelu(nn.Module):
    def __init__(self, kernel, add_relu=True):
        super().__init__()
        self.conv, self.bn, self.activation = conv(kernel, bias=True), nn.BatchNorm2d(C), nn.ReLU(inplace=True)
        self.add_relu = add_relu

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.activation(x) if self.add_relu else x


@pattern("smp pan: GAU, a norm of one pixel")
class PAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvBnRelu(1, add_relu=False), nn.Sigmoid())
        self.conv2 = ConvBnRelu(3)

    def forward(self, x):
        return F.interpolate(x, scale_factor=1.0) + self.conv2(x) * self.conv1(x)


@pattern("smp pspnet: pooled to 1 x 1 without a norm there")
class PSP(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                nn.Sequential(nn.AdaptiveAvgPool2d(size), Conv2dReLU(C, 4, 1, use_batchnorm=size > 1))
                for size in (1, 2, 3)
            ]
        )
        self.conv = Conv2dReLU(C + 12, C, 1)

    def forward(self, x):
        size = x.shape[2:]
        parts = [F.interpolate(block(x), size=size, mode="bilinear", align_corners=True) for block in self.blocks]
        return self.conv(torch.cat([*parts, x], dim=1))


class SeparableConv2d(nn.Sequential):
    def __init__(self, inputs, outputs):
        super().__init__(conv(3, inputs, inputs=inputs, outputs=inputs), conv(1, inputs=inputs, outputs=outputs))


BLOCKS["smp deeplabv3+: SeparableConv2d"] = lambda: nn.Sequential(
    SeparableConv2d(C, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.Upsample(scale_factor=2), SeparableConv2d(4, C),
    nn.BatchNorm2d(C), nn.ReLU(),
)  # fmt: skip

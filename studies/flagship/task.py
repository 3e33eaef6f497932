"""What the plans here train beside the built-in nets and images: images of drawn contrast, other constants, pools.

`contrast` and `constants-contrast` have 4,000 images of MNIST. Each is multiplied by exp(0.7 z) and shifted by 0.7 z',
with z and z' from the normal distribution. 2,000 validation images are made in the same way.

`constants-mnist` and `constants-contrast` vary two constants of running batch norm. A norm `S 64, T 0.2` there has
these values: with N images γ and β learn at √(N/S) of the learning rate, and the tolerated cosine is T/N.

`perfect` asks what a net would learn at batch 2 with perfect statistics. Each step passes 32 images forward and
backward. Means, variances and averages of gradients are those of 32. Only the first two images have a part in the
gradient of weights, γ and β. In the runs named `own` the averages of gradients are those of each pair.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.data import TensorBatches, load_dataset
from normlab.kernels.cpu import use_constants
from normlab.models import build_model

IMAGES, HELD_OUT, SPREAD = 4_000, 2_000, 0.7
STEPPED, POOL = 2, 32
VALID_BATCH = 250
SPACE = (0, 2, 3)

Images = tuple[Tensor, Tensor]


# Images of drawn contrast


def contrast_data(batch_size: int, seed: int) -> tuple[TensorBatches, TensorBatches]:
    (x, y), held_out = images_of_drawn_contrast()
    return TensorBatches(x, y, batch_size, shuffle=True, seed=seed), TensorBatches(*held_out, VALID_BATCH)


def images_of_drawn_contrast() -> tuple[Images, Images]:
    """For training, and for validation."""
    mnist = load_dataset("mnist")
    drawn = torch.Generator().manual_seed(100)
    x, x_valid = (with_drawn_contrast(part, drawn) for part in (mnist.x_train[:IMAGES], mnist.x_valid[:HELD_OUT]))
    return (x, mnist.y_train[:IMAGES]), (x_valid, mnist.y_valid[:HELD_OUT])


def with_drawn_contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    factors, shifts = torch.randn(2, len(images), 1, 1, 1, generator=generator) * SPREAD
    return (images - 0.13) / 0.31 * factors.exp() + shifts


def residual_net(norm: str) -> nn.Module:
    return build_model("resnet", norm, num_classes=10, in_channels=1)


# Other constants

in_use = ExitStack()


def set_constants(norm: str) -> None:
    """Give running batch norm the constants that the name has, until the next network of this process is made."""
    images, drift = (float(part.split()[1]) for part in norm.split(", "))
    in_use.close()
    in_use.enter_context(use_constants(steady_images=images, tolerated_drift=drift))


def convnet_with_constants(norm: str, num_classes: int, in_channels: int) -> nn.Module:
    set_constants(norm)
    return build_model("convnet", "running", num_classes, in_channels)


def residual_net_with_constants(norm: str) -> nn.Module:
    set_constants(norm)
    return residual_net("running")


# Perfect statistics


class Pools:
    """Batches of 32: two images that no other batch begins with, and 30 drawn from all."""

    def __init__(self, x: Tensor, y: Tensor, seed: int):
        self.x, self.y, self.seed = x, y, seed

    def __len__(self) -> int:
        return len(self.x) // STEPPED

    def __iter__(self) -> Iterator[Images]:
        generator = torch.Generator().manual_seed(self.seed)
        for few in torch.randperm(len(self.x), generator=generator).split(STEPPED):
            chosen = torch.cat([few, torch.randint(len(self.x), (POOL - STEPPED,), generator=generator)])
            yield self.x[chosen], self.y[chosen]


def pool_data(batch_size: int, seed: int) -> tuple[Pools, TensorBatches]:
    train, held_out = images_of_drawn_contrast()
    return Pools(*train, seed), TensorBatches(*held_out, VALID_BATCH)


def residual_net_of_pools(norm: str) -> nn.Module:
    return with_pools(residual_net("batch"), own={"perfect": False, "own": True}[norm])


def with_pools(module: nn.Module, own: bool) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d | nn.Linear):
            setattr(module, name, FewStep(child))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, PoolNorm(child.num_features, own))
        else:
            with_pools(child, own)
    return module


class _Normalize(torch.autograd.Function):
    """Batch norm of a pool of images. The gradients of γ and β are those of the first few."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, own: bool) -> Tensor:
        var, mean = torch.var_mean(x, SPACE, correction=0, keepdim=True)
        inverse = (var + 1e-5).rsqrt()
        x_hat = (x - mean) * inverse
        ctx.save_for_backward(x_hat, inverse, weight)
        ctx.own = own
        return x_hat * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x_hat, inverse, weight = ctx.saved_tensors
        grad = grads[0]
        groups = [part.unflatten(0, (-1, STEPPED if ctx.own else POOL)) for part in (grad, grad * x_hat, x_hat * x_hat)]
        of_grad, of_product, square = (part.mean((1, 3, 4), keepdim=True).expand_as(part) for part in groups)
        subtracted = of_grad + (of_product / square.clamp(min=1)) * x_hat.view_as(of_grad)
        scale = POOL / STEPPED
        few, few_hat = grad[:STEPPED] * scale, x_hat[:STEPPED]
        grad_x = inverse * weight.view(-1, 1, 1) * (grad - subtracted.view_as(grad))
        return grad_x, (few * few_hat).sum(SPACE), few.sum(SPACE), None


class PoolNorm(nn.Module):
    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, own: bool):
        super().__init__()
        self.own, self.batches = own, 0
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias)
        with torch.no_grad():
            self.batches += 1
            var, mean = torch.var_mean(x, SPACE)
            rate = max(0.02, 1 / self.batches)
            self.mean.lerp_(mean, rate)
            self.var.lerp_(var, rate)
        return _Normalize.apply(x, self.weight, self.bias, self.own)


class FewStep(nn.Module):
    """A convolution or linear layer. Only the first few images have a part in the gradient of its weight."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.layer(x)
        constants = {name: value.detach() for name, value in self.layer.named_parameters()}
        y = torch.func.functional_call(self.layer, constants, x)
        of_few = self.layer(x[:STEPPED].detach())
        nothing = (of_few - of_few.detach()) * (POOL / STEPPED)  # zero, but it has a gradient
        return torch.cat([y[:STEPPED] + nothing, y[STEPPED:]])

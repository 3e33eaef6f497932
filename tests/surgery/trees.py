"""Random module trees for surgery: nets as people write them, of a few values, each from a seed.

Every module keeps the shape of what it is given, (N, C, *space), so that any can stand in, before or beside any other.
"""

import inspect
import random
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from normlab.nn import NORMS, build_norm

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
OURS = sorted(set(NORMS) - {"none"})


# --- norms of other people --------------------------------------------------------------------------------------------


def asserting(base: type[nn.Module]) -> type[nn.Module]:
    """The same as its base, with a forward of its own."""

    class AssertingNorm(base):
        def forward(self, x):
            assert x.dim() > 1
            return super().forward(x)

    return AssertingNorm


def doubling(base: type[nn.Module]) -> type[nn.Module]:
    """Not the same."""

    class DoublingNorm(base):
        def forward(self, x):
            return 2 * super().forward(x)

    return DoublingNorm


def masked(base: type[nn.Module]) -> type[nn.Module]:
    """Takes a second input, which is no residual."""

    class MaskedNorm(base):
        def forward(self, x, mask=None):
            y = super().forward(x)
            return y if mask is None else y * mask

    return MaskedNorm


def activated(base: type[nn.Module]) -> type[nn.Module]:
    """As timm's: an activation inside."""

    class NormAct(base):
        def __init__(self, features):
            super().__init__(features)
            self.act = nn.ReLU()

        def forward(self, x):
            return self.act(super().forward(x))

    return NormAct


PLAIN = {kind: [make(base) for base in BATCH] for kind, make in
         {"asserting": asserting, "doubling": doubling, "masked": masked, "activated": activated}.items()}  # fmt: skip


class Statistics(nn.Module):
    """A scale and shift by running statistics, of no class of torch's."""

    def __init__(self, features: int, learns: bool = False):
        super().__init__()
        self.eps, self.momentum = 1e-5, 0.1
        put = self.register_parameter if learns else self.register_buffer
        wrap = nn.Parameter if learns else torch.as_tensor
        put("weight", wrap(torch.ones(features)))
        put("bias", wrap(torch.zeros(features)))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))


class FrozenStatistics(Statistics):
    """As torchvision's and detectron's."""

    def forward(self, x):
        along = (1, -1, *[1] * (x.dim() - 2))
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale.view(along) + (self.bias - self.running_mean * scale).view(along)


class InPlaceABN(Statistics):
    """Batch norm and activation in one."""

    def __init__(self, features: int):
        super().__init__(features, learns=True)

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        y = F.batch_norm(x, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps)
        return F.leaky_relu(y, 0.01)


class PixelNorm(nn.Module):
    """A norm by its name only."""

    def forward(self, x):
        return x * (x.square().mean(1, keepdim=True) + 1e-4).rsqrt()


# --- modules around them ----------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return x + self.inner(x)


class Twice(Residual):
    def forward(self, x):
        return self.inner(self.inner(x))


class Checkpointed(Residual):
    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class ByKeyword(nn.Module):
    """Calls a norm as `norm(input=x)`, or whatever its first argument is called."""

    def __init__(self, norm: nn.Module, key: str):
        super().__init__()
        self.norm, self.key = norm, key

    def forward(self, x):
        return self.norm(**{self.key: x})


class WithMask(Residual):
    def forward(self, x):
        return self.inner(x, mask=(x > 0).to(x.dtype))


class InType(nn.Module):
    """Its inside is of another type."""

    def __init__(self, inner: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x):
        return self.inner(x.to(self.dtype)).to(x.dtype)


class LastChannels(nn.Module):
    def __init__(self, features: int):
        super().__init__()
        self.norm = nn.LayerNorm(features)

    def forward(self, x):
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class Branches(nn.Module):
    """Registered in a list or dict."""

    def __init__(self, parts: list[nn.Module], named: bool):
        super().__init__()
        self.parts = nn.ModuleDict({f"p{i}": p for i, p in enumerate(parts)}) if named else nn.ModuleList(parts)

    def forward(self, x):
        parts = self.parts.values() if isinstance(self.parts, nn.ModuleDict) else self.parts
        return sum(part(x.clone()) for part in parts) / len(self.parts)


class Beside(nn.Module):
    """Uses its parts by a list, dict, tuple or attribute that torch does not see; registers them too, or not."""

    def __init__(self, parts: list[nn.Module], how: str, registers: bool):
        super().__init__()
        if registers:
            self.registered = nn.ModuleList(parts)
        nested = {
            "list": list(parts),
            "dict": dict(enumerate(parts)),
            "tuple": tuple(parts),
            "deep": [(p,) for p in parts],
        }
        object.__setattr__(self, "parts", nested[how])

    def forward(self, x):
        parts = self.parts.values() if isinstance(self.parts, dict) else self.parts
        for part in parts:
            x = (part[0] if isinstance(part, tuple) else part)(x)
        return x


class ReadsStatistics(nn.Module):
    """Never calls the norm that it has."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.bn = norm

    def forward(self, x):
        return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)


class ReadsWeight(nn.Module):
    """Uses the weight of a layer once more."""

    def __init__(self, layer: nn.Module, norm: nn.Module):
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x):
        return self.norm(self.layer(x)) + 0.1 * self.layer.weight.mean()


class UsesBetween(ReadsWeight):
    """Uses the output of the layer before the norm."""

    def forward(self, x):
        y = self.layer(x)
        return self.norm(y) + y


class Noise(nn.Module):
    """Draws random numbers, in evaluation too."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source

    def forward(self, x):
        if self.source == "numpy":
            return x + 0.1 * float(np.random.rand())
        return x + 0.1 * (random.random() if self.source == "python" else torch.rand_like(x))


class KeepsEvaluating(nn.Sequential):
    """The recipe that keeps norms in evaluation mode while the rest trains."""

    def train(self, mode: bool = True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


@dataclass
class Answer:
    logits: Tensor
    extra: Any = None


Pair = namedtuple("Pair", "first second")


class Slots:
    __slots__ = ("values",)

    def __init__(self, values: Any):
        self.values = values


RETURNS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda y: y,
    "tuple": lambda y: (y, y.mean()),
    "dict": lambda y: {"out": y, "parts": [y[:1]]},
    "dataclass": lambda y: Answer(y, {"half": y / 2}),
    "namedtuple": lambda y: Pair(y, y.amax()),
    "slots": lambda y: Slots([y]),
}


class Root(nn.Module):
    """The model: of images, perhaps with a head of vectors, and with one of many kinds of output."""

    def __init__(self, body: nn.Module, head: nn.Module | None, returns: str):
        super().__init__()
        self.body, self.head, self.returns = body, head, returns

    def forward(self, x):
        y = self.body(x)
        if self.head is not None:
            y = self.head(y.flatten(2).mean(2))
        return RETURNS[self.returns](y)


# --- growing ----------------------------------------------------------------------------------------------------------


def scaled_output(module, inputs, output):
    return output * 1.5


def shifted_input(module, inputs):
    return (inputs[0] + 0.25, *inputs[1:]) if inputs else None


def watching(module, *_):
    return None


@dataclass
class Tree:
    """A model with batches that it takes.

    Attributes:
        copies: whether it can be deep-copied.
        wide: whether all of it is float64.
    """

    seed: int
    model: nn.Module
    batches: list[Any]
    copies: bool
    wide: bool

    def images(self) -> list[Tensor]:
        return [batch[0] if isinstance(batch, tuple) else batch for batch in self.batches]


class Grower:
    """Draws modules for (N, C, *space)."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.channels, self.dims = rng.choice([2, 3, 4]), rng.choice([1, 2, 2, 3])
        self.made: list[nn.Module] = []  # to share
        self.copies = True

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def norm(self, dims: int | None = None) -> nn.Module:
        """Any norm that takes (N, C, *space), or (N, C) if dims is 0."""
        dims, c, rng = self.dims if dims is None else dims, self.channels, self.rng
        space = max(dims, 1) - 1
        options = {
            "affine": self.chance(0.8),
            "momentum": rng.choice([0.1, 0.1, 0.03, None]),
            "eps": rng.choice([1e-5, 1e-3]),
        }
        makers: list[tuple[int, Callable[[], nn.Module]]] = [
            (10, lambda: BATCH[space](c, track_running_stats=self.chance(0.9), **options)),
            (4, lambda: build_norm(rng.choice(OURS), c, space + 1)),
            (
                2,
                lambda: build_norm(
                    rng.choice(["running", "batch"]), c, space + 1, activation=rng.choice(["relu", "leaky_relu"])
                ),
            ),
            (1, lambda: nn.SyncBatchNorm(c, **options)),
            (1, lambda: nn.GroupNorm(rng.choice([1, c]) if dims else 1, c)),
            (1, lambda: PLAIN["asserting"][space](c)),
            (1, lambda: PLAIN["doubling"][space](c)),
            (1, lambda: PLAIN["masked"][space](c)),
            (1, lambda: PLAIN["activated"][space](c)),
            (1, lambda: FrozenStatistics(c)),
            (1, lambda: InPlaceABN(c)),
            (1, PixelNorm),
        ]
        if dims:
            makers.append(
                (1, lambda: INSTANCE[space](c, affine=self.chance(0.5), track_running_stats=self.chance(0.5)))
            )
            makers.append((1, lambda: LastChannels(c)))
        weights = [weight for weight, _ in makers]
        return self.touched(rng.choices([make for _, make in makers], weights)[0]())

    def touched(self, norm: nn.Module) -> nn.Module:
        """With statistics that were measured, or not, γ and β that learned, hooks, and what people add."""
        if self.chance(0.85):
            self.learn(norm)
        if self.chance(0.1):
            norm.register_forward_hook(self.rng.choice([scaled_output, watching]))
        if self.chance(0.05):
            norm.register_forward_pre_hook(shifted_input)
        if self.chance(0.05):
            norm.qconfig = {"bits": 8}
        if self.chance(0.04) and isinstance(getattr(norm, "weight", None), nn.Parameter):
            nn.utils.parametrize.register_parametrization(norm, "weight", nn.Softplus())
        for parameter in norm.parameters():
            parameter.requires_grad_(self.chance(0.9))
        return norm

    def learn(self, norm: nn.Module) -> None:
        with torch.no_grad():
            for name, part in norm.named_parameters():
                part.copy_(torch.rand_like(part) + 0.5 if name == "weight" else part + 0.3 * torch.randn_like(part))
            for name, part in norm.named_buffers():
                if name == "running_mean":
                    part.copy_(torch.randn_like(part))
                elif name == "running_var":
                    part.copy_(torch.rand_like(part) + 0.5)
                elif name == "num_batches_tracked":
                    part.fill_(self.rng.choice([5, 10_000]))

    def layer(self) -> nn.Module:
        """A convolution."""
        c, rng = self.channels, self.rng
        kernel = rng.choice([1, 3])
        kind = (TRANSPOSED if self.chance(0.15) else CONVS)[self.dims - 1]
        layer = kind(c, c, kernel, padding=kernel // 2, bias=self.chance(0.5), groups=rng.choice([1, 1, c]))
        if self.chance(0.05):
            rng.choice([parametrizations.weight_norm, parametrizations.spectral_norm])(layer)
        elif self.chance(0.01):
            prune.random_unstructured(layer, "weight", 0.3)
            self.copies = False
        if self.chance(0.05):
            layer.register_forward_hook(self.rng.choice([scaled_output, watching]))
        return layer

    def between(self) -> nn.Module:
        makers = [
            nn.ReLU,
            partial(nn.ReLU, inplace=True),
            nn.Hardswish,
            nn.Sigmoid,
            partial(nn.Dropout, 0.2),
            nn.Identity,
        ]
        if self.chance(0.1):
            return Noise(self.rng.choice(["torch", "numpy", "python"]))
        return self.rng.choice(makers)()

    def used(self, norm: nn.Module) -> nn.Module:
        """A norm, in the ways in which it may be called."""
        if isinstance(norm, tuple(PLAIN["masked"])) and self.chance(0.7):
            return WithMask(norm)
        if self.chance(0.1):
            return ByKeyword(norm, next(iter(inspect.signature(norm.forward).parameters)))
        if self.chance(0.04) and type(norm) in BATCH and norm.track_running_stats:
            return ReadsStatistics(norm)
        return norm

    def unit(self) -> nn.Module:
        """A convolution with a norm after it."""
        layer, norm = self.layer(), self.used(self.norm())
        if self.chance(0.05):
            return ReadsWeight(layer, norm)
        if self.chance(0.05):
            return UsesBetween(layer, norm)
        kind = KeepsEvaluating if self.chance(0.1) else nn.Sequential
        return kind(layer, norm, self.between()) if self.chance(0.7) else kind(layer, norm)

    def block(self, depth: int) -> nn.Module:
        """Anything."""
        if self.chance(0.05):
            return self.of_another_type(depth)
        block = self.rng.choice(self.makers(depth))()
        self.made.append(block)
        return block

    def of_another_type(self, depth: int) -> nn.Module:
        """Float64 or bfloat16 amid float32; shares nothing with what is around it."""
        made, self.made = self.made, []
        block, self.made = self.rng.choice(self.makers(depth))(), made
        if not all_float32(block):
            return block
        dtype = self.rng.choice([torch.float64, torch.float64, torch.bfloat16])
        for module in everything(block).values():
            module.to(dtype)
        return InType(block, dtype)

    def makers(self, depth: int) -> list[Callable[[], nn.Module]]:
        leaves = [self.unit, self.unit, lambda: self.used(self.norm()), self.between]
        if self.made:
            leaves.append(lambda: self.rng.choice(self.made))
        if depth == 0:
            return leaves
        inner = partial(self.block, depth - 1)
        return [
            *leaves[:2], *leaves[4:],
            lambda: nn.Sequential(*(inner() for _ in range(self.rng.choice([1, 2, 2, 3])))),
            lambda: nn.Sequential(*(inner() for _ in range(2))),
            lambda: Residual(inner()),
            lambda: Twice(inner()),
            lambda: Checkpointed(inner()),
            lambda: Branches([inner() for _ in range(2)], named=self.chance(0.5)),
            lambda: Beside(
                [inner() for _ in range(self.rng.choice([1, 2]))],
                self.rng.choice(["list", "dict", "tuple", "deep"]), registers=self.chance(0.7),
            ),
        ]  # fmt: skip

    def head(self) -> nn.Module | None:
        if self.chance(0.6):
            return None
        layers = nn.Linear(self.channels, self.channels), self.norm(0), nn.ReLU()
        return nn.Sequential(*layers[: self.rng.choice([2, 3])])


def grow(seed: int) -> Tree:
    """The tree of a seed."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    grower = Grower(rng)
    body = nn.Sequential(
        grower.layer(), *(grower.block(rng.choice([0, 1, 1, 2])) for _ in range(rng.choice([1, 2, 2])))
    )
    model: nn.Module = Root(body, grower.head(), rng.choice([*RETURNS, "tensor", "tensor"]))
    wide = rng.random() < 0.5 and all_float32(model)
    if wide:
        for module in everything(model).values():
            module.double()
    _set_modes(model, rng)
    sizes = [rng.choice([2, 2, 4]) for _ in range(rng.choice([1, 2, 3]))]
    space = [rng.choice([2, 3]) for _ in range(grower.dims)]
    images = [torch.randn(n, grower.channels, *space, dtype=torch.float64 if wide else torch.float32) for n in sizes]
    batches = [(x, torch.zeros(len(x))) for x in images] if rng.random() < 0.5 else images
    return Tree(seed, model, batches, grower.copies, wide)


def all_float32(model: nn.Module) -> bool:
    """Whether all parameters and buffers are, those that torch does not see too."""
    modules = everything(model).values()
    parts = [part for module in modules for part in (*module.parameters(), *module.buffers())]
    return not any(isinstance(module, InType) for module in modules) and all(
        part.dtype == torch.float32 for part in parts if part.is_floating_point()
    )


def _set_modes(model: nn.Module, rng: random.Random) -> None:
    model.train(rng.random() < 0.6)
    for module in everything(model).values():
        if rng.random() < 0.1:
            module.training = not module.training


def everything(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by every path to it: registered, or in lists, dicts and tuples."""
    found: dict[str, nn.Module] = {}

    def look(value: Any, path: str) -> None:
        if isinstance(value, nn.Module):
            found[path] = value
            parts = {**value._modules, **{k: v for k, v in value.__dict__.items() if not k.startswith("_")}}
            for key, part in parts.items():
                look(part, f"{path}.{key}")
        elif isinstance(value, dict):
            for key, part in value.items():
                look(part, f"{path}[{key!r}]")
        elif isinstance(value, (list, tuple)):
            for index, part in enumerate(value):
                look(part, f"{path}[{index}]")

    look(model, "model")
    return found

"""The residual net: its size, its maps, its blocks, and that it trains with every norm."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.errors import InputError
from normlab.models import build_model
from normlab.models.resnet import BasicBlock
from normlab.nn import NORMS

PLAIN = ("batch", "running", "group", "layer", "instance")


def train(model: nn.Module, x: Tensor, targets: Tensor, steps: int = 2) -> list[float]:
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.02), []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("norm", "count"), [("none", 172_042), *[(norm, 172_506) for norm in PLAIN]])
def test_parameters(norm, count):
    # Convolutions 16·3·9 + 4·16·16·9 + 32·(16 + 3·32)·9 + 64·(32 + 3·64)·9, linear 650, and γ, β for 464 channels.
    assert sum(parameter.numel() for parameter in build_model("resnet", norm, 10, 3).parameters()) == count


@pytest.mark.parametrize(("size", "maps"), [(32, [32, 16, 8]), (28, [28, 14, 7])])
@pytest.mark.parametrize("in_channels", [1, 3])
def test_maps(size, maps, in_channels):
    x, shapes = torch.randn(2, in_channels, size, size), []
    for layer in build_model("resnet", "batch", 7, in_channels):
        x = layer(x)
        if isinstance(layer, BasicBlock):
            shapes.append(tuple(x.shape[1:]))
    expected = [(channels, side, side) for channels, side in zip((16, 32, 64), maps, strict=True)]
    assert shapes == [shape for shape in expected for _ in range(2)]
    assert x.shape == (2, 7)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_trains(norm):
    torch.manual_seed(0)
    model = build_model("resnet", norm, num_classes=4, in_channels=3)
    losses = train(model, torch.randn(4, 3, 8, 8), torch.arange(4), steps=8)
    assert losses[-1] < losses[0]
    assert all(value.isfinite().all() for value in model.parameters())
    assert model.eval()(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_reaches_every_parameter(norm):
    torch.manual_seed(0)
    model = build_model("resnet", norm, num_classes=4, in_channels=1)
    F.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.arange(4)).backward()
    assert not [name for name, value in model.named_parameters() if value.grad is None or value.grad.abs().max() == 0]


def test_model_comes_from_the_global_seed():
    first, same, other = (torch.manual_seed(seed) and build_model("resnet", "batch", 10) for seed in (1, 1, 2))
    x, targets = torch.randn(4, 1, 8, 8), torch.arange(4)
    assert train(first, x, targets) == train(same, x, targets) != train(other, x, targets)


def test_shortcut_is_thinned_out_and_filled_up():
    block = BasicBlock(2, 5, stride=2, norm="batch")
    nn.init.zeros_(block.norm2.weight)
    x = torch.rand(1, 2, 5, 5)
    y = block(x)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert y.shape == (1, 5, 3, 3)
    assert y[:, 2:].abs().max() == 0


def test_block_is_its_formula():
    torch.manual_seed(0)
    block, x = BasicBlock(3, 3, 1, "none"), torch.randn(2, 3, 6, 6)
    inner = F.conv2d(x, block.conv1.weight, block.conv1.bias, padding=1).relu()
    expected = (x + F.conv2d(inner, block.conv2.weight, block.conv2.bias, padding=1)).relu()
    torch.testing.assert_close(block(x), expected)


def test_without_norm_convolutions_have_a_bias():
    assert all((conv.bias is not None) == (norm == "none") for norm in ("none", "batch") for conv in convs(norm))


def convs(norm: str) -> list[nn.Module]:
    return [module for module in build_model("resnet", norm, 10).modules() if isinstance(module, nn.Conv2d)]


def test_registered_norm_chooses_convolution_and_activation(monkeypatch):
    class OtherConv(nn.Conv2d):
        pass

    other = NORMS["batch"]._replace(activates=True, convs=(nn.Conv1d, OtherConv, nn.Conv3d))
    monkeypatch.setitem(NORMS, "other", other)
    model = build_model("resnet", "other", 10)
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())
    assert [type(conv) for conv in convs("other")] == [OtherConv] * 13
    block = BasicBlock(2, 2, 1, "other")
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 2, 4, 4)
    assert torch.equal(block(x), x)  # nothing follows the sum


def test_unknown_name():
    with pytest.raises(InputError, match="Did you mean 'resnet'"):
        build_model("resnt", "batch", 10)

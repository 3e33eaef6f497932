"""The lesson's net: its size, its maps, its activation and its initialisation."""

import itertools
import math

import pytest
import torch
from torch import nn

from normlab import lesson
from normlab.errors import InputError
from normlab.models import MODELS, GeneralRelu, build_model, conv_block, convnet, init_convolutions
from normlab.nn import NORMS, BatchNorm2d

WIDTHS = [8, 16, 32, 64, 64]


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def lessons_net(layer, **kwargs) -> nn.Sequential:
    data = lesson.DataBunch(None, None, c=10)
    return lesson.get_cnn_model(data, WIDTHS, layer, **kwargs)


@pytest.mark.parametrize(
    ("norm", "count"),
    [("none", 62_090), *[(norm, 62_274) for norm in ("batch", "running", "group", "layer", "instance")]],
)
def test_parameters(norm, count):
    assert parameters(build_model("convnet", norm, 10)) == count


@pytest.mark.parametrize(
    ("layer", "options", "count"),
    [
        (lesson.conv_layer, {}, 62_090),
        (lesson.conv_layer, {"bn": True}, 62_274),
        (lesson.conv_bn, {}, 62_274),
        (lesson.conv_rbn, {}, 62_274),
        (lesson.conv_ln, {}, 62_100),  # with bias, and two numbers a norm
        (lesson.conv_in, {}, 62_458),  # with bias
        *[
            (layer, {"bn": False}, 62_090)
            for layer in (lesson.conv_bn, lesson.conv_rbn, lesson.conv_ln, lesson.conv_in)
        ],
    ],
)
def test_parameters_of_the_lessons_layers(layer, options, count):
    assert parameters(lessons_net(layer, **options)) == count


@pytest.mark.parametrize("model", [build_model("convnet", "batch", 10), lessons_net(lesson.conv_layer, bn=True)])
def test_maps(model):
    x, sizes = torch.randn(2, 1, 28, 28), []
    for layer in model:
        x = layer(x)
        sizes.append(tuple(x.shape[1:]))
    maps = [(8, 14, 14), (16, 7, 7), (32, 4, 4), (64, 2, 2), (64, 1, 1)]
    assert sizes == [*maps, (64, 1, 1), (64,), (10,)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_every_norm_trains(norm, batch_size):
    model = build_model("convnet", norm, num_classes=4, in_channels=3)
    y = model(torch.randn(batch_size, 3, 32, 32))
    assert y.shape == (batch_size, 4)
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_model_comes_from_the_global_seed():
    first, same, other = (torch.manual_seed(seed) and build_model("convnet", "batch", 10) for seed in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in model.parameters()]) for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_unknown_names():
    with pytest.raises(InputError, match=r"model='convnets' is unknown\. Did you mean 'convnet'\?"):
        build_model("convnets", "batch", 10)
    with pytest.raises(InputError, match=r"norm='bach' is unknown\. Did you mean 'batch'\?"):
        build_model("convnet", "bach", 10)
    assert list(MODELS) == ["convnet", "resnet"]


def test_convnet_with_blocks_and_widths_of_its_own():
    seen = []

    def block(*args):
        seen.append(args)
        return conv_block(*args)

    model = convnet(block, num_classes=3, in_channels=2, widths=[4, 6])
    assert seen == [(2, 4, 5), (4, 6, 3)]
    assert model(torch.randn(2, 2, 9, 9)).shape == (2, 3)


# --- conv_block and the lesson's layers -------------------------------------------------------------------------------


def test_block_is_convolution_activation_norm():
    plain, normed = conv_block(2, 4), conv_block(2, 4, norm=BatchNorm2d)
    assert [type(layer) for layer in plain] == [nn.Conv2d, GeneralRelu]
    assert [type(layer) for layer in normed] == [nn.Conv2d, GeneralRelu, BatchNorm2d]
    assert plain[0].bias is not None
    assert normed[0].bias is None
    assert normed[2].num_features == 4


def test_block_whose_norm_activates():
    block = conv_block(2, 4, norm=BatchNorm2d, activates=True)
    assert [type(layer) for layer in block] == [nn.Conv2d, BatchNorm2d]


def test_block_whose_norm_has_no_bias():
    assert conv_block(2, 4, norm=lambda channels: nn.BatchNorm2d(channels, affine=False))[0].bias is not None
    assert conv_block(2, 4, norm=lambda channels: nn.BatchNorm2d(channels, affine=False), bias=False)[0].bias is None


def test_registered_norm_chooses_convolution_and_activation(monkeypatch):
    class OtherConv(nn.Conv2d):
        pass

    other = NORMS["batch"]._replace(activates=True, convs=(nn.Conv1d, OtherConv, nn.Conv3d))
    monkeypatch.setitem(NORMS, "other", other)
    block = build_model("convnet", "other", 10)[0]
    assert [type(layer) for layer in block] == [OtherConv, BatchNorm2d]
    assert block[0].weight.std().item() == pytest.approx(math.sqrt(2 / 1.01 / 25), rel=0.3)  # initialised


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [None, BatchNorm2d])
def test_block_with_a_given_bias(norm, bias):
    assert (conv_block(2, 4, norm=norm, bias=bias)[0].bias is not None) == bias


@pytest.mark.parametrize(
    ("kernel_size", "stride", "size"), [(3, 2, 14), (5, 2, 14), (3, 1, 28), (1, 1, 28), (7, 2, 14)]
)
def test_block_pads_by_half_the_kernel(kernel_size, stride, size):
    block = conv_block(1, 2, kernel_size, stride=stride)
    assert block(torch.randn(1, 1, 28, 28)).shape == (1, 2, size, size)


def test_block_with_another_activation():
    tanh = nn.Tanh()
    assert conv_block(1, 2, activation=tanh)[1] is tanh


@pytest.mark.parametrize(
    ("layer", "norm", "bias"),
    [
        (lesson.conv_bn, lesson.BatchNorm, False),
        (lesson.conv_rbn, lesson.RunningBatchNorm, False),
        (lesson.conv_ln, lesson.LayerNorm, True),
        (lesson.conv_in, lesson.InstanceNorm, True),
        (lambda *args, **kwargs: lesson.conv_layer(*args, bn=True, **kwargs), nn.BatchNorm2d, False),
    ],
)
def test_lessons_layers(layer, norm, bias):
    conv, relu, normed = layer(2, 4, leak=0.1, sub=0.4, maxv=6.0)
    assert (relu.leak, relu.sub, relu.maxv) == (0.1, 0.4, 6.0)
    assert type(normed) is norm
    assert (conv.bias is not None) == bias
    assert (conv.kernel_size, conv.stride, conv.padding) == ((3, 3), (2, 2), (1, 1))


# --- GeneralRelu ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("leak", "sub", "maxv"), list(itertools.product([None, 0.1], [None, 0.4], [None, 0.5])))
def test_every_general_relu_trains(leak, sub, maxv):
    """It is min(relu(x) − sub, maxv), and so is its derivative, on both sides of each kink."""
    x = torch.tensor([-2.0, -0.5, 0.25, 0.6, 0.85, 0.95, 3.0], requires_grad=True)
    y = GeneralRelu(leak, sub, maxv)(x)
    grad = torch.arange(1.0, 8.0)
    y.backward(grad)
    for i, value in enumerate(x.tolist()):
        slope = 1.0 if value > 0 else leak or 0.0
        unclamped = slope * value - (sub or 0.0)
        clamped = maxv is not None and unclamped > maxv
        assert y[i].item() == pytest.approx(maxv if clamped else unclamped, abs=1e-6)
        assert x.grad[i].item() == pytest.approx(0.0 if clamped else slope * grad[i].item(), abs=1e-6)


@pytest.mark.parametrize(("leak", "sub", "maxv"), list(itertools.product([None, 0.1], [None, 0.4], [None, 6.0])))
def test_net_trains_with_every_general_relu(leak, sub, maxv):
    torch.manual_seed(0)
    model = lessons_net(lesson.conv_layer, leak=leak, sub=sub, maxv=maxv)
    lesson.init_cnn(model)
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_general_relu_leaves_its_input_alone():
    x = torch.tensor([-1.0, 8.0])
    GeneralRelu(0.1, 0.4, 6.0)(x)
    assert x.tolist() == [-1.0, 8.0]


def test_general_relu_says_what_it_is():
    assert repr(GeneralRelu(0.1, None, 6.0)) == "GeneralRelu(leak=0.1, sub=None, maxv=6.0)"


# --- initialisation ---------------------------------------------------------------------------------------------------

SLOPE = 0.1


def nested() -> nn.Module:
    """Convolutions of 1, 2 and 3 dimensions, some of them deep inside; the first is the model's own child."""
    inner = nn.Sequential(nn.Sequential(nn.ModuleDict({"deep": nn.Conv2d(16, 64, 3)})))
    return nn.ModuleList([nn.Conv2d(8, 32, 5), inner, nn.Conv1d(32, 64, 3), nn.Conv3d(4, 32, 3), nn.Linear(50, 50)])


@pytest.mark.parametrize("init", [init_convolutions, lesson.init_cnn])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("build", [nested, lambda: lessons_net(lesson.conv_layer), lambda: nn.Conv2d(8, 64, 3)])
def test_initialisation_at_any_depth(build, uniform, init):
    torch.manual_seed(0)
    model = build()
    init(model, uniform=uniform)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    assert convolutions
    for conv in convolutions:
        fan_in = conv.in_channels * math.prod(conv.kernel_size)
        deviation = math.sqrt(2 / (1 + SLOPE**2)) / math.sqrt(fan_in)
        count = conv.weight.numel()
        assert conv.weight.std().item() == pytest.approx(deviation, rel=4 / math.sqrt(2 * count))
        assert conv.weight.mean().abs() < 4 * deviation / math.sqrt(count)
        bound, largest = math.sqrt(3) * deviation, conv.weight.abs().max()
        assert (0.9 * bound < largest <= bound * (1 + 1e-6)) if uniform else largest > bound * 1.1
        assert torch.equal(conv.bias, torch.zeros_like(conv.bias))


def test_initialisation_leaves_the_rest_alone():
    model = nested()
    before = model[-1].weight.clone()
    assert init_convolutions(model) is model
    assert torch.equal(model[-1].weight, before)


def test_initialisation_without_bias():
    assert init_convolutions(nn.Conv2d(2, 4, 3, bias=False)).bias is None


def test_built_net_is_initialised():
    model = build_model("convnet", "none", 10)
    assert all(m.bias.abs().max() == 0 for m in model.modules() if isinstance(m, nn.Conv2d))

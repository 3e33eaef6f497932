"""The convolutions before a norm are torch's with other weights, which equal their formula in float64."""

import math

import pytest
import torch
from torch import Tensor, nn

from normlab.errors import InputError
from normlab.nn.convolution import (
    CenteredConv1d,
    CenteredConv2d,
    CenteredConv3d,
    WeightStandardizedConv1d,
    WeightStandardizedConv2d,
    WeightStandardizedConv3d,
    standardize_weight,
)

TORCHS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
STANDARDIZED = {1: WeightStandardizedConv1d, 2: WeightStandardizedConv2d, 3: WeightStandardizedConv3d}
CENTERED = {1: CenteredConv1d, 2: CenteredConv2d, 3: CenteredConv3d}
OPTIONS = [
    {},
    {"bias": False},
    {"stride": 2, "padding": 1},
    {"padding": "same", "padding_mode": "circular"},
    {"groups": 2, "dilation": 2},
]


def standardized(weight: Tensor, eps: float) -> Tensor:
    """The formula, filter by filter."""
    filters = []
    for values in weight:
        mean = values.sum() / values.numel()
        var = ((values - mean) ** 2).sum() / values.numel()
        filters.append((values - mean) / (var + eps).sqrt())
    return torch.stack(filters)


def step(conv: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and the gradients of the input and of the parameters."""
    x = x.clone().requires_grad_()
    conv.zero_grad()
    y = conv(x)
    y.pow(3).sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in conv.parameters())]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_weight_standardized_is_torchs_with_standardized_weights(dims, options):
    """Forward and gradients, with the state of torch's convolution and any of its options."""
    torch.manual_seed(0)
    torchs = TORCHS[dims](4, 6, 3, **options).double()
    ours = STANDARDIZED[dims](4, 6, 3, eps=0.01, **options).double()
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 4, *[7] * dims).double()
    actual = step(ours, x)

    weight = torchs.weight
    leaf = weight.detach().clone().requires_grad_()
    with torch.no_grad():
        weight.copy_(standardized(weight, 0.01))
    expected = step(torchs, x)
    standardized(leaf, 0.01).backward(expected[2])  # the chain rule, from Ŵ to W
    expected[2] = leaf.grad
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_weight_standardized_ignores_shift_and_scale_of_the_weights():
    torch.manual_seed(0)
    conv, x = WeightStandardizedConv2d(3, 4, 3, bias=False), torch.randn(2, 3, 8, 8)
    before = conv(x)
    with torch.no_grad():
        conv.weight.mul_(5).add_(2)
    torch.testing.assert_close(conv(x), before, rtol=1e-4, atol=1e-4)


def test_standardized_weights_have_mean_0_and_variance_1():
    weight = standardize_weight(torch.randn(5, 3, 4, 4) * 0.01 + 7)
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.zeros(5), rtol=0, atol=1e-3)
    torch.testing.assert_close(weight.var((1, 2, 3), unbiased=False), torch.ones(5), rtol=1e-3, atol=0)


@pytest.mark.parametrize("weight", [torch.randn(4, 1, 1, 1), torch.full((4, 3, 3, 3), 0.25)], ids=["one", "equal"])
def test_a_constant_filter_gives_zero_and_a_finite_gradient(weight):
    conv = WeightStandardizedConv2d(weight.shape[1], 4, weight.shape[2])
    with torch.no_grad():
        conv.weight.copy_(weight)
        conv.bias.fill_(3)
    y = conv(torch.randn(2, weight.shape[1], 5, 5))
    torch.testing.assert_close(y, torch.full_like(y, 3), rtol=0, atol=1e-6)
    y.pow(2).sum().backward()
    assert conv.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_standardized_in_float32(dtype):
    weight = torch.randn(4, 64, 5, 5) * 0.01
    half = standardize_weight(weight.to(dtype))
    assert half.dtype == dtype
    expected = standardized(weight.to(dtype).double(), 1e-10)
    torch.testing.assert_close(half.double(), expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_weight_standardized_works_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert WeightStandardizedConv2d(3, 4, 3)(torch.randn(2, 3, 8, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_scale_of_the_output(dims):
    """Unit inputs come out with the deviation √fan-in, whatever the weights were."""
    torch.manual_seed(0)
    conv = STANDARDIZED[dims](8, 16, 3, bias=False)
    deviation = conv(torch.randn(50, 8, *[6] * dims)).std().item()
    assert deviation == pytest.approx(math.sqrt(8 * 3**dims), rel=0.1)


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    conv, x = WeightStandardizedConv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    compiled = torch.compile(conv, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), conv(x))


def test_eps_must_be_above_zero():
    with pytest.raises(InputError, match="eps=0"):
        WeightStandardizedConv2d(3, 4, 3, eps=0)


def test_weight_standardized_says_what_it_is():
    assert repr(WeightStandardizedConv1d(3, 4, 5, stride=2)) == (
        "WeightStandardizedConv1d(3, 4, kernel_size=(5,), stride=(2,), eps=1e-10)"
    )


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_centered_is_torchs_with_centered_weights(dims, options):
    """Forward and gradients: that of the weights is centred too, filter by filter."""
    torch.manual_seed(0)
    torchs = TORCHS[dims](4, 6, 3, **options).double()
    ours = CENTERED[dims](4, 6, 3, **options).double()
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(2, 4, *[7] * dims).double()
    actual = step(ours, x)

    with torch.no_grad():
        torchs.weight.copy_(torch.stack([values - values.sum() / values.numel() for values in torchs.weight]))
    expected = step(torchs, x)
    expected[2] = torch.stack([grad - grad.sum() / grad.numel() for grad in expected[2]])
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_centered_ignores_what_all_inputs_have_in_common():
    torch.manual_seed(0)
    conv, x = CenteredConv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(conv(x + 7), conv(x), rtol=1e-4, atol=1e-4)

"""EvoNorm-S0 and EvoNorm-B0 equal their formulas in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import assert_close, double, dtypes, gradients, layouts, step, with_drawn_parameters
from normlab.errors import InputError
from normlab.nn.evonorm import EvoNorm1dB0, EvoNorm2dB0, EvoNorm3dB0, EvoNormS0

B0 = {1: EvoNorm1dB0, 2: EvoNorm2dB0, 3: EvoNorm3dB0}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # of `assert_close`
EPS = 0.01


def variance(values: Tensor) -> Tensor:
    return ((values - values.sum() / values.numel()) ** 2).sum() / values.numel()


def s0(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, groups: int) -> Tensor:
    images, size = [], x.shape[1] // groups
    for image in x:
        channels = []
        for c, values in enumerate(image):
            group = image[c // size * size : (c // size + 1) * size]
            swish = values / (1 + (-v[c] * values).exp())
            channels.append(weight[c] * swish / (variance(group) + EPS).sqrt() + bias[c])
        images.append(torch.stack(channels))
    return torch.stack(images)


def b0(x: Tensor, weight: Tensor, bias: Tensor, v: Tensor, batch_var: Tensor | None = None) -> Tensor:
    channels = []
    for c in range(x.shape[1]):
        var = variance(x[:, c]) if batch_var is None else batch_var[c]
        images = []
        for values in x[:, c]:
            below = (v[c] * values + (variance(values) + EPS).sqrt()).maximum((var + EPS).sqrt())
            images.append(weight[c] * values / below + bias[c])
        channels.append(torch.stack(images))
    return torch.stack(channels, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_s0_equals_its_formula_in_float64(data):
    """Over shapes, types, layouts and modes; groups of a single value too."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    channels = data.draw(st.sampled_from([1, 2, 4, 6]))
    groups = data.draw(st.sampled_from([g for g in (1, 2, 4, 6) if channels % g == 0]))
    space = data.draw(st.lists(st.integers(1, 3), max_size=3))
    dtype = data.draw(dtypes)
    layout = data.draw(layouts)
    layer = with_drawn_parameters(EvoNormS0(channels, groups, EPS)).train(data.draw(st.booleans()))
    if data.draw(st.booleans()) or dtype == torch.float64:
        layer.to(dtype)
    batch = data.draw(st.integers(1, 3))
    x, grad = (torch.randn(batch, channels, *space).to(dtype) for _ in range(2))
    actual = step(layer, layout(x), grad)
    expected = gradients(lambda *inputs: s0(*inputs, groups), grad.double(), x.double(), *double(layer.parameters()))
    assert [actual[0].dtype, actual[1].dtype] == [dtype] * 2
    assert_close(actual, expected, TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_b0_equals_its_formula_in_float64(data):
    """Over shapes, layouts and batch sizes: output, gradients and running variance at every step; then evaluation."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    space = data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    layout = data.draw(layouts)
    momentum = data.draw(st.sampled_from([0.1, 1.0]))
    layer = with_drawn_parameters(B0[max(dims, 1)](channels, EPS, momentum, dtype=torch.float64))
    running, sizes = torch.ones(channels).double(), data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    for size in sizes:
        x, grad = (torch.randn(size, channels, *space).double() for _ in range(2))
        assert_close(step(layer, layout(x), grad), gradients(b0, grad, x, *double(layer.parameters())), 1e-9)
        n = size * math.prod(space)
        if n > 1:
            unbiased = torch.stack([variance(x[:, c]) for c in range(channels)]) * n / (n - 1)
            running = (1 - momentum) * running + momentum * unbiased
        assert_close([layer.running_var], [running], 1e-9)
    assert layer.num_batches_tracked == len(sizes)
    layer.eval()
    x, grad = (torch.randn(2, channels, *space).double() for _ in range(2))
    expected = gradients(lambda *inputs: b0(*inputs, running), grad, x, *double(layer.parameters()))
    assert_close(step(layer, layout(x), grad), expected, 1e-9)
    assert_close([layer.running_var], [running], 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", [False, True])
def test_b0_in_less_precision(dtype, cast):
    torch.manual_seed(0)
    layer = with_drawn_parameters(EvoNorm2dB0(3, EPS)).to(dtype if cast else torch.float32)
    x = torch.randn(4, 3, 5, 5).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    assert layer.running_var.dtype == torch.float32
    assert_close([y], [b0(x.double(), *double(layer.parameters()))], TOLERANCE[dtype])
    assert_close([layer.running_var], [0.9 + 0.1 * x.double().var((0, 2, 3))], 1e-6)


def test_s0_without_v_is_half_group_norm_not_centred():
    x = torch.randn(2, 4, 3, 3)
    layer = EvoNormS0(4, 2)
    nn.init.zeros_(layer.v)
    centred = torch.group_norm(x, 2)
    mean = x.view(2, 2, -1).mean(2, keepdim=True)
    std = (x.view(2, 2, -1).var(2, correction=0, keepdim=True) + 1e-5).sqrt()
    expected = (centred.view(2, 2, -1) + mean / std).view_as(x) / 2
    torch.testing.assert_close(layer(x), expected)


def test_b0_of_small_values_is_batch_norm_not_centred():
    """With v = 0 and images that differ little in variance from the batch, the batch's own deviation is below."""
    torch.manual_seed(0)
    layer, x = EvoNorm1dB0(3), torch.randn(8, 3)  # without space the variance of an image is 0
    nn.init.zeros_(layer.v)
    torch.testing.assert_close(layer(x), x / (x.var(0, correction=0) + 1e-5).sqrt())


def test_b0_of_one_value():
    layer, x = EvoNorm2dB0(2), torch.tensor([[[[0.5]], [[-0.5]]]])
    root = math.sqrt(1e-5)
    torch.testing.assert_close(layer(x), torch.tensor([[[[0.5 / (0.5 + root)]], [[-0.5 / root]]]]))
    assert torch.equal(layer.running_var, torch.ones(2))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_b0_keeps_a_bad_batch_out_of_its_statistics(bad):
    layer, x = EvoNorm2dB0(3), torch.randn(4, 3, 2, 2)
    x[0, 0, 0, 0] = bad
    layer(x)
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 0


def test_b0_keeps_no_mean_and_resets():
    layer = with_drawn_parameters(EvoNorm2dB0(3))
    layer(torch.randn(4, 3, 2, 2))
    assert set(layer.state_dict()) == {"weight", "bias", "v", "running_var", "num_batches_tracked"}
    layer.reset_parameters()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in EvoNorm2dB0(3).state_dict().items())


@pytest.mark.parametrize("kind", [EvoNorm2dB0, EvoNormS0])
def test_without_affine(kind):
    torch.manual_seed(0)
    plain, affine = kind(8, affine=False), kind(8)
    x = torch.randn(2, 8, 3, 3)
    assert [name for name, _ in plain.named_parameters()] == ["v"]
    assert torch.equal(plain(x), affine(x))


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="num_groups=3"):
        EvoNormS0(8, 3)
    with pytest.raises(InputError, match=r"\(8\): expected input \(N, 8, "):
        EvoNormS0(8)(torch.randn(2, 1, 4, 4))
    with pytest.raises(InputError, match=r"\(8\): expected input \(N, 8, "):
        EvoNorm2dB0(8)(torch.randn(2, 8, 4))

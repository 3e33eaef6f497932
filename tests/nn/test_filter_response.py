"""Filter response norm equals its equations in float64, image by image and channel by channel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import assert_close, double, dtypes, gradients, layouts, with_drawn_parameters
from normlab.errors import InputError
from normlab.nn.filter_response import FilterResponseNorm, ThresholdedLinearUnit

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # of `assert_close`


def formula(x: Tensor, weight: Tensor, bias: Tensor, tau: Tensor, eps: Tensor) -> Tensor:
    images = []
    for image in x:
        channels = []
        for c, values in enumerate(image):
            nu2 = (values**2).sum() / values.numel()
            y = weight[c] * values / (nu2 + eps.squeeze()).sqrt() + bias[c]
            channels.append((y - tau[c]).relu() + tau[c])
        images.append(torch.stack(channels))
    return torch.stack(images)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_its_formula_in_float64(data):
    """Over shapes, types, layouts and modes; maps of one value too, with ε learned or not."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    space = data.draw(st.lists(st.integers(1, 3), max_size=3))
    dtype, learn = data.draw(dtypes), data.draw(st.booleans())
    layout = data.draw(layouts)
    layer = FilterResponseNorm(channels, eps=0.1, learn_eps=learn)
    with_drawn_parameters(layer).train(data.draw(st.booleans()))
    if data.draw(st.booleans()) or dtype == torch.float64:
        layer.to(dtype)
    x, grad = (torch.randn(batch, channels, *space).to(dtype) for _ in range(2))
    parameters = [layer.weight, layer.bias, layer.activation.tau]
    wide = double([x, *parameters])
    e = layer.learned_eps.detach().double() if learn else torch.zeros(1).double()
    # A value close to its threshold may fall on either side of it.
    y, tau = formula(*wide[:3], torch.full((channels,), -1e9).double(), 0.1 + e.abs()), wide[3]
    near = (y.movedim(1, -1) - tau).movedim(-1, 1).abs() < 0.05 * (1 + y.abs().max())
    grad = grad.masked_fill(near, 0)

    actual = [*gradients(layer, grad, layout(x)), *(value.grad for value in parameters)]
    if learn:
        actual.append(layer.learned_eps.grad)
    expected = gradients(lambda *inputs: formula(*inputs[:4], 0.1 + inputs[4].abs()), grad.double(), *wide, e)
    assert [actual[0].dtype, actual[1].dtype] == [dtype] * 2
    assert_close(actual, expected if learn else expected[:-1], TOLERANCE[dtype])


def test_each_image_and_channel_is_by_itself():
    torch.manual_seed(0)
    layer, x = FilterResponseNorm(3), torch.randn(4, 3, 2, 2)
    y = layer(x)
    x[0], x[:, 0] = 100, -100
    torch.testing.assert_close(layer(x)[1:, 1:], y[1:, 1:], rtol=0, atol=0)


def test_scale_of_the_input_does_not_matter():
    torch.manual_seed(0)
    layer, x = FilterResponseNorm(3, eps=0.0), torch.randn(4, 3, 2, 2)
    scales = torch.rand(4, 3, 1, 1) + 0.5
    torch.testing.assert_close(layer(x * scales), layer(x))


def test_fresh_layer_is_relu_of_the_normalized():
    x = torch.randn(4, 3, 5, 5)
    expected = (x / (x.square().mean((2, 3), keepdim=True) + 1e-6).sqrt()).relu()
    torch.testing.assert_close(FilterResponseNorm(3)(x), expected)
    torch.testing.assert_close(FilterResponseNorm(3, affine=False)(x), expected)


@pytest.mark.parametrize(("learn", "eps"), [(False, 0.5), (True, 0.5001)])
def test_map_of_one_value_is_a_soft_sign(learn, eps):
    layer = FilterResponseNorm(2, eps=0.5, learn_eps=learn)
    nn.init.constant_(layer.activation.tau, -9)
    x = torch.tensor([[[[2.0]], [[-0.1]]]])
    torch.testing.assert_close(layer(x), x / (x * x + eps).sqrt())
    torch.testing.assert_close(layer(x.flatten(1)), layer(x).flatten(1))


def test_threshold_is_per_channel():
    layer, y = ThresholdedLinearUnit(3), torch.randn(4, 3, 2, 2)
    layer.tau.data = torch.tensor([-1.0, 0.0, 1.0])
    expected = torch.stack([y[:, c].clamp(min=c - 1) for c in range(3)], 1)
    assert torch.equal(layer(y), expected)
    assert layer(y.half()).dtype == torch.float16


@pytest.mark.parametrize("kind", [FilterResponseNorm, ThresholdedLinearUnit])
def test_bad_arguments_are_refused(kind):
    with pytest.raises(InputError, match="num_features=0"):
        kind(0)
    with pytest.raises(InputError, match=r"\(3\): expected input \(N, 3, \*space\), got \(2, 1, 4, 4\)"):
        kind(3)(torch.randn(2, 1, 4, 4))

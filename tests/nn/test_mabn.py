"""Moving-average batch norm equals its authors' equations in float64, forward and backward, over batches."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checks import dtypes, gradients
from normlab.errors import InputError
from normlab.nn.mabn import MovingAverageBatchNorm1d, MovingAverageBatchNorm2d, MovingAverageBatchNorm3d

LAYERS = {1: MovingAverageBatchNorm1d, 2: MovingAverageBatchNorm2d, 3: MovingAverageBatchNorm3d}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHORT = {"buffer_size": 2, "warmup_iters": 2, "correction_iters": 3, "max_correction": 1.5}


class Equations:
    """MABN of one channel of `values`, in plain numbers."""

    def __init__(self, rate: float, eps: float, buffer_size, warmup_iters, correction_iters, max_correction):
        self.rate, self.eps, self.size, self.warmup = rate, eps, buffer_size, warmup_iters
        self.correction_iters, self.max_correction = correction_iters, max_correction
        self.moments, self.products, self.running = [], [], 1.0

    def forward(self, values: np.ndarray) -> np.ndarray:
        """The normalised values, before γ and β."""
        self.moments.append((values**2).mean())
        self.chi = math.sqrt(self.average(self.moments) + self.eps)
        self.r = 1.0
        if len(self.moments) > self.correction_iters:
            ratio = self.chi / math.sqrt(self.running + self.eps)
            self.r = min(max(ratio, 1 / self.max_correction), self.max_correction)
        self.running = (1 - self.rate) * self.running + self.rate * (self.chi**2 - self.eps)
        self.z = values / self.chi
        return self.r * self.z

    def backward(self, grad: np.ndarray) -> np.ndarray:
        """The gradient of the values from that of the normalised values."""
        self.products.append((self.r * grad * self.z).mean())
        return (self.r * grad - self.z * self.average(self.products)) / self.chi

    def evaluate(self, values: np.ndarray) -> np.ndarray:
        return values / math.sqrt(self.running + self.eps)

    def average(self, history: list[float]) -> float:
        return float(np.mean(history[-self.size :])) if len(history) > self.warmup else history[-1]


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(actual.double().numpy() - expected).max()
    assert error <= tolerance * (1 + np.abs(expected).max()), f"off by {error}"


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_equations_in_float64(data):
    """Over shapes, types and layouts: output, gradients and the statistic of evaluation at every step."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims = data.draw(st.integers(0, 3))
    channels, space = data.draw(st.integers(1, 3)), data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    dtype = data.draw(dtypes)
    rate, eps, options = data.draw(st.sampled_from([0.1, 0.7])), 0.01, data.draw(st.sampled_from([SHORT, {}]))
    layer = LAYERS[max(dims, 1)](channels, eps, rate, **options)
    defaults = {"buffer_size": 16, "warmup_iters": 100, "correction_iters": 1000, "max_correction": 5.0}
    equations = [Equations(rate, eps, **(options or defaults)) for _ in range(channels)]
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.to(dtype)
    weight, bias = (value.detach().double().numpy() for value in (layer.weight, layer.bias))

    for size in data.draw(st.lists(st.sampled_from([1, 2, 5]), min_size=3, max_size=7)):
        x, grad = (torch.randn(size, channels, *space).to(dtype) for _ in range(2))
        x = (x * data.draw(st.sampled_from([0.5, 3.0])) + 0.2).transpose(0, -1).contiguous().transpose(0, -1)
        layer.zero_grad()
        y, grad_x = gradients(layer, grad, x)
        assert y.dtype == grad_x.dtype == dtype
        for c, channel in enumerate(equations):
            values, grads = x[:, c].double().numpy(), grad[:, c].double().numpy()
            normal = channel.forward(values)
            assert_close(y[:, c], normal * weight[c] + bias[c], TOLERANCE[dtype])
            assert_close(grad_x[:, c], channel.backward(grads * weight[c]), TOLERANCE[dtype])
            assert_close(layer.weight.grad[c], (grads * normal).sum(), TOLERANCE[dtype])
            assert_close(layer.bias.grad[c], grads.sum(), TOLERANCE[dtype])
            assert_close(layer.running_var[c], np.array(channel.running), min(TOLERANCE[dtype], 1e-4))

    layer.eval()
    x = torch.randn(2, channels, *space).to(dtype)
    for c, channel in enumerate(equations):
        expected = channel.evaluate(x[:, c].double().numpy()) * weight[c] + bias[c]
        assert_close(layer(x)[:, c].detach(), expected, TOLERANCE[dtype])
    assert not layer.running_mean.any()


def test_warm_up_has_the_gradient_of_the_formula():
    """While a batch counts alone, the gradient is autograd's through the batch's own second moment."""
    torch.manual_seed(0)
    layer = MovingAverageBatchNorm2d(3)
    x, grad = torch.randn(4, 3, 2, 2) + 1, torch.randn(4, 3, 2, 2)
    expected = gradients(lambda x: x * (x.square().mean((0, 2, 3), keepdim=True) + layer.eps).rsqrt(), grad, x)
    torch.testing.assert_close(gradients(layer, grad, x), expected)


def test_evaluation_is_one_affine_map_a_channel():
    torch.manual_seed(0)
    layer = MovingAverageBatchNorm2d(3, momentum=0.5)
    layer(3 * torch.randn(4, 3, 2, 2))
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    scale = layer.weight / (layer.running_var + layer.eps).sqrt()
    x = torch.randn(4, 3, 2, 2)
    torch.testing.assert_close(layer.eval()(x), x * scale.view(3, 1, 1) + layer.bias.view(3, 1, 1))


def test_forward_passes_alone_leave_the_backward_average():
    """Ten passes without gradient, more than the warm-up: the first backward pass is still the first of its average."""
    torch.manual_seed(0)
    layers = [MovingAverageBatchNorm1d(2, **SHORT | {"correction_iters": 100}) for _ in range(2)]
    x, grad = torch.randn(4, 2), torch.randn(4, 2)
    with torch.no_grad():
        for _ in range(10):
            layers[0](x)
    torch.testing.assert_close(gradients(layers[0], grad, x), gradients(layers[1], grad, x))


def test_two_forward_passes_before_a_backward_pass():
    torch.manual_seed(0)
    layer = MovingAverageBatchNorm1d(2, **SHORT)
    x = torch.randn(4, 2, requires_grad=True)
    (layer(x) + layer(2 * x)).sum().backward()
    assert layer.num_gradients_tracked == layer.num_batches_tracked == 2


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_bad_gradient_leaves_the_average(bad):
    torch.manual_seed(0)
    layer = MovingAverageBatchNorm1d(2, **SHORT)
    x, grad = torch.randn(4, 2), torch.randn(4, 2)
    gradients(layer, grad, x)
    before = layer.recent_products.clone()
    gradients(layer, grad * bad, x)
    assert torch.equal(layer.recent_products, before)
    assert layer.num_gradients_tracked == 1


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_divides_as_the_first_pass_did(use_reentrant):
    """The second pass comes after the averages moved, and must not see that; the backward average moves once."""
    torch.manual_seed(0)
    layers = [MovingAverageBatchNorm2d(3, **SHORT) for _ in range(2)]
    for _ in range(5):
        x, grad = 2 * torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
        plain = gradients(layers[0], grad, x)
        again = gradients(lambda x: checkpoint(layers[1], x, use_reentrant=use_reentrant), grad, x)
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
        pairs = zip(layers[0].buffers(), layers[1].buffers(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_reset_forgets_everything():
    layer = MovingAverageBatchNorm1d(2, **SHORT)
    fresh = {name: value.clone() for name, value in layer.state_dict().items()}
    gradients(layer, torch.randn(4, 2), torch.randn(4, 2))
    layer.reset_running_stats()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    ("argument", "value"), [("buffer_size", 0), ("warmup_iters", 15), ("correction_iters", -1), ("max_correction", 0.9)]
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(InputError, match=argument):
        MovingAverageBatchNorm2d(3, **{argument: value})

"""Online norm equals its paper's recursions in float64, image after image, forward and backward."""

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
from normlab.nn.online import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d

LAYERS = {1: OnlineNorm1d, 2: OnlineNorm2d, 3: OnlineNorm3d}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


class Recursion:
    """Online norm of one channel, one image at a time, in plain numbers: `a` is α, `b` is α_b."""

    def __init__(self, a: float, b: float, eps: float):
        self.a, self.b, self.eps = a, b, eps
        self.mean, self.var, self.e, self.h = 0.0, 1.0, 0.0, 0.0
        self.passed = []  # y and σ of the images that wait for their gradient

    def forward(self, values: np.ndarray) -> np.ndarray:
        sigma = math.sqrt(self.var + self.eps)
        y = (values - self.mean) / sigma
        self.passed.append((y, sigma))
        distance = values.mean() - self.mean
        self.var = self.a * self.var + (1 - self.a) * values.var() + self.a * (1 - self.a) * distance**2
        self.mean = self.a * self.mean + (1 - self.a) * values.mean()
        return y

    def backward(self, grad: np.ndarray) -> np.ndarray:
        y, sigma = self.passed.pop(0)
        grad = grad - (1 - self.b) * self.e * y
        self.e += (grad * y).mean()
        grad = grad / sigma - (1 - self.b) * self.h
        self.h += grad.mean()
        return grad

    def evaluate(self, values: np.ndarray) -> np.ndarray:
        return (values - self.mean) / math.sqrt(self.var + self.eps)


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(actual.double().numpy() - expected).max()
    assert error <= tolerance * (1 + np.abs(expected).max()), f"off by {error}"


def assert_same_buffers(one: nn.Module, other: nn.Module) -> None:
    for (name, a), (_, b) in zip(one.named_buffers(), other.named_buffers(), strict=True):
        if name != "num_batches_tracked":
            torch.testing.assert_close(a, b, msg=name)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_the_recursions_in_float64(data):
    """Over shapes, types, layouts and batch sizes, without guard: output, gradients and buffers at every step."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims = data.draw(st.integers(0, 3))
    channels, space = data.draw(st.integers(1, 3)), data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    dtype = data.draw(dtypes)
    momentum, backward, eps = data.draw(st.sampled_from([0.001, 0.3])), data.draw(st.sampled_from([0.01, 0.2])), 0.01
    layer = LAYERS[max(dims, 1)](channels, eps, momentum, backward_momentum=backward, guard="none")
    recursions = [Recursion(1 - momentum, 1 - backward, eps) for _ in range(channels)]
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    layer.to(dtype)
    weight, bias = (value.detach().double().numpy() for value in (layer.weight, layer.bias))

    for size in data.draw(st.lists(st.sampled_from([1, 2, 5, 9]), min_size=1, max_size=4)):
        x, grad = (torch.randn(size, channels, *space).to(dtype) for _ in range(2))
        x = (x + 0.5).transpose(0, -1).contiguous().transpose(0, -1)
        layer.zero_grad()
        y, grad_x = gradients(layer, grad, x)
        assert y.dtype == grad_x.dtype == dtype
        for c, channel in enumerate(recursions):
            images, grads = x[:, c].double().numpy(), grad[:, c].double().numpy()
            normal = np.stack([channel.forward(image) for image in images])
            steered = np.stack([channel.backward(one * weight[c]) for one in grads])
            assert_close(y[:, c], normal * weight[c] + bias[c], TOLERANCE[dtype])
            assert_close(grad_x[:, c], steered, TOLERANCE[dtype])
            assert_close(layer.weight.grad[c], (grads * normal).sum(), TOLERANCE[dtype])
            assert_close(layer.bias.grad[c], grads.sum(), TOLERANCE[dtype])
            state = (layer.running_mean, layer.running_var, layer.error_product, layer.error_mean)
            for buffer, value in zip(state, (channel.mean, channel.var, channel.e, channel.h), strict=True):
                assert_close(buffer[c], np.array(value), min(TOLERANCE[dtype], 1e-4))

    layer.eval()
    x = torch.randn(2, channels, *space).to(dtype)
    for c, channel in enumerate(recursions):
        expected = channel.evaluate(x[:, c].double().numpy()) * weight[c] + bias[c]
        assert_close(layer(x)[:, c].detach(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("guard", ["scale", "clamp", "none"])
def test_the_split_into_batches_does_not_matter(guard):
    """37 images at once, or in batches of 1, 20 and 16: the same outputs, gradients and buffers."""
    torch.manual_seed(0)
    whole, split = (OnlineNorm2d(3, momentum=0.05, guard=guard) for _ in range(2))
    x, grad = torch.randn(37, 3, 4, 4) + 1, torch.randn(37, 3, 4, 4)
    parts = [gradients(split, g, part) for part, g in zip(x.split([1, 20, 16]), grad.split([1, 20, 16]), strict=True)]
    y, grad_x = (torch.cat(part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(gradients(whole, grad, x), [y, grad_x], rtol=1e-5, atol=1e-5)
    assert_same_buffers(whole, split)


def test_steering_takes_mean_and_product_out_of_the_gradient():
    """On a steady stream the gradient that goes on has, over time, no mean and no product with y."""
    torch.manual_seed(0)
    layer = OnlineNorm1d(1, guard="none").double()
    x = torch.randn(4000, 1).double()
    y, grad_x = gradients(layer, 1 + 2 * x + torch.randn(4000, 1), x)
    assert grad_x[:100].mean() > 0.2
    assert abs(grad_x[1000:].mean()) < 0.05
    assert abs((grad_x * y)[1000:].mean()) < 0.05


def test_guards():
    torch.manual_seed(0)
    x = 100 * torch.randn(3, 2, 4, 4)
    for mode in (True, False):
        scale, clamp, none = (OnlineNorm2d(2, guard=guard).train(mode) for guard in ("scale", "clamp", "none"))
        plain = none(x)
        torch.testing.assert_close(clamp(x), plain.clamp(-5, 5))
        root = (plain.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
        torch.testing.assert_close(scale(x), plain / root)


def test_two_forward_passes_before_a_backward_pass():
    torch.manual_seed(0)
    layer = OnlineNorm1d(2)
    x = torch.randn(4, 2, requires_grad=True)
    (layer(x) + layer(2 * x)).sum().backward()
    assert layer.error_mean.all()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_bad_gradient_leaves_the_errors(bad):
    torch.manual_seed(0)
    layer = OnlineNorm1d(2)
    x, grad = torch.randn(4, 2), torch.randn(4, 2)
    gradients(layer, grad, x)
    before = [layer.error_product.clone(), layer.error_mean.clone()]
    grad[1, 0] = bad
    gradients(layer, grad, x)
    assert torch.equal(torch.stack([layer.error_product, layer.error_mean]), torch.stack(before))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_normalises_as_the_first_pass_did(use_reentrant):
    """The second pass comes after the statistics moved, and must not see that; the errors move once."""
    torch.manual_seed(0)
    layers = [OnlineNorm2d(3, momentum=0.1) for _ in range(2)]
    for _ in range(3):
        x, grad = 2 * torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
        plain = gradients(layers[0], grad, x)
        again = gradients(lambda x: checkpoint(layers[1], x, use_reentrant=use_reentrant), grad, x)
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
        assert_same_buffers(*layers)


def test_reset_forgets_everything():
    layer = OnlineNorm1d(2)
    fresh = {name: value.clone() for name, value in layer.state_dict().items()}
    gradients(layer, torch.randn(4, 2), torch.randn(4, 2))
    layer.reset_running_stats()
    assert all(torch.equal(value, fresh[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(("argument", "value"), [("backward_momentum", 0), ("momentum", 2), ("guard", "clip")])
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(InputError, match=argument):
        OnlineNorm2d(3, **{argument: value})

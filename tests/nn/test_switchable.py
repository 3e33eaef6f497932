"""Switchable norm equals its equations in float64, with the statistics of every part counted one by one."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import assert_close, double, dtypes, gradients, layouts, step, with_drawn_parameters
from normlab.nn.switchable import SwitchableNorm1d, SwitchableNorm2d, SwitchableNorm3d

LAYERS = {1: SwitchableNorm1d, 2: SwitchableNorm2d, 3: SwitchableNorm3d}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # of `assert_close`
EPS = 0.01


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = values.sum() / values.numel()
    return mean, ((values - mean) ** 2).sum() / values.numel()


def formula(x: Tensor, weight, bias, mean_weight, var_weight, running: list[Tensor] | None = None) -> Tensor:
    """Image by image and channel by channel; without space there is no instance part."""
    first = 1 if x.dim() == 2 else 0
    shares = [value[first:].exp() / value[first:].exp().sum() for value in (mean_weight, var_weight)]
    images = []
    for image in x:
        channels = []
        for c, values in enumerate(image):
            batch = moments(x[:, c]) if running is None else (running[0][c], running[1][c])
            parts = [moments(values), moments(image), batch][first:]
            mean, var = (sum(share * part[i] for share, part in zip(shares[i], parts, strict=True)) for i in (0, 1))
            channels.append(weight[c] * (values - mean) / (var + EPS).sqrt() + bias[c])
        images.append(torch.stack(channels))
    return torch.stack(images)


def only(layer: nn.Module, part: int) -> nn.Module:
    """The layer with all the weight on one part: 0 instance, 1 layer, 2 batch."""
    for weights in (layer.mean_weight, layer.var_weight):
        weights.data = torch.full_like(weights, -1e4)
        weights.data[part] = 0
    return layer


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_its_formula_in_float64(data):
    """Over shapes, types, layouts and batch sizes: output, gradients and buffers at every step; then evaluation."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    space = data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    dtype = data.draw(dtypes)
    layout = data.draw(layouts)
    momentum = data.draw(st.sampled_from([0.1, 1.0]))
    layer = with_drawn_parameters(LAYERS[max(dims, 1)](channels, EPS, momentum))
    if data.draw(st.booleans()) or dtype == torch.float64:
        layer.to(dtype)
    parameters = double(layer.parameters())
    running = [torch.zeros(channels).double(), torch.ones(channels).double()]
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    for size in [*sizes, 0]:
        layer.train(size > 0)
        x, grad = (torch.randn(size or 2, channels, *space).to(dtype) for _ in range(2))
        actual = step(layer, layout(x), grad)
        kept = None if size else running
        expected = gradients(lambda *inputs, kept=kept: formula(*inputs, kept), grad.double(), x.double(), *parameters)
        assert [actual[0].dtype, actual[1].dtype] == [dtype] * 2
        assert_close(actual, expected, TOLERANCE[dtype])
        n = size * math.prod(space)
        for c in range(channels if size else 0):
            mean, var = moments(x[:, c].double())
            running[0][c] += momentum * (mean - running[0][c])
            running[1][c] += momentum * (var * n / (n - 1) - running[1][c]) if n > 1 else 0
        assert_close([layer.running_mean, layer.running_var], running, min(TOLERANCE[dtype], 1e-4))
    assert layer.num_batches_tracked == len(sizes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("part", "groups"), [(0, 4), (1, 1)])
def test_one_part_alone_is_instance_or_layer_norm(part, groups, training):
    torch.manual_seed(0)
    layer = only(with_drawn_parameters(SwitchableNorm2d(4).double()), part).train(training)
    group = nn.GroupNorm(groups, 4).double()
    group.load_state_dict({name: layer.state_dict()[name] for name in ("weight", "bias")})
    x, grad = torch.randn(3, 4, 5, 5).double() + 1, torch.randn(3, 4, 5, 5).double()
    assert_close(step(layer, x, grad)[:4], step(group, x, grad), 1e-12)


@pytest.mark.parametrize(("dims", "torchs"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
@pytest.mark.parametrize("training", [True, False])
def test_the_batch_part_alone_is_batch_norm(dims, torchs, training):
    torch.manual_seed(0)
    layer = only(with_drawn_parameters(LAYERS[dims](4).double()), 2)
    batch = torchs(4).double()
    batch.load_state_dict({name: layer.state_dict()[name] for name in batch.state_dict()})
    x, grad = (torch.randn(3, 4, *[2] * dims).double() + 1 for _ in range(2))
    layer(x), batch(x)
    layer.train(training), batch.train(training)
    assert_close(step(layer, x, grad)[:4], step(batch, x, grad), 1e-12)
    assert_close(list(layer.buffers()), list(batch.buffers()), 1e-12)


def test_with_one_image_batch_is_instance():
    torch.manual_seed(0)
    x = torch.randn(1, 4, 5, 5)
    torch.testing.assert_close(only(SwitchableNorm2d(4), 2)(x), only(SwitchableNorm2d(4), 0)(x))


def test_far_means_lose_nothing():
    """The variances come from those of the parts, without the difference of large squares."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5) * 0.1 + 1000
    layer, exact = SwitchableNorm2d(3, eps=1e-5), SwitchableNorm2d(3, eps=1e-5).double()
    torch.testing.assert_close(layer(x).double(), exact(x.double()), rtol=0, atol=1e-2)


def test_one_value_moves_the_mean_alone():
    layer, x = SwitchableNorm2d(3), torch.randn(1, 3, 1, 1)
    assert layer(x).isfinite().all()
    torch.testing.assert_close(layer.running_mean, 0.1 * x.flatten())
    assert torch.equal(layer.running_var, torch.ones(3))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_batch_stays_out_of_the_statistics(bad):
    layer, x = SwitchableNorm2d(3), torch.randn(4, 3, 2, 2)
    x[0, 0, 0, 0] = bad
    layer(x)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 0


def test_training_between_an_evaluation_and_its_gradient():
    """The gradient of the mixture is of the statistics that the evaluation used."""
    torch.manual_seed(0)
    layer, x = SwitchableNorm2d(3), torch.randn(4, 3, 2, 2)
    layer(x)
    layer.eval()(x).sum().backward()
    expected = layer.mean_weight.grad.clone()
    layer.zero_grad()
    loss = layer(x).sum()
    layer.train()(x + 5)
    loss.backward()
    assert torch.equal(layer.mean_weight.grad, expected)


def test_reset_forgets_everything():
    layer = with_drawn_parameters(SwitchableNorm2d(3))
    layer(torch.randn(4, 3, 2, 2))
    layer.reset_parameters()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in SwitchableNorm2d(3).state_dict().items())


def test_without_affine():
    x, layer = torch.randn(4, 3, 2, 2), SwitchableNorm2d(3, affine=False)
    assert [name for name, _ in layer.named_parameters()] == ["mean_weight", "var_weight"]
    assert torch.equal(layer(x), SwitchableNorm2d(3)(x))

"""Batch norm equals torch's, and stands what torch's does not: one value a channel, NaN, half precision statistics."""

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import normlab.nn as norms
import reference
from checks import (
    assert_close,
    assert_same_state,
    composed,
    double,
    dtypes,
    gradients,
    layouts,
    step,
    with_drawn_parameters,
)

OURS = {1: norms.BatchNorm1d, 2: norms.BatchNorm2d, 3: norms.BatchNorm3d}
TORCHS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
OPTIONS = [
    {},
    {"momentum": 0.3, "eps": 0.1},
    {"momentum": None},
    {"momentum": 0.0},
    {"affine": False},
    {"track_running_stats": False},
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of `assert_close`


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("kernels", "tolerance"), [(nullcontext, 1e-5), (composed, 0)])
def test_is_torchs_batch_norm(dims, options, kernels, tolerance):
    """To float32's digits; and to the last one, in output and gradients of training, without compiled kernels."""
    torch.manual_seed(0)
    torchs = with_drawn_parameters(TORCHS[dims](3, **options))
    ours = OURS[dims](3, **options)
    ours.load_state_dict(torchs.state_dict())
    assert isinstance(ours, TORCHS[dims])
    assert repr(ours) == repr(torchs)
    for training in (True, True, True, False):
        ours.train(training), torchs.train(training)
        x, grad = torch.randn(2, 4, 3, *[4] * dims)
        with kernels():
            assert_close(step(ours, x, grad), step(torchs, x, grad), tolerance if training else 1e-5)
        assert ours.state_dict().keys() == torchs.state_dict().keys()
        assert_close(list(ours.state_dict().values()), list(torchs.state_dict().values()), 1e-6)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_state_goes_both_ways(dims):
    torch.manual_seed(0)
    x = torch.randn(4, 3, *[4] * dims)
    for source, target in ((OURS, TORCHS), (TORCHS, OURS)):
        trained, fresh = with_drawn_parameters(source[dims](3)), target[dims](3)
        trained(x)
        fresh.load_state_dict(trained.state_dict())
        assert_same_state(trained, fresh)
        assert_close([trained.eval()(x)], [fresh.eval()(x)], 1e-6)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_float64(data):
    """Over shapes, types and layouts: output, gradients and running statistics; then evaluation."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims = data.draw(st.integers(1, 3))
    shape = (
        data.draw(st.integers(1, 4)),
        data.draw(st.integers(1, 5)),
        *data.draw(st.tuples(*[st.integers(1, 4)] * dims)),
    )
    dtype = data.draw(dtypes)
    layout = data.draw(layouts)
    # Both in one layout: where they differ torch's own gradient of a transposed image of a single row is wrong.
    x, grad = (layout(torch.randn(shape).to(dtype)) for _ in range(2))
    layer = with_drawn_parameters(OURS[dims](shape[1], eps=0.01, momentum=0.3))
    layer.double() if dtype == torch.float64 else layer.float()
    actual = step(layer, x, grad)

    x64, weight, bias = double([x, layer.weight, layer.bias])
    expected = gradients(lambda *inputs: reference.batch_norm(*inputs, 0.01), grad.double(), x64, weight, bias)
    (mean, var), n = reference.channel_moments(x64), x.numel() // x.shape[1]
    running_mean = 0.3 * mean
    running_var = 0.7 + 0.3 * var * n / (n - 1) if n > 1 else torch.ones_like(running_mean)
    evaluated = reference.normalize(x64, running_mean, running_var, weight, bias, 0.01)
    actual += [layer.running_mean, layer.running_var, layer.eval()(x)]
    assert [value.dtype for value in (actual[0], actual[1], actual[-1])] == [dtype] * 3
    assert_close(actual, [*expected, running_mean, running_var, evaluated], TOLERANCE[dtype])


def one_value(dims: int, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, *[1] * dims)


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_one_value_gives_beta(dims):
    torch.manual_seed(0)
    layer = with_drawn_parameters(OURS[max(dims, 1)](3, momentum=0.25))
    layer.running_mean.fill_(2)
    layer.running_var.fill_(5)
    x, grad = one_value(dims), torch.randn(1, 3, *[1] * dims)
    y, grad_x, grad_weight, grad_bias = step(layer, x, grad)
    assert torch.equal(y.flatten(), layer.bias.detach())
    assert torch.equal(grad_x, torch.zeros_like(x))
    assert torch.equal(grad_weight, torch.zeros(3))
    assert torch.equal(grad_bias, grad.flatten())
    torch.testing.assert_close(layer.running_mean, 0.75 * 2 + 0.25 * x.flatten())
    assert torch.equal(layer.running_var, torch.full((3,), 5.0))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_one_value_moves_a_cumulative_mean(dtype):
    layer = norms.BatchNorm2d(3, momentum=None).to(dtype)
    values = [one_value(2).to(dtype) for _ in range(4)]
    outputs = [layer(x) for x in values]
    assert all(y.dtype == dtype and torch.equal(y, torch.zeros_like(y)) for y in outputs)
    mean = torch.stack([x.flatten().double() for x in values]).mean(0)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=0, atol=1e-6)
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("training", [True, False])
def test_one_value_without_running_statistics(training):
    layer = norms.BatchNorm2d(3, track_running_stats=False).train(training)
    assert torch.equal(layer(one_value(2)), torch.zeros(1, 3, 1, 1))


def test_one_value_without_affine():
    assert torch.equal(norms.BatchNorm2d(3, affine=False)(one_value(2)), torch.zeros(1, 3, 1, 1))


def test_one_value_in_evaluation_uses_the_running_statistics():
    layer, x = norms.BatchNorm2d(3).eval(), one_value(2)
    torch.testing.assert_close(layer(x), x / (1 + 1e-5) ** 0.5)
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_value_does_not_synchronise(momentum):
    """Reading a value of a meta tensor raises, as reading one of a GPU's would wait for it."""
    layer = norms.BatchNorm2d(3, momentum=momentum, device="meta")
    assert layer(one_value(2).to("meta")).shape == (1, 3, 1, 1)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("values", [1, 4])
def test_a_poisoned_batch_is_not_counted(momentum, values):
    """Nor does it enter the mean of all batches, which knows their number from the count."""
    layer = norms.BatchNorm2d(3, momentum=momentum)
    x = torch.randn(3, 1, 3, values, 1)
    layer(x[0])
    before = copy.deepcopy(layer)
    x[1, 0, 0, 0] = float("nan")
    layer(x[1])
    assert_same_state(layer, before)
    layer(x[2])
    assert layer.num_batches_tracked == 2
    expected = torch.lerp(before.running_mean, x[2].mean((0, 2, 3)), momentum or 0.5)
    torch.testing.assert_close(layer.running_mean, expected)


def test_the_mean_of_all_batches_compiles_without_a_break():
    """`momentum=None` reads the count of batches, which a graph break or a constant in the graph would show."""
    torch.compiler.reset()
    layer, torchs = norms.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x, grad = torch.randn(2, 4, 3, 2, 2)
        assert_close(step(compiled, x, grad), step(torchs, x, grad), 1e-5)
        assert_close(list(layer.buffers()), list(torchs.buffers()), 1e-6)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.01, None])
def test_statistics_of_a_half_precision_layer_lose_no_digit(half, momentum):
    """They are those of the same values in a float32 layer, also where half precision could not move any more."""
    layer, single = norms.BatchNorm2d(3, momentum=momentum).to(half), norms.BatchNorm2d(3, momentum=momentum)
    for _ in range(20):
        x = (torch.randn(4, 3, 2, 2) + 100).to(half)
        assert layer(x).dtype == half
        single(x.float())
    assert_close(list(layer.buffers()), list(single.buffers()), 1e-6)


@pytest.mark.parametrize("tracks", [True, False])
def test_an_empty_batch_has_an_output_and_gradients(tracks):
    layer = norms.BatchNorm2d(3, track_running_stats=tracks)
    before = copy.deepcopy(layer)
    y, *rest = step(layer, torch.randn(0, 3, 2, 2), torch.randn(0, 3, 2, 2))
    assert y.shape == (0, 3, 2, 2)
    assert [grad.abs().sum() for grad in rest] == [0, 0, 0]
    assert_same_state(layer, before)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_one_value_of_other_channels_is_refused(channels):
    layer = norms.BatchNorm2d(3)
    with pytest.raises((ValueError, RuntimeError)):
        layer(one_value(2, channels))
    assert torch.equal(layer.running_mean, torch.zeros(3))


@pytest.mark.parametrize(("dims", "given"), [(1, 2), (2, 1), (2, 3), (3, 2)])
def test_other_dimensions_are_refused_as_by_torch(dims, given):
    for x in (one_value(given), torch.randn(4, 3, *[2] * given)):
        with pytest.raises(ValueError, match="expected") as ours:
            OURS[dims](3)(x)
        with pytest.raises(ValueError, match="expected"):
            TORCHS[dims](3)(x)
        accepted = {1: "(N, 3) or (N, 3, L)", 2: "(N, 3, H, W)", 3: "(N, 3, D, H, W)"}[dims]
        assert str(ours.value) == f"BatchNorm{dims}d(3): expected input {accepted}, got {tuple(x.shape)}."


def test_images_and_channels_may_come_in_any_order():
    x, images, channels = torch.randn(6, 4, 3, 3).double(), torch.randperm(6), torch.randperm(4)
    y = norms.BatchNorm2d(4).double()(x)
    torch.testing.assert_close(norms.BatchNorm2d(4).double()(x[images][:, channels]), y[images][:, channels])


def test_copies_keep_state():
    layer = norms.BatchNorm2d(3)
    layer(one_value(2)).sum().backward()
    assert_same_state(copy.deepcopy(layer), layer)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (2, 3, 0, 1), (3, 2, 1, 0), (1, 0, 3, 2)])
def test_one_image_in_any_order_of_memory_has_the_same_gradient(order, training):
    """Of one image torch's own layer takes one memory format for another, and its gradient is wrong."""
    x, grad = torch.randn(2, 1, 3, 2, 2, dtype=torch.float64)
    inverse = [order.index(place) for place in range(4)]

    def gradient(norm, grad):
        leaf = x.clone().requires_grad_()
        norm.double().train(training)(leaf.permute(order).contiguous().permute(inverse)).backward(grad)
        return leaf.grad

    leaf = x.clone().requires_grad_()
    nn.BatchNorm2d(3).double().train(training)(leaf).backward(grad)  # both contiguous: torch's is right
    for other in (grad, grad.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)):
        torch.testing.assert_close(gradient(norms.BatchNorm2d(3), other), leaf.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 1, 4), (2, 3, 4, 1), (1, 3, 4, 4), (3, 2, 1, 3, 2), (2, 3, 2, 2, 1)])
def test_an_image_of_one_row_has_the_same_gradient_whatever_its_strides(shape, training):
    """Where a size is 1 its stride may be any number: torch's own gradient is off by more than its size."""
    torch.manual_seed(0)
    x, grad = torch.randn(2, *shape)

    def bare(x):  # channels last, but for the strides of dimensions of size 1
        last = x.movedim(1, -1).contiguous().movedim(-1, 1)
        return last.as_strided(shape, [1 if n == 1 else stride for n, stride in zip(shape, last.stride(), strict=True)])

    expected = gradients(
        with_drawn_parameters(OURS[len(shape) - 2](shape[1]).double().train(training)), grad.double(), x.double()
    )
    for one, other in ((bare, torch.clone), (torch.clone, bare), (bare, bare)):
        torch.manual_seed(0)
        x, grad = torch.randn(2, *shape)
        layer = with_drawn_parameters(OURS[len(shape) - 2](shape[1]).train(training))
        with composed():
            assert_close(gradients(layer, other(grad), one(x)), expected, 1e-4)


@pytest.mark.parametrize("values", [1, 3])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_that_was_pruned_to_fewer_channels_is_torchs(values, training, affine):
    """As libraries for pruning do: the tensors are cut, and `num_features` says what it said."""
    torch.manual_seed(0)
    ours, torchs = norms.BatchNorm2d(8, affine=affine), nn.BatchNorm2d(8, affine=affine)
    for layer in (ours, torchs):
        layer.train(training)
        for name in ("running_mean", "running_var"):
            setattr(layer, name, torch.linspace(1, 2, 8)[::2].clone())
        if affine:
            layer.weight, layer.bias = (nn.Parameter(torch.linspace(1, 2, 4)) for _ in range(2))
    x = torch.randn(2, 4, values, values)
    torch.testing.assert_close(ours(x), torchs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(list(ours.buffers()), list(torchs.buffers()), rtol=1e-5, atol=1e-5)
    for layer in (ours, torchs):
        with pytest.raises(RuntimeError):
            layer(torch.randn(2, 8, 3, 3))

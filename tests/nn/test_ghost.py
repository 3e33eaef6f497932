"""Ghost batch norm equals algorithm 1 in float64, virtual batch by virtual batch and channel by channel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from checks import assert_close, double, dtypes, gradients, layouts, step, with_drawn_parameters
from normlab.errors import InputError
from normlab.nn.ghost import GhostBatchNorm1d, GhostBatchNorm2d, GhostBatchNorm3d

LAYERS = {1: GhostBatchNorm1d, 2: GhostBatchNorm2d, 3: GhostBatchNorm3d}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # of `assert_close`
EPS = 0.01


class Algorithm:
    """Training and evaluation of one ghost batch norm, in float64."""

    def __init__(self, channels: int, size: int, momentum: float):
        self.size, self.momentum = size, momentum
        self.mean, self.var = torch.zeros(channels).double(), torch.ones(channels).double()

    def train(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        parts = []
        for start in range(0, len(x), self.size):
            part = x[start : start + self.size]
            parts.append(torch.stack([self.channel(part[:, c], c) * weight[c] + bias[c] for c in range(x.shape[1])], 1))
        return torch.cat(parts)

    def channel(self, values: Tensor, c: int) -> Tensor:
        mean = values.sum() / values.numel()
        squares = ((values - mean) ** 2).sum()
        self.mean[c] += self.momentum * (mean.item() - self.mean[c])
        if values.numel() > 1:
            self.var[c] += self.momentum * (squares.item() / (values.numel() - 1) - self.var[c])
        return (values - mean) / (squares / values.numel() + EPS).sqrt()

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ((x.movedim(1, -1) - self.mean) / (self.var + EPS).sqrt() * weight + bias).movedim(-1, 1)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_the_algorithm_in_float64(data):
    """Over shapes, types, layouts and batch sizes: output, gradients and buffers at every step; then evaluation."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims, channels = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 3))
    space = data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    dtype = data.draw(dtypes)
    layout = data.draw(layouts)
    size, momentum = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.1, 1.0]))
    layer = with_drawn_parameters(LAYERS[max(dims, 1)](channels, EPS, momentum, virtual_batch_size=size))
    if data.draw(st.booleans()) or dtype == torch.float64:
        layer.to(dtype)
    algorithm = Algorithm(channels, size, momentum)
    batches = data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=3))
    for batch in [*batches, 0]:
        layer.train(batch > 0)
        x, grad = (torch.randn(batch or 2, channels, *space).to(dtype) for _ in range(2))
        actual = step(layer, layout(x), grad)
        formula = algorithm.train if batch else algorithm.evaluate
        expected = gradients(formula, *double([grad, x, layer.weight, layer.bias]))
        assert [actual[0].dtype, actual[1].dtype] == [dtype] * 2
        assert_close(actual, expected, TOLERANCE[dtype])
        buffers, exact = [layer.running_mean, layer.running_var], [algorithm.mean, algorithm.var]
        assert_close(buffers, exact, min(TOLERANCE[dtype], 1e-4))
    assert layer.num_batches_tracked == len(batches)


@pytest.mark.parametrize(("dims", "torchs"), [(1, nn.BatchNorm1d), (2, nn.BatchNorm2d), (3, nn.BatchNorm3d)])
@pytest.mark.parametrize("size", [6, 32])
def test_one_virtual_batch_is_batch_norm(dims, torchs, size):
    torch.manual_seed(0)
    ghost = with_drawn_parameters(LAYERS[dims](3, virtual_batch_size=size).double())
    batch = torchs(3).double()
    batch.load_state_dict(ghost.state_dict())
    for _ in range(3):
        x, grad = (torch.randn(6, 3, *[2] * dims).double() + 1 for _ in range(2))
        assert_close(step(ghost, x, grad), step(batch, x, grad), 1e-12)
        assert_close(list(ghost.buffers()), list(batch.buffers()), 1e-12)


def test_virtual_batches_do_not_see_each_other():
    torch.manual_seed(0)
    layer, x = GhostBatchNorm2d(3, virtual_batch_size=4), torch.randn(10, 3, 2, 2)
    y = layer(x)
    x[:4], x[8:] = 100, -100
    assert torch.equal(layer(x)[4:8], y[4:8])


def test_momentum_1_remembers_the_last_virtual_batch():
    layer, x = GhostBatchNorm2d(3, momentum=1.0, virtual_batch_size=4), torch.randn(10, 3, 2, 2)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x[8:].mean((0, 2, 3)))
    torch.testing.assert_close(layer.running_var, x[8:].var((0, 2, 3)))


def test_last_image_alone_without_space():
    """Its virtual batch has one value a channel: y = β, and the running variance is of the others."""
    layer, x = GhostBatchNorm1d(3, momentum=1.0, virtual_batch_size=4), torch.randn(5, 3)
    nn.init.normal_(layer.bias)
    assert torch.equal(layer(x)[4], layer.bias)
    torch.testing.assert_close(layer.running_mean, x[4])
    torch.testing.assert_close(layer.running_var, x[:4].var(0))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_bad_virtual_batch_keeps_all_out_of_the_statistics(bad):
    layer, x = GhostBatchNorm2d(3, virtual_batch_size=2), torch.randn(6, 3, 2, 2)
    x[2, 1, 0, 0] = bad
    layer(x)
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.num_batches_tracked == 0


def test_bad_size_is_refused():
    with pytest.raises(InputError, match="virtual_batch_size=0"):
        GhostBatchNorm2d(3, virtual_batch_size=0)

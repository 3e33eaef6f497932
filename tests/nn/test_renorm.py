"""Batch renorm equals algorithm 1 of its paper in float64, over batches, and batch norm where its limits are shut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from checks import assert_close, double, dtypes, gradients, step, with_drawn_parameters
from normlab.errors import InputError
from normlab.nn import functional as F
from normlab.nn.renorm import BatchRenorm1d, BatchRenorm2d, BatchRenorm3d

LAYERS = {1: BatchRenorm1d, 2: BatchRenorm2d, 3: BatchRenorm3d}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of `assert_close`


class Algorithm:
    """Algorithm 1, channel by channel, in float64: `mean` and `std` are the running ones, `seen` the batches."""

    def __init__(self, channels: int, rate: float, eps: float, r_max: float, d_max: float, ramp: tuple[int, int]):
        self.mean, self.std, self.seen = [0.0] * channels, [math.sqrt(1 + eps)] * channels, 0
        self.rate, self.eps, self.r_max, self.d_max, self.ramp = rate, eps, r_max, d_max, ramp

    def train(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ramped = min(max((self.seen - self.ramp[0]) / (self.ramp[1] - self.ramp[0]), 0), 1)
        r_max, d_max = 1 + ramped * (self.r_max - 1), ramped * self.d_max
        self.seen += 1
        y = []
        for c in range(x.shape[1]):
            values = x[:, c]
            mean = values.mean()
            std = (((values - mean) ** 2).mean() + self.eps).sqrt()
            r = min(max(std.item() / self.std[c], 1 / r_max), r_max)
            d = min(max((mean.item() - self.mean[c]) / self.std[c], -d_max), d_max)
            y.append(((values - mean) / std * r + d) * weight[c] + bias[c])
            self.mean[c] += self.rate * (mean.item() - self.mean[c])
            if values.numel() > 1:
                self.std[c] += self.rate * (std.item() - self.std[c])
        return torch.stack(y, 1)

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = [(x[:, c] - self.mean[c]) / self.std[c] * weight[c] + bias[c] for c in range(x.shape[1])]
        return torch.stack(y, 1)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_algorithm_1_in_float64(data):
    """Over shapes, types, layouts and limits: output, gradients and buffers at every step; then evaluation."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims = data.draw(st.integers(0, 3))
    channels, space = data.draw(st.integers(1, 3)), data.draw(st.tuples(*[st.integers(1, 3)] * dims))
    dtype = data.draw(dtypes)
    momentum, eps = data.draw(st.sampled_from([0.1, 0.7])), 0.01
    limits = data.draw(st.sampled_from([(1.0, 0.0), (1.2, 0.3), (3.0, 5.0)]))
    ramp = data.draw(st.sampled_from([(0, 1), (1, 4)]))
    layer = LAYERS[max(dims, 1)](channels, eps, momentum, r_max=limits[0], d_max=limits[1], r_ramp=ramp, d_ramp=ramp)
    with_drawn_parameters(layer).to(dtype)
    algorithm = Algorithm(channels, momentum, eps, *limits, ramp)

    for size in [*data.draw(st.lists(st.sampled_from([1, 2, 5]), min_size=2, max_size=5)), 0]:
        layer.train(size > 0)
        x, grad = (torch.randn(size or 2, channels, *space).to(dtype) for _ in range(2))
        x = (2 * x + 0.5).transpose(0, -1).contiguous().transpose(0, -1)
        actual = step(layer, x, grad)
        formula = algorithm.train if size else algorithm.evaluate
        expected = gradients(formula, *double([grad, x, layer.weight, layer.bias]))
        assert [actual[0].dtype, actual[1].dtype] == [dtype] * 2
        assert_close(actual, expected, TOLERANCE[dtype])
        std = (layer.running_var + eps).sqrt()
        running = [torch.tensor(values, dtype=torch.float64) for values in (algorithm.mean, algorithm.std)]
        assert_close([layer.running_mean, std], running, min(TOLERANCE[dtype], 1e-4))
    assert layer.num_batches_tracked == algorithm.seen


def test_shut_limits_are_batch_norm():
    torch.manual_seed(0)
    layer = with_drawn_parameters(BatchRenorm2d(3, r_max=1, d_max=0, r_ramp=(0, 1), d_ramp=(0, 1)))
    parameters = (layer.weight, layer.bias)
    for _ in range(3):
        x, grad = 3 * torch.randn(4, 3, 2, 2) + 1, torch.randn(4, 3, 2, 2)
        assert_close(step(layer, x, grad), gradients(F.batch_norm, grad, x, *parameters), 1e-5)


def test_open_limits_train_with_what_evaluation_uses():
    """Where nothing is clipped, y in training is that of evaluation before the batch."""
    torch.manual_seed(0)
    layer = with_drawn_parameters(BatchRenorm1d(3, r_max=1e6, d_max=1e6, r_ramp=(0, 1), d_ramp=(0, 1)))
    layer(torch.randn(8, 3, 4) * 2 + 1)  # the first batch has the limits shut
    x = torch.randn(2, 3, 4)
    expected = layer.eval()(x)
    torch.testing.assert_close(layer.train()(x), expected, rtol=1e-5, atol=1e-5)


def test_limits_widen_over_the_papers_batches():
    """A far batch meets the limits: y of its mean is d_max, of one deviation above it r_max + d_max."""
    layer = BatchRenorm1d(1)
    x = torch.tensor([[1000.0], [1400.0]])  # mean 1200 and deviation 200, far from 0 and 1
    limits = {5000: (1.0, 0.0), 15000: (1 + 2 * 10 / 35, 2.5), 25000: (1 + 2 * 20 / 35, 5.0), 40000: (3.0, 5.0)}
    limits |= {0: (1.0, 0.0), 10**6: (3.0, 5.0)}
    for batches, (r, d) in limits.items():
        layer.reset_running_stats()
        layer.num_batches_tracked.fill_(batches)
        torch.testing.assert_close(layer(x).flatten().tolist(), [d - r, d + r], rtol=1e-5, atol=1e-5)


def test_one_value_a_channel_leaves_the_deviation():
    layer = BatchRenorm2d(1, r_ramp=(0, 1), d_ramp=(0, 1))
    layer(torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1))
    before = layer.running_var.clone()
    y = layer(torch.full((1, 1, 1, 1), 2.0))
    torch.testing.assert_close(y.item(), 2 / math.sqrt(before.item() + 1e-5), rtol=1e-5, atol=0)
    torch.testing.assert_close(layer.running_mean, torch.tensor([0.2]))
    torch.testing.assert_close(layer.running_var, before, rtol=1e-6, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_corrects_as_the_first_pass_did(use_reentrant):
    """The second pass comes after the statistics moved, and must not see that."""
    torch.manual_seed(0)
    layers = [BatchRenorm2d(3, r_ramp=(0, 1), d_ramp=(0, 1)) for _ in range(2)]
    for _ in range(3):
        x, grad = 2 * torch.randn(4, 3, 2, 2) + 1, torch.randn(4, 3, 2, 2)
        plain = step(layers[0], x, grad)
        layers[1].zero_grad()
        again = gradients(lambda x: checkpoint(layers[1], x, use_reentrant=use_reentrant), grad, x)
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=False))
        pairs = zip(layers[0].buffers(), layers[1].buffers(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("r_max", 0.5), ("d_max", -1.0), ("r_ramp", (5, 5)), ("d_ramp", (-1, 5)), ("r_ramp", (1, 2, 3)), ("momentum", 0)],
)
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(InputError, match=argument):
        BatchRenorm2d(3, **{argument: value})


def test_input_of_other_dims_is_refused():
    with pytest.raises(InputError, match=r"BatchRenorm2d\(3\): expected input \(N, 3, H, W\), got \(2, 3, 4\)"):
        BatchRenorm2d(3)(torch.randn(2, 3, 4))

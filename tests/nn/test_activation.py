"""A norm that is an activation too is the norm and then the activation, in values, gradients and statistics."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import nn

from checks import assert_close, composed, step, with_drawn_parameters
from normlab.errors import InputError
from normlab.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d, RunningBatchNorm2d, RunningBatchNorm3d, build_norm

ACTIVATIONS = {"relu": nn.ReLU(), "leaky_relu": nn.LeakyReLU()}
LAYERS = {
    "batch": lambda **options: BatchNorm2d(6, **options),
    "running": lambda **options: RunningBatchNorm2d(6, **options),
    "running_instance": lambda **options: build_norm("running_instance", 6, **options),
    "group": lambda **options: build_norm("group", 6, num_groups=3, **options),
    "layer": lambda **options: build_norm("layer", 6, **options),
    "instance": lambda **options: build_norm("instance", 6, **options),
}


@pytest.mark.parametrize("kernels", [nullcontext, composed])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (1, 6, 1, 1)], ids=str)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("name", list(LAYERS))
def test_it_is_the_norm_and_then_the_activation(name, activation, shape, training, kernels):
    torch.manual_seed(0)
    both = with_drawn_parameters(LAYERS[name](activation=activation)).train(training)
    norm = deepcopy(both)
    norm.activation = None
    pair = nn.Sequential(norm, ACTIVATIONS[activation])
    with kernels():
        for _ in range(4):  # the flagship bounds a gradient by the learning rate that the steps before show
            x, grad = torch.randn(shape), torch.randn(shape) * 100
            found, expected = step(both, x, grad), step(pair, x, grad)
            assert_close(found, expected, 1e-4)
            for layer in (both, norm):
                torch.optim.SGD(layer.parameters(), lr=0.01).step()
    for a, b in zip(both.state_dict().values(), norm.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(LAYERS))
def test_values_that_are_infinite_or_nan(name):
    """As torch has it: ReLU makes -inf 0, and NaN stays."""
    layer = LAYERS[name](activation="relu").eval()
    layer.weight.data.fill_(1.0)
    layer.bias.data.copy_(torch.tensor([-torch.inf, torch.inf, torch.nan, -1e30, 1e30, 0.0]))
    y = layer(torch.zeros(1, 6, 4, 4))[0, :, 0, 0]
    torch.testing.assert_close(y[:5], torch.tensor([0, torch.inf, torch.nan, 0, 1e30]), equal_nan=True)


def test_the_state_is_that_of_the_norm_alone():
    assert BatchNorm2d(3, activation="relu").state_dict().keys() == nn.BatchNorm2d(3).state_dict().keys()


@pytest.mark.parametrize("norm", [BatchNorm1d, BatchNorm3d, RunningBatchNorm3d])
def test_it_is_printed_and_checked(norm):
    assert "activation='relu'" in repr(norm(4, activation="relu"))
    assert "activation" not in repr(norm(4))
    with pytest.raises(InputError, match=r"activation='gelu'.*leaky_relu"):
        norm(4, activation="gelu")

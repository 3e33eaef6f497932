"""A norm remembers that the kernels take its parameters and buffers, and sees when they are others."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from checks import assert_close, composed, step, with_drawn_parameters
from normlab.kernels import autograd, cpu
from normlab.kernels.running import State
from normlab.nn import BatchNorm2d, GroupNorm, RunningBatchNorm2d

pytestmark = pytest.mark.skipif(cpu.PATH.startswith("composed"), reason=cpu.PATH)

C = 4
NORMS = {
    "batch": BatchNorm2d(C),
    "running": RunningBatchNorm2d(C),
    "group": GroupNorm(C, 2, activation="leaky_relu"),
}


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def half(layer):
    layer.half()


def half_by_its_data(layer):
    for parameter in layer.parameters():
        parameter.data = parameter.data.half()


def other_objects(layer):
    layer.weight, layer.bias = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))


def other_values(layer):
    with torch.no_grad():
        layer.weight.mul_(3)


def of_another_state(layer):
    state = {
        name: torch.rand_like(value) if value.is_floating_point() else value
        for name, value in layer.state_dict().items()
    }
    layer.load_state_dict(state, assign=True)


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())


def in_steps(layer):
    for parameter in layer.parameters():
        parameter.data = torch.rand(2 * C)[::2]


def not_there(layer):
    layer.weight = None


CHANGES = [half, half_by_its_data, other_objects, other_values, of_another_state, parametrized, in_steps, not_there]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NORMS)
def test_after_a_change_it_computes_with_what_there_is(name, change):
    torch.manual_seed(0)
    layer, grad = with_drawn_parameters(deepcopy(NORMS[name])), torch.randn(3, C, 5, 5)
    step(layer, torch.randn(3, C, 5, 5), grad)
    x = torch.randn(3, C, 5, 5)  # another: the cosine of `running` would be that of roundings
    if name == "group" and change in (half, half_by_its_data, not_there):
        pytest.skip("torch's operator does not know this")
    torch.manual_seed(1)
    change(layer)
    other = deepcopy(layer)
    with composed():
        expected = step(other, x, grad)
    tolerance = 5e-3  # the learning rate that `running` measures is a small difference of parameters
    assert_close(step(layer, x, grad), expected, tolerance)
    assert_close(list(layer.state_dict().values()), list(other.state_dict().values()), tolerance)


@pytest.mark.parametrize("name", NORMS)
def test_a_call_with_other_parameters_uses_them(name):
    torch.manual_seed(0)
    layer, x = with_drawn_parameters(deepcopy(NORMS[name])), torch.randn(3, C, 5, 5)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    before, others = layer(x), {**state, "weight": 2 * state["weight"], "bias": 2 * state["bias"]}
    if name != "group":  # before the activation
        assert_close([torch.func.functional_call(layer, others, x)], [2 * before], 1e-5)
    else:
        assert not torch.equal(torch.func.functional_call(layer, others, x), before)
    layer.load_state_dict(state)
    assert torch.equal(layer(x), before)


def test_what_is_changed_behind_its_back_is_refused_and_not_read():
    layer, x = BatchNorm2d(C), torch.randn(3, C, 5, 5)
    layer(x)
    layer.running_mean.data = torch.zeros(C - 1)
    with pytest.raises(RuntimeError, match="running_mean"):
        layer(x)


@pytest.mark.parametrize("changed", [lambda layer: layer, lambda layer: deepcopy(layer).double().float()])
def test_parts_are_made_in_the_order_of_the_kernels(changed):
    assert list(changed(NORMS["running"])._buffers) == list(State._fields)
    assert list(changed(NORMS["batch"])._buffers) == list(autograd.Statistics._fields)
    for layer in NORMS.values():
        assert list(changed(layer)._parameters) == ["weight", "bias"]

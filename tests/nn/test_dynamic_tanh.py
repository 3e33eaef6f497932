"""Dynamic tanh and dynamic erf equal their formulas in float64, value by value."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks import dtypes, with_drawn_parameters
from normlab.errors import InputError
from normlab.nn.dynamic_tanh import DynamicErf, DynamicTanh

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}


def erf_slope(t: float) -> float:
    return 2 / math.sqrt(math.pi) * math.exp(-t * t)


# The bounded function and its slope.
FUNCTIONS = {DynamicTanh: (math.tanh, lambda t: 1 - math.tanh(t) ** 2), DynamicErf: (math.erf, erf_slope)}


def by_hand(kind: type, x: Tensor, grad: Tensor, numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The output and, by the chain rule, the gradients of x and of every parameter."""
    function, slope = FUNCTIONS[kind]
    result = {name: torch.zeros_like(value) for name, value in {"y": x, "x": x, **numbers}.items()}
    for index, value in enumerate(x.flatten().tolist()):
        place = torch.unravel_index(torch.tensor(index), x.shape)
        c = place[1]
        t = numbers["alpha"].item() * value + (numbers["shift"].item() if "shift" in numbers else 0)
        g = grad[place] * numbers["weight"][c] * slope(t)
        result["y"][place] = numbers["weight"][c] * function(t) + numbers["bias"][c]
        result["x"][place] = g * numbers["alpha"].item()
        result["weight"][c] += grad[place] * function(t)
        result["bias"][c] += grad[place]
        result["alpha"] += g * value
        if "shift" in numbers:
            result["shift"] += g
    return result


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_its_formula_in_float64(data):
    """Over shapes, types, layouts and modes: output and gradients."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    kind = data.draw(st.sampled_from(list(FUNCTIONS)))
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    space = data.draw(st.lists(st.integers(1, 3), max_size=3))
    dtype = data.draw(dtypes)
    layer = with_drawn_parameters(kind(channels)).train(data.draw(st.booleans()))
    if data.draw(st.booleans()) or dtype == torch.float64:
        layer.to(dtype)
    x, grad = (torch.randn(batch, channels, *space).to(dtype) for _ in range(2))
    if data.draw(st.booleans()):
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    numbers = {name: value.detach().double() for name, value in layer.named_parameters()}
    expected = by_hand(kind, x.detach().double(), grad.double(), numbers)
    actual = {"y": y, "x": x.grad, **{name: value.grad for name, value in layer.named_parameters()}}
    assert [y.dtype, x.grad.dtype] == [dtype] * 2
    for name, value in expected.items():
        error = (actual[name].double() - value).abs().max()
        assert error <= TOLERANCE[dtype] * (1 + value.abs().max()), f"{name} is off by {error}"


@pytest.mark.parametrize(("kind", "function"), [(DynamicTanh, torch.tanh), (DynamicErf, torch.erf)])
def test_fresh_layer(kind, function):
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(kind(3)(x), function(x / 2))
    assert torch.equal(kind(3, alpha=2, affine=False)(x), function(2 * x))


def test_shift_moves_the_centre():
    layer = DynamicErf(1, shift=1, affine=False)
    assert layer(torch.tensor([[-2.0]])).item() == 0


@pytest.mark.parametrize("kind", [DynamicTanh, DynamicErf])
def test_output_is_bounded(kind):
    x = torch.tensor([[1e30, -1e30, 3e38]])
    assert torch.equal(kind(3)(x), torch.tensor([[1.0, -1.0, 1.0]]))


@pytest.mark.parametrize("kind", [DynamicTanh, DynamicErf])
def test_bad_arguments_are_refused(kind):
    with pytest.raises(InputError, match="num_features=0"):
        kind(0)
    with pytest.raises(InputError, match=r"\(3\): expected input \(N, 3, \*space\), got"):
        kind(3)(torch.randn(2, 1, 4, 4))

"""A norm that adds a residual before its activation is the norm, the sum and the activation, gradients and all."""

from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checks import assert_close, composed, gradients, layouts, with_drawn_parameters
from normlab.errors import InputError
from normlab.kernels import cpu
from normlab.kernels.plain import activate
from normlab.nn import BatchNorm2d, RunningBatchNorm2d, RunningInstanceNorm2d
from normlab.nn.activation import SLOPES

NORMS = {
    "batch": BatchNorm2d,
    "running": RunningBatchNorm2d,
    "running_instance": RunningInstanceNorm2d,
    "untracked": lambda c, **options: BatchNorm2d(c, track_running_stats=False, **options),
}
SETS = [] if cpu.kernels is None else cpu.kernels.instruction_sets


@pytest.fixture(params=[*SETS, "composed"])
def path(request):
    """Each instruction set, and torch's operators."""
    if request.param in SETS:
        cpu.kernels.use_instructions(request.param)
    with composed() if request.param == "composed" else nullcontext():
        yield
    if SETS:
        cpu.kernels.use_instructions(SETS[-1])


def of_both(layer):
    """The layer as a function of input and residual."""
    return lambda x, residual: layer(x, residual=residual)


def apart(layer, x, residual, grad):
    """The output and the gradients of x, residual and parameters, by the norm, a sum and an activation."""
    norm = deepcopy(layer)
    norm.activation = None
    add = lambda x, r: activate(norm(x) + r, SLOPES[layer.activation])  # noqa: E731
    return [*gradients(add, grad, x, residual), *(p.grad for p in norm.parameters()), *norm.state_dict().values()]


def off_the_kink(layer, x, residual, distance):
    """The residual, changed where the sum is so near 0 that rounding decides on which side it is."""
    norm = deepcopy(layer)
    norm.activation = None
    near = norm(x, residual=residual).detach().abs() < distance
    return residual + near.to(x.dtype) * 2 * distance


def together(layer, x, residual, grad):
    layer = deepcopy(layer)
    found = gradients(of_both(layer), grad, x, residual)
    return [*found, *(p.grad for p in layer.parameters()), *layer.state_dict().values()]


@pytest.mark.usefixtures("path")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_it_is_norm_sum_and_activation(data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    shape = draw(st.integers(1, 20)), draw(st.integers(1, 40)), draw(st.integers(1, 9)), draw(st.integers(1, 9))
    activation = draw(st.sampled_from([None, "relu", "leaky_relu"]))
    layer = with_drawn_parameters(NORMS[draw(st.sampled_from(list(NORMS)))](shape[1], activation=activation))
    layer.train(draw(st.booleans()))
    x, residual, grad = (draw(layouts)(torch.randn(shape)) for _ in range(3))
    residual = off_the_kink(layer, x, residual, 1e-4)
    assert_close(together(layer, x, residual, grad), apart(layer, x, residual, grad), 1e-4)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("norm", [BatchNorm2d, RunningBatchNorm2d])
@pytest.mark.parametrize("shape", [(2, 70, 45, 33), (20, 145, 6, 6), (2, 8, 300, 600)], ids=str)
def test_large_tensors(shape, norm, layout):
    torch.manual_seed(0)
    layer = with_drawn_parameters(norm(shape[1], activation="relu"))
    x, residual, grad = (torch.randn(shape).contiguous(memory_format=layout) for _ in range(3))
    residual = off_the_kink(layer, x, residual, 1e-4)
    assert_close(together(layer, x, residual, grad), apart(layer, x, residual, grad), 2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("norm", [BatchNorm2d, RunningBatchNorm2d])
def test_other_types(norm, dtype):
    torch.manual_seed(0)
    layer = norm(4, activation="leaky_relu")
    layer = layer.double() if dtype == torch.float64 else layer
    x, residual, grad = (torch.randn(3, 4, 5, 5).to(dtype) for _ in range(3))
    residual = off_the_kink(layer, x, residual, 0.1)
    found, expected = together(layer, x, residual, grad), apart(layer, x, residual, grad)
    assert found[0].dtype == found[2].dtype == dtype
    assert_close(found, expected, {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float64: 1e-6}[dtype])


def test_a_residual_of_another_type_is_added_by_torch():
    layer, x = BatchNorm2d(4, activation="relu"), torch.randn(3, 4, 5, 5)
    residual = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    expected = torch.relu(deepcopy(layer).train()._composed(x) + residual)
    assert torch.equal(layer(x, residual=residual), expected)


@pytest.mark.parametrize("norm", [BatchNorm2d, RunningBatchNorm2d])
def test_compiled(norm):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = with_drawn_parameters(norm(16, activation="leaky_relu"))
    compiled = torch.compile(deepcopy(layer), fullgraph=True, backend="aot_eager")
    x, residual, grad = torch.randn(3, 4, 16, 40, 40)
    assert_close(gradients(of_both(compiled), grad, x, residual), gradients(of_both(layer), grad, x, residual), 1e-4)


def test_the_gradient_has_a_gradient():
    torch.manual_seed(0)
    layer = with_drawn_parameters(BatchNorm2d(6, activation="leaky_relu"))
    x, residual, v = torch.randn(3, 5, 6, 2, 2)
    found = []
    for switch in (composed, nullcontext):
        with switch():
            inputs = [part.clone().requires_grad_() for part in (x, residual)]
            first = torch.autograd.grad(layer(inputs[0], residual=inputs[1]).pow(3).sum(), inputs, create_graph=True)
            found.append(torch.autograd.grad(sum((part * v).sum() for part in first), [*inputs, layer.weight]))
    assert_close(*map(list, found), 1e-4)


@pytest.mark.parametrize("norm", [BatchNorm2d, RunningBatchNorm2d])
def test_another_shape_is_refused(norm):
    with pytest.raises(InputError, match=r"\(4\): expected residual \(3, 4, 5, 5\).*got \(3, 4, 1, 1\)"):
        norm(4)(torch.randn(3, 4, 5, 5), residual=torch.randn(3, 4, 1, 1))

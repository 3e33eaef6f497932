"""The compiled kernels equal the composed operators and the formula in float64, and step aside where they must."""

import math
import os
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import reference
from checks import assert_close, cases, composed, double, gradients, layouts, step, with_drawn_parameters
from normlab.kernels import autograd, cpu, launch, plain, policy
from normlab.nn import (
    BatchNorm2d,
    BatchRenorm2d,
    ChannelLayerNorm,
    GroupNorm,
    RMSNorm,
    RunningBatchNorm2d,
    RunningInstanceNorm2d,
)
from normlab.nn import functional as F

pytestmark = pytest.mark.skipif(cpu.PATH.startswith("composed"), reason=cpu.PATH)

EXAMPLES = settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
EPS = 1.0  # so large that no gradient is the small difference of large terms, which half precision rounds apart
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of `assert_close`
float_cases = cases().filter(lambda case: case.x.dtype != torch.float64)
slopes = st.sampled_from([1.0, 0.0, 0.25])


def float32(*parts):
    return [None if part is None else part.float() for part in parts]


SETS = [] if cpu.kernels is None else cpu.kernels.instruction_sets


@pytest.fixture(params=SETS)
def every_instruction_set(request):
    """Each that this machine has: another may have no more than the first of them."""
    cpu.kernels.use_instructions(request.param)
    yield
    cpu.kernels.use_instructions(SETS[-1])


def activated(norm, slope):
    """The norm, then the activation; not for a case in which roundings decide on which side of 0 a value is."""

    def function(*inputs):
        y = norm(*inputs)
        assume(slope == 1 or y.numel() == 0 or y.abs().min() > 1e-5)
        return plain.activate(y, slope)

    return function


@pytest.mark.usefixtures("every_instruction_set")
@EXAMPLES
@given(float_cases, slopes)
def test_batch_norm_equals_float64(case, slope):
    x, grad, *parameters = case
    x64, grad64, *parameters64 = double([x, grad, *float32(*parameters)])
    plain = activated(lambda *inputs: F.batch_norm(*inputs, EPS), slope)
    expected = gradients(plain, grad64, x64, *parameters64)
    fast = gradients(
        lambda *inputs: autograd.batch_norm(*inputs, None, 0.1, EPS, slope), grad, x, *float32(*parameters)
    )
    assert fast[0].dtype == x.dtype
    assert_close(fast, expected, TOLERANCE[x.dtype])


@pytest.mark.usefixtures("every_instruction_set")
@EXAMPLES
@given(float_cases, slopes)
def test_frozen_norm_equals_float64(case, slope):
    x, grad, *parameters = case
    mean, var = torch.randn(x.shape[1]), torch.rand(x.shape[1]) + 0.1
    x64, grad64, mean64, var64, *parameters64 = double([x, grad, mean, var, *float32(*parameters)])
    plain = activated(lambda x, w, b: reference.normalize(x, mean64, var64, w, b, EPS), slope)
    expected = gradients(plain, grad64, x64, *parameters64)
    fast = gradients(
        lambda x, w, b: autograd.frozen_norm(x, mean, var, w, b, EPS, slope), grad, x, *float32(*parameters)
    )
    assert_close(fast, expected, TOLERANCE[x.dtype])


@pytest.mark.usefixtures("every_instruction_set")
@EXAMPLES
@given(float_cases, slopes, st.data())
def test_group_norm_equals_float64(case, slope, data):
    x, grad, *parameters = case
    groups = data.draw(st.sampled_from([n for n in range(1, 7) if x.shape[1] % n == 0]))
    x64, grad64, *parameters64 = double([x, grad, *float32(*parameters)])
    plain = activated(lambda x, w, b: F.group_norm(x, groups, w, b, EPS), slope)
    expected = gradients(plain, grad64, x64, *parameters64)
    fast = gradients(lambda x, w, b: autograd.group_norm(x, groups, w, b, EPS, slope), grad, x, *float32(*parameters))
    assert_close(fast, expected, TOLERANCE[x.dtype])


@EXAMPLES
@given(float_cases)
def test_batch_norm_of_known_moments_equals_float64(case):
    x, grad, *parameters = case
    x64, grad64, *parameters64 = double([x, grad, *float32(*parameters)])
    expected = gradients(lambda *inputs: F.batch_norm(*inputs, EPS), grad64, x64, *parameters64)

    def norm(x, weight, bias):
        return autograd.batch_norm_of(x, *launch.channel_moments(x), weight, bias, EPS)

    assert_close(gradients(norm, grad, x, *float32(*parameters)), expected, TOLERANCE[x.dtype])
    moments = reference.channel_moments(x64)
    assert_close(list(launch.channel_moments(x)), list(moments), TOLERANCE[x.dtype])


@pytest.mark.usefixtures("every_instruction_set")
@EXAMPLES
@given(float_cases, st.booleans())
def test_norms_of_positions_equal_float64(case, centred):
    x, grad, *parameters = case
    x64, grad64, weight64, bias64 = double([x, grad, *float32(*parameters)])
    if centred:
        plain = lambda x, w, b: reference.channel_layer_norm(x, w, b, EPS)  # noqa: E731
    else:
        plain = lambda x, w, b: reference.scale(reference.rms_norm(x, w, EPS), None, b)  # noqa: E731
    expected = gradients(plain, grad64, x64, weight64, bias64)
    fast = gradients(lambda x, w, b: autograd.position_norm(x, w, b, centred, EPS), grad, x, *float32(*parameters))
    assert_close(fast, expected, TOLERANCE[x.dtype])


def group_norm(num_features: int, momentum: float) -> GroupNorm:
    return GroupNorm(num_features, num_features, activation="leaky_relu")  # else torch's operator for small tensors


def unbounded_running(num_features: int, momentum: float) -> RunningBatchNorm2d:
    return RunningBatchNorm2d(num_features, momentum=momentum, step_bound=None)


def layer_norm(num_features: int, momentum: float) -> GroupNorm:
    return GroupNorm(num_features, 1, activation="leaky_relu")


def channel_layer_norm(num_features: int, momentum: float) -> ChannelLayerNorm:
    return ChannelLayerNorm(num_features)


def rms_norm(num_features: int, momentum: float) -> RMSNorm:
    return RMSNorm(num_features)


BY_CHANNEL = [BatchNorm2d, RunningBatchNorm2d, RunningInstanceNorm2d, unbounded_running]


@pytest.mark.usefixtures("every_instruction_set")
@pytest.mark.parametrize("norm", [*BY_CHANNEL, group_norm, layer_norm, channel_layer_norm, rms_norm])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 70, 45, 33),
        (40, 5, 8, 8),
        (600, 33, 1, 1),
        (70, 33, 2, 2),
        (1, 3, 150, 150),
        (20, 145, 6, 6),
        (70, 301, 1, 1),
    ],
    ids=str,
)
def test_large_inputs_equal_float64_for_any_number_of_threads(norm, layout, shape):
    """Sizes at which threads, blocks of rows and every width of register take part."""
    if norm is group_norm and shape[2:] == (1, 1):
        pytest.skip("groups of one value are the composed operator's")
    torch.manual_seed(0)
    layer = with_drawn_parameters(norm(shape[1], momentum=0.3))
    x = (torch.randn(shape) * 3 + 20).contiguous(memory_format=layout)
    grad = torch.randn(shape)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        fast = deepcopy(layer)
        results.append([*step(fast, x, grad), *step(fast, x, grad), *fast.state_dict().values()])
    torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    layer, x, grad = layer.double(), x.double(), grad.double()
    assert_close(results[0], [*step(layer, x, grad), *step(layer, x, grad), *layer.state_dict().values()], 2e-5)


def test_tensors_so_large_that_the_system_is_asked_for_large_pages():
    """Above 4 MiB, in output and gradient; views of a larger block begin between two pages."""
    block = torch.randn(3, 8, 1100, 1000)
    x, grad = block[1:2], block[2:]
    layer, peer = BatchNorm2d(8), nn.BatchNorm2d(8)
    assert_close(step(layer, x, grad), step(peer, x, grad), 1e-4)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_mean_far_from_zero_costs_no_digits(data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    x = data.draw(layouts)(torch.randn(3, 4, 9, 9) * 0.1 + 1000)
    y = autograd.batch_norm(x, None, None, None, 0.1, 1e-5, 1.0)
    expected = nn.functional.batch_norm(x.double(), None, None, None, None, True, 0.1, 1e-5)
    assert_close([y], [expected], 1e-4)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("layer", [BatchNorm2d(6), BatchNorm2d(6).eval(), GroupNorm(6, 3)], ids=str)
def test_the_gradient_has_a_gradient(layer, activation):
    layer = deepcopy(layer)
    layer.activation = activation
    assert_the_gradient_has_a_gradient(layer)


@pytest.mark.parametrize("norm", [ChannelLayerNorm, RMSNorm, BatchRenorm2d])
def test_the_gradient_of_a_norm_without_activation_has_a_gradient(norm):
    assert_the_gradient_has_a_gradient(norm(6))


def assert_the_gradient_has_a_gradient(layer):
    torch.manual_seed(0)
    with_drawn_parameters(layer)
    x, v = torch.randn(2, 5, 6, 2, 2)
    found = []
    for switch in (composed, nullcontext):
        with switch():
            inputs = x.clone().requires_grad_()
            (first,) = torch.autograd.grad(layer(inputs).pow(3).sum(), inputs, create_graph=True)
            found.append(torch.autograd.grad((first * v).sum(), [inputs, layer.weight]))
    assert_close(*map(list, found), 1e-4)


@pytest.mark.parametrize("centred", [True, False])
def test_a_gradient_penalty_of_positions_that_lie_in_another_order(centred):
    """As after a transpose, where the kernels take a copy: the gradient is of the input all the same."""
    norm = ChannelLayerNorm(6) if centred else RMSNorm(6)
    x = torch.randn(4, 5, 6, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for inputs in (x.double(), x):
        inputs = inputs.clone().requires_grad_()
        y = norm.to(inputs.dtype)(inputs.permute(0, 2, 1, 3))
        (first,) = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        penalty = (first.flatten(1).norm(dim=1) - 1).square().sum()
        found.append(torch.autograd.grad(penalty, [inputs, norm.weight]))
    assert_close([part.float() for part in found[0]], list(found[1]), 1e-3)


def test_the_flagships_gradient_says_that_it_has_none():
    x = torch.randn(4, 3, 2, 2, requires_grad=True)
    (first,) = torch.autograd.grad(RunningBatchNorm2d(3)(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("norm", [BatchNorm2d, RunningBatchNorm2d])
def test_frozen_and_absent_parameters(norm):
    torch.manual_seed(0)
    x, grad = torch.randn(2, 4, 3, 5, 5)
    for affine, frozen in ((False, ()), (True, ("weight",)), (True, ("bias",)), (True, ("weight", "bias"))):
        layer = norm(3, affine=affine)
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
        other = deepcopy(layer)
        with composed():
            expected = [*step(other, x, grad), *step(other, x, grad), *other.state_dict().values()]
        assert_close([*step(layer, x, grad), *step(layer, x, grad), *layer.state_dict().values()], expected, 1e-5)


def test_a_gradient_of_one_value_is_spread_out():
    """`sum().backward()` hands in a gradient that is one number in memory."""
    layer = BatchNorm2d(3).eval()
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, torch.full_like(x, (1 + layer.eps) ** -0.5))
    assert layer.bias.grad.tolist() == [100.0] * 3


def test_where_memory_alone_does_not_tell_they_are_not_used():
    layer, x = BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    assert policy.takes(x, layer.weight, None)
    assert not policy.takes(x.double(), None, None)
    assert not policy.takes(x[:0], None, None)
    assert not policy.takes(x.to("meta"), None, None)
    assert not policy.takes(x, torch.randn(3).double(), None)
    assert not policy.takes(x, None, torch.randn(6)[::2])
    assert not policy.takes(x, torch.randn(4), None)
    assert not policy.takes(x, None, None, torch.randn(3).double())
    seen = []
    torch.func.vmap(lambda part: (seen.append(policy.takes(part, None, None)), part)[1])(x)
    torch.func.grad(lambda part: (seen.append(policy.takes(part, None, None)), part.sum())[1])(x)
    with torch.autograd.forward_ad.dual_level():
        seen.append(policy.takes(torch.autograd.forward_ad.make_dual(x, x), None, None))
    with FlopCounterMode(display=False):
        seen.append(policy.takes(x, None, None))
    assert seen == [False] * 4


def test_there_is_one_openmp_runtime():
    with open("/proc/self/maps") as maps:
        assert len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}) == 1


def test_they_can_be_switched_off():
    code = "from normlab.kernels import cpu; print(cpu.PATH)"
    run = subprocess.run([sys.executable, "-c", code], env={**os.environ, cpu.SWITCH: "off"}, capture_output=True,
                         text=True, check=True)  # fmt: skip
    assert run.stdout.strip() == "composed operators (NORMLAB_KERNELS=off)"


@pytest.mark.parametrize("norm", [BatchNorm2d(3), RunningBatchNorm2d(3)], ids=str)
def test_parameters_of_another_size_are_refused_and_not_read(norm):
    norm = deepcopy(norm)
    norm.weight = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"size|elements|expected input \(N, 2, H, W\)"):
        norm(torch.randn(2, 3, 4, 4))


MEMORY_OF_A_STEP = """
import sys, torch
from normlab.nn import build_norm
torch.set_num_threads(1)
name, shape = sys.argv[1], eval(sys.argv[2])
address_space = lambda: 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line[:6] == "VmPeak")
layer, x = build_norm(name, shape[1], max(len(shape) - 2, 1)), torch.zeros(shape, dtype=torch.bfloat16)
grad = torch.zeros_like(x)
few = (x[:, :, :1] if x.dim() > 2 else x[:4]).clone()
layer(few.requires_grad_()).sum().backward()  # libraries come with the first step
before = address_space()
layer.eval()(x)
layer.train()(x.requires_grad_()).backward(grad)
print(address_space() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no such file")
@pytest.mark.parametrize(
    ("name", "shape"),
    [*[(name, (1, 8, 128, 128, 64)) for name in ("batch", "running", "frozen")], ("rms", (1 << 16, 128))],
)
def test_a_step_takes_no_more_memory_than_a_few_times_its_images(name, shape):
    """Not 24 bytes of address space for each value of an image, which ended in a MemoryError where there was plenty."""
    arguments = sys.executable, "-c", MEMORY_OF_A_STEP, name, str(shape)
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 4 * 2 * math.prod(shape) + (8 << 20)

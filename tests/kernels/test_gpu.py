"""The Triton kernels equal the layers in float64, on a GPU or, by Triton's interpreter, a CPU; and compile for GPUs."""

import os
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

import triton
import triton.language as tl

from checks import (
    LAYOUTS,
    assert_close,
    assert_same_state,
    gradients,
    layouts,
    operators_in_python,
    step,
    with_drawn_parameters,
)
from normlab.kernels import cpu, gpu, gpu_parts, gpu_running, policy
from normlab.kernels import gpu_kernels as kernels
from normlab.kernels.running import State
from normlab.nn import (
    BatchNorm2d,
    BatchRenorm2d,
    ChannelLayerNorm,
    GroupNorm,
    InstanceNorm,
    LayerNorm,
    RMSNorm,
    RunningBatchNorm2d,
)

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero", "ignore:invalid value")  # numpy, in the interpreter

WITHOUT_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)  # the interpreter takes seconds an example
EPS = 1.0  # so large that no gradient is the small difference of large terms, which half precision rounds apart
NORMS = {
    "batch": lambda c: BatchNorm2d(c, EPS),
    "batch, mean of all": lambda c: BatchNorm2d(c, EPS, None),
    "batch, leaky": lambda c: BatchNorm2d(c, EPS, activation="leaky_relu"),
    "batch, untracked": lambda c: BatchNorm2d(c, EPS, track_running_stats=False),
    "batch, in evaluation": lambda c: BatchNorm2d(c, EPS, activation="leaky_relu").eval(),
    "running": lambda c: RunningBatchNorm2d(c, EPS),
    "running, bounded": lambda c: RunningBatchNorm2d(c, EPS, step_bound=0.1),
    "running, unbounded": lambda c: RunningBatchNorm2d(c, EPS, step_bound=None, activation="leaky_relu"),
    "running, not affine": lambda c: RunningBatchNorm2d(c, EPS, affine=False),
    "group": lambda c: GroupNorm(c, 2 if c % 2 == 0 else 1, EPS, activation="leaky_relu"),
    "layer": lambda c: LayerNorm(c, EPS, affine=False, activation="leaky_relu"),
    "instance": lambda c: InstanceNorm(c, EPS, activation="leaky_relu"),
    "renorm": lambda c: BatchRenorm2d(c, EPS, r_ramp=(0, 2), d_ramp=(0, 2)),
    "channel layer": lambda c: ChannelLayerNorm(c, EPS),
    "rms": lambda c: RMSNorm(c, EPS),
}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def triton_kernels(**constants):
    """Inside, they take the tensors that the kernels of a CPU would; with other constants of `gpu`."""
    calls, launch = [], gpu.run

    def run(*arguments):
        calls.append(arguments[0])
        return launch(*arguments)

    with ExitStack() as stack:
        if DEVICE == "cpu":
            stack.enter_context(within_tensors())
            stack.enter_context(patch.multiple(cpu, run=run, kernels=object()))
            stack.enter_context(operators_in_python())
        else:
            stack.enter_context(patch.object(gpu, "run", run))
        if constants:
            stack.enter_context(patch.multiple(gpu, **constants))
        stack.enter_context(patch.object(policy, "LARGE_ON_GPU", 0))
        yield calls


@contextmanager
def within_tensors():
    """Inside, Triton's interpreter reads and writes nowhere but in the tensors that a kernel was given."""
    from triton.runtime import interpreter

    executor, builder, tensors = interpreter.GridExecutor, interpreter.InterpreterBuilder, []
    arguments, load, store = executor._init_args_hst, builder.create_masked_load, builder.create_masked_store

    def launch(self, *given):
        found = arguments(self, *given)
        tensors[:] = [part for part in found[0] if isinstance(part, torch.Tensor)]
        return found

    def check(pointers, mask):
        places, size = (
            pointers.data[mask.data.astype(bool)].astype(np.int64),
            pointers.dtype.element_ty.primitive_bitwidth // 8,
        )
        inside = np.zeros(places.shape, bool)
        for part in tensors:
            start = part.data_ptr()
            inside |= (start <= places) & (places + size <= start + part.numel() * part.element_size())
        assert inside.all(), "beyond the tensors of this kernel"

    def checked_load(self, pointers, mask, *rest):
        check(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    checked = {"create_masked_load": checked_load, "create_masked_store": checked_store}
    with patch.object(executor, "_init_args_hst", launch), patch.multiple(builder, **checked):
        yield


def steps(layer, x, grad):
    """Two steps of gradient descent: the outputs and gradients, and the state."""
    found = []
    for _ in range(2):
        found += step(layer, x, grad)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter -= 0.1 * parameter.grad
    state = layer.state_dict()
    for name in State._fields[10:]:  # by the difference of parameters, which in float32 has few digits after one step
        if name in state:
            state[name] = state[name] / 10
    return [None if part is None else part.cpu() for part in (*found, *state.values())]


@pytest.mark.parametrize("name", NORMS)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow], phases=WITHOUT_SHRINKING)
@given(st.data())
def test_they_equal_float64(name, data):
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(2, 9))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    # So small that small tensors have several tiles, rows and blocks.
    small = draw(st.booleans())
    constants = {"TILE": 64, "PROGRAMS": draw(st.integers(1, 9)), "AT_ONCE": 16, "WARPS": 1} if small else {}
    layer = with_drawn_parameters(NORMS[name](shape[1]))
    x = draw(layouts)((torch.randn(shape) * 2 + 1).to(dtype))
    grad = draw(layouts)(torch.randn(shape).to(dtype))
    # Contiguous: of one image one value high torch's own gradient on a CPU is wrong where x and it lie differently.
    expected = steps(deepcopy(layer).double(), x.double().contiguous(), grad.double().contiguous())
    with triton_kernels(**constants) as calls:
        found = steps(layer.to(DEVICE), x.to(DEVICE), grad.to(DEVICE))
    assert calls
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((1, 3, 40, 40), "contiguous"),
        ((3, 65, 3, 3), "channels last"),
        ((1, 256, 2, 3), "channels last"),
    ],
)
def test_large_tiles_stay_within_the_tensors(shape, layout):
    torch.manual_seed(0)
    x, grad = map(LAYOUTS[layout], torch.randn(2, *shape, device=DEVICE))
    for name in ("batch, leaky", "running, bounded", "group", "channel layer"):
        with triton_kernels() as calls:
            found = step(NORMS[name](shape[1]).to(DEVICE), x, grad)
        assert calls
        assert all(part.isfinite().all() for part in found)


@triton.jit
def copy_one_too_many(x, y, N, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i <= N, other=0.0), mask=i < N)


@pytest.mark.skipif(DEVICE != "cpu", reason="the interpreter's")
def test_a_value_read_beyond_a_tensor_is_seen():
    x = torch.zeros(8)
    with within_tensors(), pytest.raises(Exception, match="beyond the tensors"):
        copy_one_too_many[(1,)](x[:5], torch.zeros(5), 5, BLOCK=8)


def test_a_mean_far_from_zero_costs_no_digits():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 9) * 0.1 + 1000
    expected = nn.functional.batch_norm(x.double(), None, None, None, None, True, 0.1, 1e-5)
    with triton_kernels(TILE=64):
        y = BatchNorm2d(4).to(DEVICE)(x.to(DEVICE)).cpu()
    assert_close([y], [expected], 1e-4)


@pytest.mark.parametrize("norm", [BatchNorm2d, RunningBatchNorm2d])
@pytest.mark.parametrize("spoilt", [float("inf"), float("nan")])
def test_what_is_not_finite_leaves_the_statistics_alone(norm, spoilt):
    torch.manual_seed(0)
    layer, x, grad = norm(3).to(DEVICE), *torch.randn(2, 4, 3, 5, 5, device=DEVICE)
    with triton_kernels() as calls:
        step(layer, x, grad)
        before = deepcopy(layer.state_dict())
        x[0, 1, 2, 3] = spoilt
        y = step(layer, x, grad)[0]
    assert calls
    assert not y[:, 1].isfinite().any()
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


def test_a_residual_is_added_before_the_activation():
    torch.manual_seed(0)
    for norm in (BatchNorm2d, RunningBatchNorm2d):
        layer = with_drawn_parameters(norm(5, activation="relu"))
        x, residual, grad = torch.randn(3, 3, 5, 4, 4)
        wide = deepcopy(layer).double()
        expected = gradients(lambda x, r, norm=wide: norm(x, residual=r), grad.double(), x.double(), residual.double())
        with triton_kernels():
            layer.to(DEVICE)
            both = lambda x, r, norm=layer: norm(x, residual=r)  # noqa: E731
            found = gradients(both, *(part.to(DEVICE) for part in (grad, x, residual)))
        assert_close([part.cpu() for part in found], expected, 1e-5)


def test_a_checkpoint_enters_its_batch_once():
    torch.manual_seed(0)
    layer, x = RunningBatchNorm2d(5).to(DEVICE), torch.randn(3, 5, 4, 4, device=DEVICE, requires_grad=True)
    other = deepcopy(layer)
    with triton_kernels():
        layer(x).square().sum().backward()
        checkpoint(other, x, use_reentrant=False).square().sum().backward()
    assert_same_state(layer, other)


def test_a_compiler_for_gpus_takes_them():
    """Each kernel that the norms use, in each layout and type, without its registers overflowing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_for_gpu.py")
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {line.split()[0] for line in run.stdout.splitlines()} == KERNELS


KERNELS = {
    name
    for module in (kernels, gpu_running)
    for name, value in vars(module).items()
    if hasattr(value, "arg_names") and not name.startswith("_") and not hasattr(gpu_parts, name)
}


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
@pytest.mark.parametrize("norm", [BatchNorm2d, RunningBatchNorm2d])
def test_a_step_can_be_recorded_in_a_cuda_graph(norm):
    torch.manual_seed(0)
    layer, x, grad = norm(8).to(DEVICE), *torch.randn(2, 2, 8, 14, 14, device=DEVICE)
    other = deepcopy(layer)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with triton_kernels():
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(other, x, grad)
        stream.synchronize()
        other.load_state_dict(layer.state_dict())
        with torch.cuda.graph(graph, stream=stream):
            recorded = step(other, x, grad)
        for _ in range(4):
            expected = step(layer, x, grad)
            graph.replay()
    assert_close(recorded, expected, 1e-6)
    assert_close(list(other.state_dict().values()), list(layer.state_dict().values()), 1e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="no GPU")
def test_a_whole_training_step_can_be_recorded_in_a_cuda_graph():
    torch.manual_seed(0)
    norms = RunningBatchNorm2d(8, activation="relu"), RunningBatchNorm2d(16)
    layers = nn.Conv2d(3, 8, 3), norms[0], nn.Conv2d(8, 16, 3), norms[1], nn.Flatten(), nn.Linear(16 * 8 * 8, 5)
    net = nn.Sequential(*layers).to(DEVICE)
    other = deepcopy(net)
    batches, labels = torch.randn(6, 2, 3, 12, 12, device=DEVICE), torch.tensor([1, 4], device=DEVICE)
    images, optimizers = batches[0].clone(), {part: torch.optim.SGD(part.parameters(), 0.01) for part in (net, other)}

    def train(net):
        optimizers[net].zero_grad()
        nn.functional.cross_entropy(net(images), labels).backward()
        optimizers[net].step()

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with triton_kernels(), torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                train(other)
        stream.synchronize()
        other.load_state_dict(net.state_dict())
        with torch.cuda.graph(graph, stream=stream):
            train(other)
        for batch in batches:
            images.copy_(batch)
            train(net)
            graph.replay()
    assert_close(list(other.state_dict().values()), list(net.state_dict().values()), 1e-5)
    assert all(part.num_batches_tracked == len(batches) for part in (other[1], other[3]))

"""Statistics are written all or none, once a batch, in float32; a compiled step keeps what they were before."""

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from checks import assert_same_state
from normlab.errors import InputError
from normlab.nn import NORMS, build_norm
from normlab.nn.base import PreciseStatistics, RunningStatistics, recomputing, remember, settle

TRACKING = [name for name in NORMS if getattr(build_norm(name, 3), "num_batches_tracked", None) is not None]
# With parameters of their own that a batch norm's state lacks.
OF_OTHER_STATES = ("switchable", "evonorm_b0")

# --- remember ---------------------------------------------------------------------------------------------------------


def test_remember_writes_values_without_their_graph_in_the_dtype_of_the_buffer():
    mean, count = torch.zeros(3), torch.tensor(0)
    value = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    remember((mean, 2 * value), (count, count + 1))
    assert torch.equal(mean, torch.tensor([2.0, 4.0, 6.0]))
    assert not mean.requires_grad
    assert count.item() == 1
    assert count.dtype == torch.int64


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 1])
def test_one_bad_value_keeps_all_buffers(bad, place):
    buffers = [torch.zeros(3), torch.ones(3), torch.tensor(5)]
    values = [torch.full((3,), 0.5), torch.full((3,), 0.5), torch.tensor(6)]
    values[place][1] = bad
    remember(*zip(buffers, values, strict=True))
    assert [buffer.tolist() for buffer in buffers] == [[0, 0, 0], [1, 1, 1], 5]


def test_a_value_too_large_for_its_buffer_is_bad():
    buffer = torch.zeros(1)
    remember((buffer, torch.tensor([1e300], dtype=torch.float64)))
    assert buffer.item() == 0


class Counter(nn.Module):
    """Multiplies by what its count is at first, and counts forward passes."""

    count: Tensor

    def __init__(self, settled: bool = True):
        super().__init__()
        self.register_buffer("count", torch.tensor(2.0))
        self.settled = settled

    def forward(self, x: Tensor) -> Tensor:
        factor = self.count * 1
        if self.settled:
            (factor,) = settle(factor)
        remember((self.count, self.count + 1))
        return x * factor


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_second_pass_of_a_checkpoint_is_not_remembered(use_reentrant):
    layer = Counter()
    checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
    assert layer.count == 3
    layer(torch.ones(2))
    assert layer.count == 4


def test_a_checkpoint_within_compiled_code_is_remembered_once():
    torch.compiler.reset()
    layer = Counter()
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True, backend="aot_eager")
    compiled(torch.ones(2, requires_grad=True)).sum().backward()
    assert layer.count == 3


# --- recomputing ------------------------------------------------------------------------------------------------------


def test_recomputing_is_within_a_backward_pass_only():
    said = []
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda grad: said.append(recomputing()))
    said.append(recomputing())
    (2 * x).sum().backward()
    said.append(recomputing())
    assert said == [False, True, False]


# --- settle -----------------------------------------------------------------------------------------------------------


def gradient_of_two_compiled_steps(layer: Counter) -> list[float]:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    gradients = []
    for _ in range(2):
        x = torch.ones(1, requires_grad=True)
        compiled(x).backward()
        gradients.append(x.grad.item())
    return gradients


def test_a_compiled_backward_pass_uses_the_buffers_as_the_forward_pass_did():
    assert gradient_of_two_compiled_steps(Counter()) == [2, 3]


def test_without_settle_it_would_use_them_as_written():
    """The reason for `settle`: where this fails, torch has come to need it no more."""
    assert gradient_of_two_compiled_steps(Counter(settled=False)) == [3, 4]


def test_settle_costs_nothing_in_plain_code():
    one, two = torch.ones(2), torch.zeros(3)
    settled = settle(one, two)
    assert settled[0] is one
    assert settled[1] is two


# --- dtypes -----------------------------------------------------------------------------------------------------------


class Statistics(PreciseStatistics):
    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.full((2,), 1 / 3, dtype=dtype))
        self.register_buffer("count", torch.tensor(1))
        self.register_buffer("nothing", None)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("within_a_model", [False, True])
def test_a_cast_to_half_precision_keeps_the_statistics_to_the_last_digit(half, within_a_model):
    layer = Statistics()
    (nn.Sequential(layer) if within_a_model else layer).to(half)
    assert layer.weight.dtype == half
    assert layer.mean.dtype == torch.float32
    assert torch.equal(layer.mean, torch.full((2,), 1 / 3))
    assert layer.count.dtype == torch.int64
    assert layer.nothing is None


def test_other_casts_are_torchs():
    assert Statistics().double().mean.dtype == torch.float64
    assert Statistics(torch.float64).half().mean.dtype == torch.float32
    moved = Statistics().to("meta", torch.float16)
    assert moved.mean.is_meta
    assert moved.mean.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TRACKING)
def test_a_state_that_is_assigned_leaves_statistics_of_one_type_and_float32_at_least(name, dtype):
    """`load_state_dict(…, assign=True)` puts the file's tensors in the place of the layer's, whatever they are."""
    torchs, expected = nn.BatchNorm2d(3), build_norm(name, 3)
    torchs(100 + torch.randn(4, 3, 5, 5))
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in torchs.state_dict().items()}
    layer = build_norm(name, 3).to(dtype)
    layer.load_state_dict(state, assign=True, strict=name not in OF_OTHER_STATES)
    expected.load_state_dict(state, strict=name not in OF_OTHER_STATES)
    wide = torch.promote_types(dtype, torch.float32)
    for key, value in layer.named_buffers():
        assert value.dtype == (wide if value.is_floating_point() else torch.int64), key
        torch.testing.assert_close(value, expected.get_buffer(key), check_dtype=False)
    x = 100 + torch.randn(2, 3, 4, 4)
    for norm in (layer, expected):
        norm.weight.data = norm.weight.data.to(wide)
        norm.bias.data = norm.bias.data.to(wide)
    assert layer(x.to(wide)).dtype == wide


@pytest.mark.parametrize("name", ["running", "running_lesson", "mabn"])
def test_a_state_without_values_is_assigned_where_it_is(name):
    """As when a model is planned on meta, or measured with fake tensors."""
    layer = build_norm(name, 3)
    layer.load_state_dict({key: value.to("meta") for key, value in nn.BatchNorm2d(3).state_dict().items()}, assign=True)
    assert all(value.is_meta for value in layer.buffers())
    with FakeTensorMode():
        layer = build_norm(name, 3)
        layer.load_state_dict(nn.BatchNorm2d(3).state_dict())
        assert layer(torch.randn(2, 3, 4, 4)).shape == (2, 3, 4, 4)


# --- the common base --------------------------------------------------------------------------------------------------


def test_running_statistics_are_batch_norms():
    ours, torchs = RunningStatistics(3), nn.BatchNorm2d(3)
    assert_same_state(ours, torchs)
    half = RunningStatistics(3, dtype=torch.float16)
    assert half.weight.dtype == torch.float16
    assert half.running_var.dtype == torch.float32


@pytest.mark.parametrize(("argument", "value"), [("num_features", 0), ("momentum", 0), ("momentum", 1.5)])
def test_bad_arguments_are_named(argument, value):
    with pytest.raises(InputError, match=f"{argument}={value}"):
        RunningStatistics(**{"num_features": 3, argument: value})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", TRACKING)
def test_statistics_that_were_taken_away_are_those_of_the_batch_or_an_error(name, training):
    """As adaptation at test time does: torch's batch norm then takes those of each batch."""
    layer, x = build_norm(name, 3).train(training), 5 + torch.randn(4, 3, 5, 5)
    if name != "evonorm_b0":
        layer(x)
    layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    if name in ("batch", "sync", "ghost"):
        torch.testing.assert_close(layer(x), nn.functional.batch_norm(x, None, None, training=True))
    elif name in ("switchable", "evonorm_b0"):
        assert layer(x).isfinite().all()
    else:
        with pytest.raises(InputError, match="running_mean=None"):
            layer(x)


class Same(nn.Module):
    def forward(self, value):
        return value


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("change", ["order", "parametrized"])
@pytest.mark.parametrize("name", TRACKING)
def test_statistics_are_found_by_their_names(name, change, training):
    """A buffer that was deleted and registered again comes last; one with a parametrization is none."""
    torch.manual_seed(0)
    layer = build_norm(name, 3)
    layer(torch.randn(4, 3, 5, 5))
    other, kept = deepcopy(layer), layer.running_var.clone()
    if change == "parametrized":
        parametrize.register_parametrization(other, "running_var", Same())
    else:
        del other.running_var
        other.register_buffer("running_var", kept)
    x = 2 + torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(other.train(training)(x), layer.train(training)(x))
    torch.testing.assert_close(other.running_var, layer.running_var)

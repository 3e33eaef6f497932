"""Statistics are written all or none, once a batch, in float32; a compiled step keeps what they were before."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checks import assert_same_state
from normlab.errors import InputError
from normlab.nn.base import PreciseStatistics, RunningStatistics, recomputing, remember, settle

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

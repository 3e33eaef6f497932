"""Activation statistics: numpy's figures, of the right batches, in every loop, and nothing left behind."""

import copy
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from normlab.errors import InputError
from normlab.observe import ActivationStats, blocks
from normlab.observe.figures import LARGEST_COUNT, PIECE, _count, _count_on_gpu, figures
from normlab.training import Callback, Learner

BINS, LIMIT = 101, 5.0


class Known(nn.Module):
    """Puts out what it is given."""

    def forward(self, x):
        return x


def net() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(nn.Linear(2, 3), nn.ReLU()), nn.Linear(3, 2))


def learner(model: nn.Module, callbacks=(), batches: int = 3, **options) -> Learner:
    batch = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Learner(model, [batch] * batches, [batch] * 7, optimizer=optimizer, callbacks=callbacks, **options)


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def watched(*inputs, **options) -> ActivationStats:
    """Of a module that puts them out, one a batch."""
    model = Known()
    with ActivationStats({"it": model}, **{"every": 1, **options}) as stats:
        for x in inputs:
            model(x)
    return stats


def test_figures_of_every_training_batch_are_numpys():
    inputs = [torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i in range(5)]
    stats = watched(*inputs)
    doubles = [x.double().numpy() for x in inputs]
    assert stats.steps == [1, 2, 3, 4, 5]
    assert stats.means == {"it": pytest.approx([x.mean() for x in doubles], rel=1e-6)}
    assert stats.deviations == {"it": pytest.approx([x.std() for x in doubles], rel=1e-6)}
    assert stats.near_zero == {"it": [np.mean(abs(x) < LIMIT / BINS) for x in doubles]}
    assert stats.not_finite == {"it": [0.0] * 5}
    clipped = [np.clip(x, -LIMIT, LIMIT) for x in doubles]
    expected = [np.histogram(x, BINS, (-LIMIT, LIMIT))[0] for x in clipped]
    assert np.array_equal(stats.histograms["it"], expected)


layouts = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 0, 2, 1),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.sampled_from(list(layouts.values())),
    st.sampled_from([3, 21, 101]),
    st.lists(st.sampled_from([math.nan, math.inf, -math.inf, 1e4, -1e4, 5.0, -5.0, 0.0]), max_size=4),
)
def test_every_finite_value_is_in_one_bin_whatever_type_and_layout(seed, dtype, layout, bins, others):
    torch.manual_seed(seed)
    # Values in the middle of bins: no rounding decides.
    x = (torch.randint(-(bins // 2), bins // 2 + 1, (2, 3, 4, 5)) * (2 / bins)).to(dtype)
    x.view(-1)[: len(others)] = torch.tensor(others, dtype=dtype)
    x = layout(x)
    stats = watched(x, limit=1.0, bins=bins)
    values = x.double().numpy().ravel()
    finite = values[np.isfinite(values)]
    assert np.array_equal(stats.histograms["it"], [np.histogram(np.clip(finite, -1, 1), bins, (-1, 1))[0]])
    assert stats.histograms["it"].sum() == len(finite)
    assert stats.not_finite["it"] == [np.mean(~np.isfinite(values))]
    assert stats.near_zero["it"] == [np.mean(abs(values) < 1 / bins)]
    if len(finite) == len(values):
        assert stats.means["it"] == pytest.approx([values.mean()], abs=1e-6 * abs(values).max())


def test_more_values_than_are_counted_at_a_time():
    x = torch.arange(2 * PIECE + 7) % 3 - 1.0
    numbers = np.bincount(x.int().numpy() + 1)
    assert watched(x, limit=1.5, bins=3).histograms["it"].tolist() == [numbers.tolist()]


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_gpu_counts_as_a_cpu_does(deterministic):
    x = torch.cat((torch.arange(-9.0, 10), torch.tensor([math.inf, -math.inf, math.nan])))
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        assert _count_on_gpu(x, 4.5, 9).tolist() == _count(x[:-3], 4.5, 9).tolist() == [6, 1, 1, 1, 1, 1, 1, 1, 6]
        assert torch.are_deterministic_algorithms_enabled() == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_mean_far_from_zero_costs_no_digits(dtype):
    x = (torch.randn(400, 100, generator=torch.Generator().manual_seed(0)) * 3 + 100).to(dtype)
    _, mean, variance, _ = figures(x, LIMIT, BINS)
    assert mean.dtype == variance.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(mean) == pytest.approx(float(x.double().mean()), rel=1e-6)
    assert float(variance) == pytest.approx(float(x.double().var(correction=0)), rel=2e-5)


def test_a_single_value_has_no_deviation():
    stats = watched(torch.tensor(3.0))
    assert (stats.means, stats.deviations) == ({"it": [3.0]}, {"it": [0.0]})


def test_half_precision_does_not_overflow():
    stats = watched(torch.full((1000,), 6e4, dtype=torch.float16))
    assert stats.means["it"] == [pytest.approx(6e4, rel=1e-3)]
    assert stats.deviations["it"] == [0.0]


def test_nothing_is_recorded_in_evaluation_nor_outside():
    model = Known()
    stats = ActivationStats({"it": model}, every=1)
    model(torch.ones(2))
    with stats:
        model(torch.ones(2))
        model.eval()
        model(torch.ones(2))
    model.train()
    model(torch.ones(2))
    assert stats.means == {"it": [1.0]}
    assert hooks(model) == 0


def test_one_of_so_many_training_batches_is_looked_at():
    model = Known()
    with ActivationStats(model, every=3) as stats:
        for i in range(8):
            model.eval()
            model(torch.tensor([100.0]))
            model.train()
            model(torch.tensor([float(i)]))
    assert stats.steps == [1, 4, 7]
    assert stats.means == {"": [0.0, 3.0, 6.0]}
    with stats:  # it goes on
        model(torch.zeros(1))
        model(torch.tensor([9.0]))
        model(torch.tensor([10.0]))
    assert stats.steps == [1, 4, 7, 10]
    assert stats.means == {"": [0.0, 3.0, 6.0, 9.0]}


def test_between_two_batches_that_are_looked_at_no_module_has_a_hook():
    model = net()
    with ActivationStats(model, every=2):
        seen = []
        model[0][0].register_forward_hook(lambda *_: seen.append(hooks(model)))
        for _ in range(4):
            model(torch.ones(1, 2))
        assert hooks(model) == 2
    assert seen == [6, 2, 6, 2]
    assert hooks(model) == 1


def test_the_hooks_are_gone_after_a_failure():
    class Fails(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    model = nn.Sequential(nn.Linear(1, 1), Fails())
    stats = ActivationStats(model)
    with pytest.raises(ZeroDivisionError), stats:
        model(torch.ones(1, 1))
    assert hooks(model) == 0
    assert stats.skipped == {"1": "was not called"}


def test_a_model_that_was_not_heard_is_warned_of():
    model = net().eval()
    with pytest.warns(UserWarning, match="no training batch"), ActivationStats(model):
        model(torch.ones(1, 2))


def test_it_is_opened_once_at_a_time():
    stats = ActivationStats(net())
    with pytest.warns(UserWarning, match="no training batch"), stats, pytest.raises(RuntimeError, match="open already"):
        stats.__enter__()


def test_nothing_recorded_is_empty():
    stats = ActivationStats({"it": Known()})
    assert stats.means == stats.deviations == stats.near_zero == stats.not_finite == {"it": []}
    assert stats.histograms["it"].shape == (0, BINS)
    assert stats.steps == []
    assert stats.skipped == {}
    assert repr(stats) == "ActivationStats(1 modules, 0 batches)"


def test_a_module_called_twice_is_one_row():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Known()

        def forward(self, x):
            return self.inner(x[:3]), self.inner(x[3:])

    model, x = Twice(), torch.tensor([1.0, 2.0, 4.0, 100.0, -7.0])
    with ActivationStats(model, every=1) as stats:
        model(x)
    assert stats.means == {"inner": [pytest.approx(20)]}
    assert stats.deviations == {"inner": [pytest.approx(float(x.double().std(correction=0)))]}
    assert stats.histograms["inner"].sum() == 5


@pytest.mark.parametrize(
    "output",
    [
        (None, torch.ones(2)),
        [3, (torch.ones(2), torch.zeros(9))],
        {"hidden": torch.ones(2, dtype=torch.int64), "logits": torch.ones(2)},
    ],
)
def test_of_several_outputs_the_first_of_floating_point(output):
    assert watched(output).means == {"it": [1.0]}


NO_VALUES = {
    "puts out no plain tensor of floating point, but NoneType": None,
    "puts out no plain tensor of floating point, but tuple": (1, torch.ones(2, dtype=torch.int64)),
    "puts out no plain tensor of floating point, but Tensor": torch.eye(2).to_sparse(),
    "puts out no values": torch.ones(0, 3),
}


@pytest.mark.parametrize("reason", NO_VALUES)
def test_what_has_no_values_is_skipped_and_says_why(reason):
    stats = watched(NO_VALUES[reason], NO_VALUES[reason])
    assert stats.skipped == {"it": reason}
    assert stats.steps == [1, 2]
    assert all(math.isnan(value) for value in stats.means["it"] + stats.near_zero["it"])
    assert not stats.histograms["it"].any()


def test_inside_a_transform_of_functions_there_is_nothing_to_read():
    model = net()
    with ActivationStats(model, nn.ReLU) as stats:
        torch.func.vmap(model)(torch.ones(4, 2))
    assert stats.skipped == {"0.1": "puts out no plain tensor of floating point, but Tensor"}


def test_one_batch_without_values_is_a_gap():
    stats = watched(torch.ones(2), torch.ones(0), torch.ones(3))
    assert stats.means["it"] == pytest.approx([1.0, math.nan, 1.0], nan_ok=True)
    assert stats.skipped == {}


def test_a_diverged_batch_is_a_figure():
    stats = watched(torch.tensor([1.0, math.inf]), torch.tensor([math.nan, 0.0, 2.0, 3.0]))
    assert stats.not_finite == {"it": [0.5, 0.25]}
    assert stats.near_zero == {"it": [0.0, 0.25]}
    assert stats.means["it"] == pytest.approx([math.inf, math.nan], nan_ok=True)
    assert stats.histograms["it"].sum(1).tolist() == [1, 3]


MEANT = {
    "layer": (None, ["0.0", "0.1", "1"]),
    "name": ("0.*", ["0.0", "0.1"]),
    "class": (nn.Linear, ["0.0", "1"]),
    "function": (lambda name, module: name == "0", ["0"]),
    "several": (["1", nn.ReLU], ["0.1", "1"]),
}


@pytest.mark.parametrize("how", MEANT)
def test_which_modules(how):
    only, names = MEANT[how]
    assert list(ActivationStats(net(), only).modules) == names


def test_by_default_what_computes_something():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.ones(1))
            self.attention = nn.MultiheadAttention(4, 2)
            self.linear = parametrizations.weight_norm(nn.Linear(4, 4))
            self.tied = self.linear
            self.rest = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Tanh())

    assert list(ActivationStats(Model()).modules) == ["attention", "attention.out_proj", "linear", "rest.2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": "layer9.*"}, "only='layer9.*' is not usable"),
        ({"model": {}}, "model={} is not usable"),
        ({"model": {"it": net()}, "only": "i*"}, "a dict of modules without `only`"),
        ({"only": 3}, "only=3 is not usable"),
        ({"every": 0}, "every=0 is not usable"),
        ({"limit": 0.0}, "limit=0.0 is not usable"),
        ({"bins": 40}, "bins=40 is not usable"),
    ],
)
def test_what_cannot_be_used_is_named(options, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ActivationStats(**{"model": net(), **options})


def test_a_fit_records_its_training_batches_alone():
    model = net()
    with ActivationStats(blocks(model), every=1) as stats:
        learner(model).fit(2)
    assert {name: len(values) for name, values in stats.means.items()} == {"0 Sequential": 6, "1 Linear": 6}
    assert stats.steps == [1, 2, 3, 4, 5, 6]


def test_as_a_callback_it_records_the_same_as_around_the_fit():
    first = net()
    second = copy.deepcopy(first)
    with ActivationStats(first, every=4) as around:
        learner(first, batches=9).fit(2)
    callback = ActivationStats(second, every=4)
    learner(second, [callback], batches=9).fit(1)
    learner(second, [callback], batches=9).fit(1)
    assert callback.steps == around.steps == [1, 5, 9, 13, 17]
    assert callback.means == around.means
    assert all(np.array_equal(callback.histograms[name], rows) for name, rows in around.histograms.items())
    assert hooks(second) == 0


def test_a_callback_closes_when_the_fit_fails():
    class Fails(Callback):
        def after_loss(self) -> None:
            raise ZeroDivisionError

    model = net()
    with pytest.raises(ZeroDivisionError):
        learner(model, [ActivationStats(model), Fails()]).fit(1)
    assert hooks(model) == 0


def test_watching_changes_nothing_and_holds_no_graph():
    def train(callbacks: list) -> torch.Tensor:
        torch.manual_seed(0)
        model = net()
        for stats in callbacks:
            stats.append(ActivationStats(model, every=2))
        learner(model, [stats[0] for stats in callbacks]).fit(1)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    box: list = []
    assert torch.equal(train([box]), train([]))
    held = [part for outputs in box[0]._fresh for calls in outputs.values() for call in calls for part in call[1:]]
    assert len(held) == 2 * 3 * 3
    assert not any(part.requires_grad for part in held)


def test_the_second_pass_of_a_checkpoint_is_not_counted():
    model = net()
    with ActivationStats(model, every=1) as stats:
        for _ in range(3):
            y = checkpoint(model, torch.ones(4, 2, requires_grad=True), use_reentrant=False)
            y.sum().backward()
    assert stats.steps == [1, 2, 3]
    assert stats.histograms["1"].sum(1).tolist() == [8, 8, 8]


def test_a_copy_of_the_model_made_inside_is_not_heard():
    model = net()
    with ActivationStats(model, every=1) as stats:
        model(torch.ones(1, 2))
        average = copy.deepcopy(model)
        average(torch.ones(1, 2))
        model(torch.ones(1, 2))
    assert stats.steps == [1, 2]


def test_a_frozen_part_in_evaluation_mode_is_recorded_too():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3).eval())
    with ActivationStats(model) as stats:
        model(torch.ones(4, 2))
    assert stats.histograms["1"].sum() == 12


def test_a_replica_of_the_model_counts_for_it():
    model = nn.DataParallel(net())  # without a GPU it calls the model itself
    with ActivationStats(model, "module.1") as stats:
        model(torch.ones(4, 2))
    assert list(stats.modules) == ["module.1"]
    assert stats.histograms["module.1"].sum() == 8


def test_a_replica_is_chosen_from_by_the_names_of_the_model():
    assert list(ActivationStats(nn.DataParallel(net()), "1").modules) == ["module.1"]


def test_figures_are_fetched_in_good_time():
    model = Known()
    with ActivationStats(model, every=1) as stats:
        for i in range(200):
            model(torch.tensor([float(i)]))
    assert len(stats._rows) == 192
    assert stats.means[""] == list(range(200))


def test_what_torch_compiled_runs_as_it_is_when_looked_at():
    model = net()
    runs = []

    def backend(graph, inputs):
        def run(*values):
            runs.append(len(stats.steps))
            return graph(*values)

        return run

    compiled = torch.compile(model, backend=backend)
    stats = ActivationStats(compiled, "0.*", every=3)
    with stats:
        for _ in range(7):
            compiled(torch.ones(4, 2))
    assert stats.steps == [1, 4, 7]
    assert list(stats.modules) == ["0.0", "0.1"]
    assert stats.histograms["0.1"].sum(1).tolist() == [12, 12, 12]
    assert runs == [1, 1, 2, 2]
    compiled(torch.ones(4, 2))
    assert len(runs) == 5  # compiled again afterwards


def test_a_learner_that_compiles_runs_as_it_is_when_looked_at(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options: real(f, backend="aot_eager"))
    model = net()
    plain = copy.deepcopy(model)
    stats, expected = ActivationStats(model, every=2), ActivationStats(plain, every=2)
    learner(model, [stats], compile=True).fit(1)
    learner(plain, [expected]).fit(1)
    assert stats.steps == [1, 3]
    assert all(stats.means[name] == pytest.approx(values, rel=1e-5) for name, values in expected.means.items())


def test_inside_compiled_code_it_says_that_it_hears_nothing():
    model = net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.warns(UserWarning, match="only by compiled code"), ActivationStats(model):
        compiled(torch.ones(4, 2))


def test_blocks_are_the_direct_children_with_parameters_by_place_and_kind():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.ReLU(), nn.BatchNorm1d(1))
    assert blocks(model) == {"0 Sequential": model[0], "2 BatchNorm1d": model[2]}
    named = nn.ModuleDict({"encoder": nn.Linear(1, 1), "decoder": nn.Bilinear(1, 1, 1)})
    assert list(blocks(named)) == ["encoder Linear", "decoder Bilinear"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_nothing_waits_and_the_figures_are_the_same():
    x = torch.randn(LARGEST_COUNT + 9, generator=torch.Generator().manual_seed(0))
    x[:3] = torch.tensor([math.nan, math.inf, 9.0])
    gpu = x.cuda()
    torch.cuda.set_sync_debug_mode("error")
    torch.use_deterministic_algorithms(True)
    try:
        stats = watched(gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    here = watched(x)
    assert stats.not_finite == here.not_finite
    assert abs(stats.histograms["it"] - here.histograms["it"]).sum() < 1e-4 * len(x)  # at edges rounding decides


@dataclass
class Prediction:
    name: str
    logits: torch.Tensor
    boxes: torch.Tensor


class Gives(nn.Module):
    """Puts out what a function makes of its input."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: Prediction("net", x, x + 9),
        lambda x: {"aux": None, "out": Prediction("net", x, x + 9)},
        lambda x: ("text", [x]),
        lambda x: torch.nested.nested_tensor([x[:1], x[1:]]),
        lambda x: torch.nested.nested_tensor([x[:1], x[1:]], layout=torch.jagged),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_structures_and_nested_tensors_hold_is_read(make):
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    model = Gives(make)
    with ActivationStats(model) as stats:
        model(x)
    assert stats.means[""] == pytest.approx([x.double().mean().item()], abs=1e-6)
    assert stats.deviations[""] == pytest.approx([x.double().std(correction=0).item()], abs=1e-6)
    assert stats.skipped == {}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_of_nothing_is_skipped_and_the_loop_goes_on():
    model = Gives(lambda x: torch.nested.nested_tensor([]))
    with ActivationStats(model) as stats:
        model(torch.ones(1))
    assert "no plain tensor of floating point" in stats.skipped[""]

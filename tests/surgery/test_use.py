"""How a model really uses its norms: what the report says holds, and what nobody established is said to be assumed."""

import copy
import functools
import io
import pickle
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import normlab
from normlab.errors import InputError
from normlab.kernels.running import State
from normlab.nn import NORMS
from normlab.surgery import convert, fold, freeze, recalibrate, unfreeze, unsync


def settled(model, seed=0):
    """With statistics, γ and β of its own in each channel."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            if getattr(module, "num_batches_tracked", None) is not None:
                module.num_batches_tracked.fill_(20)
            for name in ("weight", "bias"):
                if getattr(module, name, None) is not None:
                    with torch.no_grad():
                        part = getattr(module, name)
                        part.copy_(torch.randn(part.shape, generator=generator))
    return model.eval()


def by_hand(norm, x):
    """Batch norm in evaluation, in float64."""
    along = (1, -1, *[1] * (x.dim() - 2))
    mean, var, weight, bias = (
        part.detach().double().view(along) for part in (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    )
    return (x.double() - mean) / (var + norm.eps).sqrt() * weight + bias


Pair = namedtuple("Pair", "first second")


class Held(nn.Module):
    """A norm that is a submodule, and that `forward` reaches by another way."""

    def __init__(self, way):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.kept, self.way = HOLD[way](self.bn), REACH[way]

    def forward(self, x):
        return self.way(self.kept)(x)


HOLD = {
    "list": lambda bn: [bn],
    "tuple": lambda bn: (1, bn),
    "named tuple": lambda bn: Pair(bn, 2),
    "list in a dict": lambda bn: {"a": [bn]},
    "tuple in a list": lambda bn: [(bn, "x")],
    "object": lambda bn: SimpleNamespace(norm=bn),
}
REACH = {
    "list": lambda kept: kept[0],
    "tuple": lambda kept: kept[1],
    "named tuple": lambda kept: kept.first,
    "list in a dict": lambda kept: kept["a"][0],
    "tuple in a list": lambda kept: kept[0][0],
    "object": lambda kept: kept.norm,
}


@pytest.mark.parametrize("way", HOLD)
def test_a_norm_that_is_held_elsewhere_too_is_replaced_there(way):
    model, x = settled(Held(way)), torch.randn(8, 4)
    expected = by_hand(model.bn, x)
    operation = freeze(model, inplace=True)
    assert REACH[way](model.kept) is model.bn
    assert "kept" in operation.report.rows[0].note
    before = model.bn.running_mean.clone()
    torch.testing.assert_close(model.train()(x + 30).double(), by_hand(model.bn, x + 30), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.bn.running_mean, before)
    operation.undo()
    assert REACH[way](model.kept) is model.bn
    assert type(model.bn) is nn.BatchNorm1d
    torch.testing.assert_close(model.eval()(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "hold", [lambda bn: {bn}, lambda bn: bn.forward, lambda bn: functools.partial(bn), lambda bn: lambda x: bn(x)]
)
def test_a_norm_that_is_held_where_nothing_can_be_put_is_left_and_named(hold):
    model = settled(nn.Sequential(nn.BatchNorm1d(4)))
    model.kept = hold(model[0])
    (row,) = convert(model, "running", inplace=True).report.rows
    assert row.became is None
    assert "kept" in row.note
    assert "no other can be put" in row.note


def test_a_network_that_torch_does_not_see_is_left_and_named():
    model = nn.Sequential(nn.BatchNorm1d(4))
    model.teacher = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))]
    rows = {row.name: row for row in freeze(model).report}
    assert rows["0"].became == "FrozenBatchNorm1d"
    assert rows["teacher[0].1"].became is None
    assert "does not see it" in rows["teacher[0].1"].note


class WithMore(nn.BatchNorm1d):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class WithAnything(nn.BatchNorm1d):
    def forward(self, x, *rest, **named):
        return super().forward(x)


@pytest.mark.parametrize("kind", [WithMore, WithAnything])
@pytest.mark.parametrize("verb", [convert, freeze])
def test_a_norm_that_takes_more_than_an_input_is_left_and_gives_what_it_gave(kind, verb):
    model, x, mask = settled(nn.Sequential(kind(4))), torch.randn(8, 4), torch.rand(8, 4)
    operation = verb(model)
    assert operation.report.rows[0].became is None
    assert "takes more than an input" in operation.report.rows[0].note
    assert torch.equal(operation.model[0](x, mask), model[0](x, mask))


class Tokens(nn.BatchNorm1d):
    """Over (N, L, C)."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


def test_a_norm_of_another_layout_is_left_even_where_the_sizes_agree():
    for channels in (3, 4, 5):
        (row,) = convert(nn.Sequential(Tokens(channels)), "running").report.rows
        assert row.became is None
        assert "computes something else" in row.note


@dataclass
class Out:
    logits: torch.Tensor
    aux: dict


class Structured(nn.Module):
    def __init__(self, pack):
        super().__init__()
        self.conv, self.bn, self.pack = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), pack

    def forward(self, x):
        return self.pack(self.bn(self.conv(x)))


class Custom:
    __slots__ = ("y",)

    def __init__(self, y):
        self.y = y


@pytest.mark.parametrize(
    "pack", [lambda y: Out(y, {"a": [y]}), Custom, lambda y: {"y": (y,)}, lambda y: (y.argmax(1),)]
)
def test_outputs_of_any_structure_are_compared(pack):
    model = settled(Structured(pack))
    batches = [torch.randn(4, 3, 5, 5)]
    assert convert(model, "running", batches=batches).report.change < 1e-4
    changed = convert(model, "group", batches=batches).report
    assert changed.change > 0.1
    folded, report = fold(model, batches[0])
    assert report.change < 1e-5
    assert isinstance(folded.bn, nn.Identity)


def test_an_output_without_a_tensor_is_no_passed_comparison():
    model = settled(Structured(lambda y: "done"))
    with pytest.raises(InputError, match="forward="):
        convert(model, "group", batches=[torch.randn(4, 3, 5, 5)])
    with pytest.raises(InputError, match="tensors"):
        fold(model, torch.randn(4, 3, 5, 5))


class Reads(nn.Module):
    """Never calls its norm, but computes with its parts."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)


def test_a_parent_that_reads_the_statistics_itself_is_named():
    model, x = settled(Reads()), torch.randn(4, 4, 3, 3)
    (row,) = freeze(model).report.rows
    assert row.became is None
    assert "Reads.forward reads its statistics itself" in row.note
    (row,) = convert(model, "group", batches=[x]).report.rows
    assert row.became is None
    assert "batch_norm" in row.note
    _, report = fold(nn.Sequential(nn.Conv2d(4, 4, 1), model).eval(), x)
    assert report.rows[0].became is None


def test_sync_norms_of_vectors_and_maps_become_norms_that_take_both():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.SyncBatchNorm(8)
    )
    model, x = settled(model), torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        y = by_hand(model[1], model[0](x))
        expected = by_hand(model[4], y.mean((2, 3)))
    for operation in (unsync(model), convert(model, "running"), freeze(model), convert(model, "torch", batches=[x])):
        with torch.no_grad():
            torch.testing.assert_close(operation.model(x).double(), expected, rtol=1e-4, atol=1e-4)
        assert operation.model.train()(x).shape == (4, 8)
    assert [row.became for row in convert(model, "torch").report] == [None, None]


@pytest.mark.parametrize("verb", ["convert", "freeze", "sync"])
def test_attributes_that_somebody_put_on_a_norm_carry_over(verb):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[1].qconfig, model[1].stage = "qat", 3
    operation = getattr(normlab, verb)(model)
    assert (operation.model[1].qconfig, operation.model[1].stage) == ("qat", 3)
    assert "qconfig, stage" in operation.report.rows[0].note


def test_channels_are_those_of_the_tensors_where_a_norm_was_cut():
    norm = settled(nn.BatchNorm2d(8))
    keep = [0, 2, 5]
    norm.weight, norm.bias = (nn.Parameter(part.detach()[keep]) for part in (norm.weight, norm.bias))
    norm.running_mean, norm.running_var = norm.running_mean[keep], norm.running_var[keep]
    x = torch.randn(2, 3, 4, 4)
    operation = convert(nn.Sequential(norm), "running")
    torch.testing.assert_close(operation.model(x).double(), by_hand(norm, x), rtol=1e-4, atol=1e-4)
    assert "has 3 channels, though it says 8" in operation.report.rows[0].note


@pytest.mark.parametrize("to", ["running", "batch", "sync", "group", "frozen", "torch"])
def test_a_model_on_the_meta_device_is_converted_and_nothing_is_claimed(to):
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4) if to == "torch" else nn.BatchNorm2d(4))
    operation = convert(model, to, dims=2)
    assert operation.model[1].weight.is_meta
    assert "assumed" in operation.report.rows[0].note


def test_pruned_and_reparametrised_norms_are_left():
    pruned = nn.BatchNorm2d(4)
    prune.l1_unstructured(pruned, "weight", amount=0.5)
    normed = nn.utils.weight_norm(nn.BatchNorm1d(4))
    for norm, why in ((pruned, "weight"), (normed, "weight")):
        (row,) = convert(nn.Sequential(norm), inplace=True).report.rows
        assert row.became is None
        assert why in row.note
    with pytest.raises(InputError, match="inplace=True"):
        convert(nn.Sequential(normed, nn.BatchNorm1d(4)))


@pytest.mark.parametrize("name", ["NormalSampler", "Normalize", "Enormous"])
def test_a_class_that_only_sounds_like_a_norm_is_none(name):
    sampler = type(name, (nn.Module,), {"forward": lambda self, x: x})()
    assert not normlab.is_norm(sampler)
    assert len(convert(nn.Sequential(sampler)).report) == 0


def test_what_normalises_is_told_from_what_does_not():
    assert all(normlab.is_norm(build) for build in (nn.BatchNorm2d(2), nn.LayerNorm(2), nn.GroupNorm(1, 2)))
    assert all(normlab.is_norm(normlab.nn.build_norm(name, 8)) for name in NORMS if name != "none")
    assert not normlab.is_norm(nn.Conv2d(2, 2, 1))
    assert not normlab.is_norm(nn.Sequential(nn.BatchNorm2d(2)))


def test_a_pattern_that_meets_no_norm_is_refused_with_the_nearest():
    model = nn.Sequential()
    model.layer4 = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    for verb in (convert, freeze, normlab.sync):
        with pytest.raises(InputError, match=r"layer4\.1"):
            verb(model, only="laeyr4.*")
        with pytest.raises(InputError, match=r"layer4\.1"):
            verb(model, skip=["layer4.*", "layr4.1"])
    with pytest.raises(InputError, match=r"layer4\.1"):
        recalibrate(model, [torch.randn(2, 3, 4, 4)], only="laeyr4.*")
    (row,) = convert(model, only=nn.BatchNorm3d).report.rows
    assert row.note == "not chosen: only=BatchNorm3d meets no norm of the model"


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))])
def test_patterns_understand_wrappers(wrap):
    model = nn.Sequential()
    model.layer4 = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert len(freeze(wrap(model), only="layer4.*", inplace=True).report.touched) == 1


def test_not_finite_is_not_no_change():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(4, 3, 5, 5)
    x[0, 0, 0, 0] = float("nan")
    report = convert(model, "group", batches=[x]).report
    assert report.change != report.change
    assert "infinite or NaN" in report.rows[0].note
    model[1].running_var[0] = float("nan")
    (row,) = fold(model, torch.randn(4, 3, 5, 5)).report.rows
    assert "infinite or NaN" in row.note


def test_modules_that_share_modules_take_no_longer_for_every_path():
    """They are 2⁴⁰: it would not end."""
    module = nn.Sequential(nn.BatchNorm1d(2))
    for _ in range(40):
        module = nn.Sequential(module, module)
    operation = convert(module, "running", inplace=True)
    assert len(operation.report) == 1


def test_momentum_comes_back_whatever_stood_in_between():
    model = nn.Sequential(nn.BatchNorm2d(4, momentum=0.03, eps=1e-3))
    for to in [name for name in NORMS if name not in ("none", "evonorm_b0", "filter_response", "evonorm_s0")]:
        there = convert(model, to).model
        back = convert(pickle.loads(pickle.dumps(there)), "batch").model
        assert (back[0].momentum, back[0].eps) == (0.03, 1e-3), to
    assert convert(model, "switchable").model[0].momentum == 0.03
    assert convert(model, "evonorm_b0").model[0].momentum == 0.03


def test_a_deployed_model_loads_without_this_package():
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, momentum=0.03), nn.ReLU()))
    x = torch.randn(2, 3, 5, 5)
    there = convert(convert(model, "running").model, "torch")
    assert type(there.model[1]) is nn.BatchNorm2d
    assert there.model[1].momentum == 0.03
    group = convert(convert(model, "group").model, "torch").model
    assert type(group[1]) is nn.GroupNorm
    fused = convert(nn.Sequential(normlab.nn.BatchNorm2d(3, activation="relu")), "torch").model
    assert fused(x).min() >= 0
    with torch.no_grad():
        torch.testing.assert_close(there.model(x), model(x), rtol=1e-5, atol=1e-5)
    file = io.BytesIO()
    torch.save((there.model, group, fused), file)
    code = (
        "import io, sys; sys.modules['normlab'] = None\n"
        "import torch; models = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=False)\n"
        "print(*(type(part).__name__ for model in models for part in model))"
    )
    done = subprocess.run([sys.executable, "-c", code], input=file.getvalue(), capture_output=True)
    assert done.stdout.split() == b"Conv2d BatchNorm2d ReLU Conv2d GroupNorm ReLU Sequential".split(), done.stderr


def test_undo_after_training_goes_on_with_what_was_learned():
    torch.manual_seed(0)
    x = torch.randn(8, 4, 16, 16) * 0.5 + 3
    operation = convert(nn.Sequential(nn.BatchNorm2d(4)), "running")
    optimizer = torch.optim.SGD(operation.model.parameters(), 0.1)
    for _ in range(50):
        optimizer.zero_grad()
        operation.model.train()(x).square().mean().backward()
        optimizer.step()
    trained = copy.deepcopy(operation.model[0])
    back = operation.undo().eval()
    torch.testing.assert_close(back(x).double(), by_hand(trained, x), rtol=1e-4, atol=1e-4)
    grouped = convert(nn.Sequential(nn.BatchNorm2d(4)), "group")
    grouped.model(x).sum().backward()
    torch.optim.SGD(grouped.model.parameters(), 0.1).step()
    with pytest.raises(InputError, match="trained since"):
        grouped.undo()
    assert isinstance(grouped.model[0], normlab.nn.GroupNorm)


def test_undo_after_fitting_is_bit_by_bit():
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)))
    state = copy.deepcopy(model.state_dict())
    operation = convert(model, "group", batches=[torch.randn(8, 3, 4, 4)], fit=True, inplace=True)
    assert not torch.equal(model[1].weight, state["1.weight"])
    operation.undo()
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())


def test_a_fold_in_place_is_undone_bit_by_bit_with_all_modes():
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    model.train()
    model[2].eval()
    state, modules = copy.deepcopy(model.state_dict()), list(model)
    operation = fold(model, torch.randn(2, 3, 4, 4), inplace=True)
    assert operation.model is model
    assert isinstance(model[1], nn.Identity)
    assert operation.undo() is model
    assert list(model) == modules
    assert [module.training for module in (model, *model)] == [True, True, True, False]
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())


def test_undo_in_the_wrong_order_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(4))
    first = convert(model, "running", inplace=True)
    second = freeze(model, inplace=True)
    with pytest.raises(InputError, match="later operation"):
        first.undo()
    second.undo()
    assert type(first.undo()[0]) is nn.BatchNorm2d


class Foreign(nn.Module):
    """A frozen batch norm as detection libraries have it."""

    def __init__(self, n):
        super().__init__()
        self.eps = 1e-3
        for name, value in {"weight": 1.5, "bias": 0.2, "running_mean": 0.3, "running_var": 2.0}.items():
            self.register_buffer(name, torch.full((n,), value) + torch.arange(n) / 7)

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Leaky(nn.Module):
    """Norm and activation in one."""

    def __init__(self, n):
        super().__init__()
        self.eps, self.momentum = 1e-5, 0.1
        self.weight, self.bias = nn.Parameter(torch.ones(n)), nn.Parameter(torch.zeros(n))
        self.register_buffer("running_mean", torch.zeros(n))
        self.register_buffer("running_var", torch.ones(n))

    def forward(self, x):
        parts = self.running_mean, self.running_var, self.weight, self.bias
        return F.leaky_relu(F.batch_norm(x, *parts, self.training, self.momentum, self.eps), 0.01)


class Plain(Leaky):
    def forward(self, x):
        parts = self.running_mean, self.running_var, self.weight, self.bias
        return F.batch_norm(x, *parts, self.training, self.momentum, self.eps)


def test_frozen_norms_of_other_classes_thaw_and_convert():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), Foreign(4)), torch.randn(8, 3, 5, 5)
    expected = by_hand(model[1], model[0](x).detach())
    assert freeze(model).report.rows[0].note == "is frozen already, by a class of its own"
    for operation in (unfreeze(model), convert(model, "running"), convert(model, "batch")):
        torch.testing.assert_close(operation.model.eval()(x).double(), expected, rtol=1e-4, atol=1e-4)
        assert "constants so far, are parameters now" in operation.report.rows[0].note
        assert len(list(operation.model[1].parameters())) == 2
    thawed = unfreeze(model).model.train()
    thawed(x)
    assert not torch.equal(thawed[1].running_mean, model[1].running_mean)


def test_a_batch_norm_of_ones_own_is_known_by_what_it_owns():
    x = torch.randn(8, 3, 5, 5) + 9
    leaky = settled(nn.Sequential(nn.Conv2d(3, 4, 1), Leaky(4)))
    for verb in (convert, freeze):
        (row,) = verb(leaky).report.rows
        assert row.became is None
        assert "not known" in row.note
    plain = settled(nn.Sequential(nn.Conv2d(3, 4, 1), Plain(4)))
    frozen = freeze(plain)
    assert frozen.report.rows[0].became == "FrozenBatchNorm2d"
    torch.testing.assert_close(frozen.model(x), plain(x), rtol=1e-4, atol=1e-4)
    for model in (leaky, plain):
        recalibrate(model, [x])
        given = model[0](x).detach().double().transpose(0, 1).flatten(1)
        torch.testing.assert_close(model[1].running_mean.double(), given.mean(1), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model[1].running_var.double(), given.var(1), rtol=1e-4, atol=1e-4)


def test_recalibration_keeps_constants_and_each_norms_own_kind_of_statistics():
    torch.manual_seed(0)
    xs = [torch.randn(4, 3, 8, 8) * (torch.rand(4, 3, 1, 1) + 0.5) + torch.randn(4, 3, 1, 1) * 5 for _ in range(5)]
    x = torch.cat(xs).double()
    instance = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True))
    recalibrate(instance, xs)
    torch.testing.assert_close(instance[0].running_mean.double(), x.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(instance[0].running_var.double(), x.var((2, 3)).mean(0), rtol=1e-4, atol=1e-4)
    moving = nn.Sequential(normlab.nn.MovingAverageBatchNorm2d(3))
    recalibrate(moving, xs)
    torch.testing.assert_close(moving[0].running_var.double(), x.square().mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    assert not moving[0].running_mean.any()
    for frozen in (Foreign(3), settled(normlab.nn.FrozenBatchNorm2d(3))):
        before = frozen.running_mean.clone()
        (row,) = recalibrate(nn.Sequential(frozen), xs).report.rows
        assert torch.equal(frozen.running_mean, before)
        assert "constants" in row.note


def test_padding_does_not_enter_the_statistics():
    torch.manual_seed(0)
    lengths = torch.tensor([3, 9, 12, 5] * 4)
    mask = torch.arange(12)[None] < lengths[:, None]
    x = (torch.randn(16, 6, 12) * 2 + 5) * mask[:, None]
    model = nn.Sequential(nn.BatchNorm1d(6), nn.MaxPool1d(2), nn.BatchNorm1d(6))
    recalibrate(model, [(x, lengths)], mask=lambda batch: torch.arange(12)[None] < batch[1][:, None])
    frames = x.double().transpose(1, 2)[mask]
    torch.testing.assert_close(model[0].running_mean.double(), frames.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].running_var.double(), frames.var(0), rtol=1e-5, atol=1e-5)
    half = model[1](model.eval()[0](x)).detach().double().transpose(1, 2)[mask[:, ::2]]
    torch.testing.assert_close(model[2].running_mean.double(), half.mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="mask"):
        recalibrate(model, [x], mask=lambda batch: torch.ones(3, 12, dtype=torch.bool))


@pytest.mark.parametrize("channels", [2, 4, 8, 16, 24])
def test_group_norm_of_vectors_still_says_something_of_its_input(channels):
    model = settled(nn.Sequential(nn.Linear(3, channels), nn.BatchNorm1d(channels)))
    x = torch.randn(64, 3)
    y = convert(model, "group").model(x)
    assert y.std(0).min() > 1e-3
    for to in ("instance", "layer"):
        operation = convert(nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1)), to)
        assert "one value" in operation.report.rows[0].note
    seen = convert(nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(8)), "instance", batches=[torch.randn(2, 3, 9)])
    assert seen.report.rows[0].became == "InstanceNorm"


def test_a_norm_that_never_saw_a_batch_begins_fresh_and_says_so_when_frozen():
    x = torch.randn(16, 8, 4, 4) * 3 + 5
    for model in (nn.Sequential(nn.BatchNorm2d(8)), unfreeze(freeze(nn.Sequential(nn.BatchNorm2d(8))).model).model):
        new = convert(model, "running").model
        assert new[0].share == 1
        new.train()(x)
        torch.testing.assert_close(new[0].running_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-3, atol=1e-3)
        assert "seen no batch" in convert(model, "frozen").report.rows[0].note
    there = convert(convert(nn.Sequential(nn.BatchNorm2d(8)), "sync").model, "running").model
    assert there[0].share == 1


def test_folding_leaves_the_guilty_norm_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm1, self.norm2 = nn.Linear(4, 4), nn.Linear(4, 4), *(nn.BatchNorm1d(4),) * 2
            self.norm2 = nn.BatchNorm1d(4)

        def forward(self, x):
            x = self.norm1(self.a(x))
            return self.norm2(self.b(x)) + F.linear(x, self.b.weight)

    model, x = settled(Tied()), torch.randn(5, 4)
    folded, report = fold(model, x)
    assert [row.became is None for row in report] == [False, True]
    with torch.no_grad():
        expected = by_hand(model.norm1, model.a(x))
        expected = by_hand(model.norm2, model.b.double()(expected)) + expected @ model.b.weight.T
    torch.testing.assert_close(folded(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_model_that_differs_from_itself_is_folded_and_nothing_is_claimed_of_its_output():
    class Counting(nn.Module):
        calls = 0

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            Counting.calls += 1
            return self.norm(self.conv(x)) + Counting.calls

    operation = fold(settled(Counting()), torch.randn(2, 3, 4, 4))
    assert operation.report.rows[0].became is not None
    assert operation.report.change is None


def test_a_hook_that_reads_what_the_new_norm_has_not_is_named():
    model = nn.Sequential(nn.BatchNorm2d(8))
    model[0].register_forward_hook(lambda norm, x, y: y + norm.running_mean.sum())
    (row,) = convert(model, "group").report.rows
    assert row.became is None
    assert "reads statistics" in row.note
    assert convert(model, "running").report.rows[0].became == "RunningBatchNorm2d"


def test_single_images_without_a_batch_are_no_batches():
    model = nn.Sequential(nn.InstanceNorm2d(4))
    (row,) = convert(model, "group", batches=[torch.randn(4, 4, 4)]).report.rows
    assert row.became is None
    assert "without a dimension of batches" in row.note


@pytest.mark.parametrize("to", ["running", "batch", "sync", "frozen", "renorm", "group", "instance", "ghost", "torch"])
def test_a_norm_without_a_shift_gets_none(to):
    model = settled(nn.Sequential(nn.Conv2d(3, 8, 1), nn.SyncBatchNorm(8) if to == "torch" else nn.BatchNorm2d(8)))
    model[1].bias = None
    new = convert(model, to, dims=2).model
    assert new[1].bias is None
    assert set(new.state_dict()) <= {*model.state_dict(), *(f"1.{name}" for name in State._fields)}
    assert unfreeze(freeze(model).model).model.state_dict().keys() == model.state_dict().keys()


def test_a_shift_without_a_scale_is_not_lost():
    model = settled(nn.Sequential(nn.BatchNorm2d(4)))
    model[0].weight = None
    (row,) = convert(model, "running").report.rows
    assert row.became is None
    assert "β without γ" in row.note


def test_a_property_of_somebodys_class_is_not_run():
    class Odd(nn.BatchNorm2d):
        @property
        def num_channels(self):
            raise RuntimeError("not yet")

    assert convert(nn.Sequential(Odd(4)), "running").report.rows[0].became == "RunningBatchNorm2d"


def test_one_small_batch_of_all_images_gives_exact_statistics_in_a_deep_net():
    torch.manual_seed(0)
    layers = [part for _ in range(4) for part in (nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh())]
    model, x = settled(nn.Sequential(*layers)), torch.randn(9, 5) * 3 + 1
    recalibrate(model, [x])
    given = x.double()
    with torch.no_grad():
        for layer in model.double():
            if isinstance(layer, nn.BatchNorm1d):
                torch.testing.assert_close(layer.running_mean, given.mean(0), rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(layer.running_var, given.var(0), rtol=1e-4, atol=1e-4)
            given = layer(given)

"""A conversion changes the norms and nothing else, says what it did, and can be undone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import normlab
from normlab.errors import InputError
from normlab.nn import NORMS, BatchNorm2d, FrozenBatchNorm2d, RunningBatchNorm2d, SyncBatchNorm2d
from normlab.surgery import convert

EXACT = ["running", "frozen", "sync", "renorm", "batch", "ghost"]


class Block(nn.Module):
    """Convolutions with torch's batch norm, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8, eps=1e-3)
        self.shared = nn.BatchNorm2d(8, affine=False)
        self.again = self.shared
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 36, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(self.shared(self.conv2(x)))
        return self.head(self.again(self.conv2(x)))


def images(n=8):
    return torch.randn(n, 3, 6, 6) * 2 + 0.5


def trained(model=None, steps=5):
    """A model with statistics and parameters that are not those of the beginning."""
    torch.manual_seed(0)
    model = Block() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    return model


def output(model, x):
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("to", EXACT)
def test_in_evaluation_nothing_changes(to):
    model, x = trained(), images()
    conversion = convert(model, to)
    assert len(conversion.report.touched) == 3
    assert all("the same in evaluation" in row.note for row in conversion.report)
    torch.testing.assert_close(output(conversion.model, x), output(model, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", EXACT)
def test_there_and_back_is_the_same_state(to):
    model, x = trained(), images()
    back = convert(convert(model, to).model, "batch").model
    torch.testing.assert_close(output(back, x), output(model, x), rtol=1e-6, atol=1e-6)  # by another kernel
    again = convert(convert(back, to).model, "batch").model
    assert torch.equal(output(again, x), output(back, x))
    assert list(back.state_dict()) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name


@pytest.mark.parametrize("to", NORMS)
def test_any_registered_norm_can_take_the_place(to):
    model = trained()
    conversion = convert(model, to, batches=[images(), images()])
    rows = conversion.report.rows
    assert len(rows) == 3
    assert all(row.change is not None for row in rows if row.became)
    assert conversion.report.change is not None
    y = conversion.model.train()(images())
    y.sum().backward()
    assert y.isfinite().all()


def test_the_report_names_every_place_and_class():
    report = convert(trained(), "running").report
    assert [(row.name, row.was, row.became) for row in report] == [
        ("norm1", "torch BatchNorm2d", "RunningBatchNorm2d"),
        ("shared, again", "torch BatchNorm2d", "RunningBatchNorm2d"),
        ("head.2", "torch BatchNorm1d", "RunningBatchNorm1d"),
    ]
    assert "norm1" in str(report)
    assert "3 changed, 0 left" in str(report)
    assert report.to_dict()["rows"][0]["name"] == "norm1"


def test_a_module_used_twice_stays_one():
    model = convert(trained()).model
    assert model.shared is model.again


def test_a_copy_by_default_and_the_model_itself_if_asked():
    model = trained()
    assert isinstance(convert(model).model.norm1, RunningBatchNorm2d)
    assert isinstance(model.norm1, nn.BatchNorm2d)
    assert convert(model, inplace=True).model is model
    assert isinstance(model.norm1, RunningBatchNorm2d)


def test_a_model_that_is_a_norm_itself():
    conversion = convert(nn.BatchNorm2d(3), dims=2, inplace=True)
    assert isinstance(conversion.model, RunningBatchNorm2d)
    assert isinstance(conversion.undo(), nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("head.*", ["head.2"]),
        ("again", ["shared, again"]),
        (nn.BatchNorm1d, ["head.2"]),
        (lambda name, module: module.affine, ["norm1", "head.2"]),
        (["norm1", nn.BatchNorm1d], ["norm1", "head.2"]),
    ],
)
def test_norms_are_chosen_by_name_class_or_function(only, expected):
    report = convert(trained(), only=only).report
    assert [row.name for row in report.touched] == expected
    assert all(row.note == "not chosen" for row in report.skipped)
    others = convert(trained(), skip=only).report
    assert [row.name for row in others.skipped] == expected


def test_a_choice_of_another_kind_is_refused():
    with pytest.raises(InputError, match="only=3"):
        convert(trained(), only=3)


def test_an_unknown_norm_is_refused_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'running'"):
        convert(trained(), "runing")


def test_undo_puts_everything_back():
    model = trained()
    before, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    conversion = convert(model, inplace=True)
    conversion.model.eval()
    assert conversion.undo() is model
    assert list(dict(model.named_modules()).values()) == list(before.values())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not model.norm1.training


def test_an_optimizer_goes_on_with_the_same_parameters():
    model = trained()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(images()).sum().backward()
    optimizer.step()
    weight = model.norm1.weight
    convert(model, inplace=True)
    assert model.norm1.weight is weight
    before = weight.detach().clone()
    optimizer.zero_grad()
    model(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_an_optimizer_gets_new_parameters_and_loses_those_that_are_gone():
    model = trained()
    optimizer = torch.optim.Adam([{"params": model.parameters(), "lr": 0.1}])
    model(images()).sum().backward()
    optimizer.step()
    bias = model.norm1.bias
    state = optimizer.state[bias]
    conversion = convert(model, "rms", inplace=True, optimizer=optimizer)
    known = [id(p) for p in optimizer.param_groups[0]["params"]]
    assert sorted(known) == sorted(id(p) for p in model.parameters())
    assert bias not in optimizer.state
    conversion.undo()
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert optimizer.state[bias] is state
    convert(model, "filter_response", inplace=True, optimizer=optimizer)
    new = dict(model.norm1.named_parameters())["activation.tau"]
    assert any(p is new for p in optimizer.param_groups[0]["params"])


def test_an_optimizer_is_not_that_of_a_copy():
    model = trained()
    with pytest.raises(InputError, match="optimizer"):
        convert(model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_hooks_go_on_and_can_be_removed():
    model, seen = trained(), []
    handle = model.norm1.register_forward_hook(lambda *_: seen.append("after"))
    model.norm1.register_forward_pre_hook(lambda *_: seen.append("before"))
    convert(model, inplace=True)
    model(images())
    assert seen == ["before", "after"]
    handle.remove()
    model(images())
    assert seen == ["before", "after", "before"]


def test_mode_type_and_what_learns_carry_over():
    model = trained().double()
    model.norm1.eval()
    model.norm1.weight.requires_grad_(False)
    model.head[2].half()
    new = convert(model).model
    assert not new.norm1.training
    assert new.shared.training
    assert new.norm1.weight.dtype == torch.float64
    assert new.norm1.running_mean.dtype == torch.float64
    assert not new.norm1.weight.requires_grad
    assert new.head[2].weight.dtype == torch.float16
    assert new.head[2].running_mean.dtype == torch.float32
    assert new.norm1.eps == 1e-3
    assert new.shared.weight is None


def test_momentum_carries_over_where_it_means_the_same():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, momentum=0.01))
    for to in ("batch", "sync", "ghost", "renorm"):
        conversion = convert(model, to)
        assert conversion.model[1].momentum == 0.01
        assert conversion.report.rows[0].note == "the same in evaluation"
    there = convert(model, "running")
    assert there.model[1].momentum == 0.1
    assert "momentum is 0.1, no longer 0.01" in there.report.rows[0].note
    model[1].momentum = None  # the mean of all batches, which only batch norm can be
    assert convert(model, "batch").model[1].momentum is None
    assert "momentum is 0.1, no longer None" in convert(model, "sync").report.rows[0].note


def test_a_batch_norm_that_keeps_no_statistics_goes_on_keeping_none():
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)), images()
    conversion = convert(model, "batch")
    assert conversion.model[1].running_mean is None
    assert conversion.report.rows[0].note == "the same in evaluation"
    torch.testing.assert_close(output(conversion.model, x), output(model, x), rtol=1e-5, atol=1e-5)


def test_options_reach_the_new_layers():
    model = convert(trained(), "group", num_groups=2).model
    assert model.norm1.num_groups == 2


class WithActivation(nn.BatchNorm2d):
    """As other libraries have them: a conversion that knew no better would lose the activation."""

    def __init__(self, num_features):
        super().__init__(num_features)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(super().forward(x))


class Clipped(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Checked(nn.BatchNorm2d):
    def forward(self, x):
        assert x.dim() == 4
        return super().forward(x)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class MyNorm(nn.Module):
    def forward(self, x):
        return x / x.std()


def parametrized():
    norm = nn.BatchNorm2d(3)
    parametrize.register_parametrization(norm, "weight", nn.Softplus())
    return norm


LEFT = {
    "an activation inside": (WithActivation(3), "act"),
    "a forward of its own": (Clipped(3), "computes something else than BatchNorm2d"),
    "parametrized": (parametrized(), "parametrized"),
    "lazy": (nn.LazyBatchNorm2d(), "run a batch"),
    "layer norm": (nn.LayerNorm(3), "channels"),
    "layer norm of maps": (LayerNorm2d(3), "channels"),
    "local response": (nn.LocalResponseNorm(2), "channels"),
    "unknown": (MyNorm(), "not known"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_be_converted_is_left_and_named(name):
    module, why = LEFT[name]
    conversion = convert(nn.Sequential(nn.Conv2d(3, 3, 1), module), inplace=True)
    assert type(conversion.model[1]) is type(module)
    (row,) = conversion.report.rows
    assert row.became is None
    assert why in row.note


def test_a_model_that_is_not_made_yet_is_not_copied():
    with pytest.raises(InputError, match="run a batch"):
        convert(nn.Sequential(nn.LazyBatchNorm2d()))


def test_a_subclass_that_computes_the_same_is_converted():
    conversion = convert(nn.Sequential(Checked(3)))
    assert isinstance(conversion.model[0], RunningBatchNorm2d)


def test_a_norm_that_is_its_activation_keeps_it():
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8, activation="relu"), nn.Flatten()))
    x = images()
    for to in ("running", "group"):
        converted = convert(model, to)
        assert converted.model[1].activation == "relu"
    assert torch.allclose(output(convert(model).model, x), output(model, x), atol=1e-5)
    (row,) = convert(model, "rms").report.rows
    assert row.became is None
    assert "activation" in row.note


def test_group_norm_without_dimensions_takes_those_of_the_convolutions():
    model = nn.Sequential(nn.Conv3d(1, 8, 1), nn.GroupNorm(2, 8))
    assert type(convert(model).model[1]).__name__ == "RunningBatchNorm3d"
    conversion = convert(nn.Sequential(nn.GroupNorm(2, 8)))  # takes any, as group norm does
    assert "any number of space dimensions" in conversion.report.rows[0].note
    for space in ((), (3,), (3, 3), (3, 3, 3)):
        assert conversion.model(torch.randn(4, 8, *space)).shape == (4, 8, *space)
    assert type(convert(nn.Sequential(nn.GroupNorm(2, 8)), dims=1).model[0]).__name__ == "RunningBatchNorm1d"


@pytest.mark.parametrize("to", ["group", "running_instance", "switchable"])  # the last two learn more than γ and β
def test_the_effect_of_another_kind_of_norm_is_measured_and_made_small_by_least_squares(to):
    model, batches = trained(), [images() for _ in range(4)]
    plain = convert(model, to, batches=batches).report
    fitted = convert(model, to, batches=batches, fit=True)
    assert "another function, with the same γ and β" in plain.rows[0].note
    assert plain.rows[0].change > 0.01
    for one, other in zip(plain.rows, fitted.report.rows, strict=True):
        assert other.change <= one.change + 1e-6
    # As measured by hand, on the input that the norm had in the model as it was.
    seen = []
    handle = model.eval().norm1.register_forward_hook(lambda _, x, y: seen.append((x[0], y)))
    for batch in batches:
        model(batch)
    handle.remove()
    x, y = (torch.cat(parts).detach() for parts in zip(*seen, strict=True))
    new = fitted.model.norm1.eval()(x).detach()
    expected = ((new - y).square().mean().sqrt() / y.std(correction=0)).item()
    assert fitted.report.rows[0].change == pytest.approx(expected, rel=1e-3)


def test_exact_conversions_change_nothing_by_measure():
    report = convert(trained(), batches=[images()]).report
    assert report.change < 1e-4
    assert all(row.change < 1e-4 for row in report)


def test_a_model_that_draws_random_numbers_draws_the_same_for_the_measure():
    class Noisy(Block):
        def forward(self, x):
            return super().forward(x) + torch.randn(len(x), 2)

    assert convert(Noisy(), batches=[torch.ones(4, 3, 6, 6)] * 2).report.change < 1e-4
    model, batches = Noisy(), [torch.ones(4, 3, 6, 6)]
    state = torch.get_rng_state()
    convert(model, batches=batches)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_converted_model_is_copied_saved_and_trained():
    model = convert(trained()).model
    x = images()
    again = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert torch.equal(output(again, x), output(model, x))
    trained(model)


def test_it_is_at_hand_at_the_top():
    assert normlab.convert is convert
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        normlab.convrt  # noqa: B018


def test_sync_and_frozen_are_there():
    assert isinstance(convert(trained(), "sync").model.norm1, SyncBatchNorm2d)
    assert isinstance(convert(trained(), "frozen").model.norm1, FrozenBatchNorm2d)


def test_fitting_leaves_gamma_where_a_channel_is_closed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    with torch.no_grad():
        model[0].bias[1] = -1e3  # never above 0
        model[2].weight[1] = 0.7
        model[2].running_mean.copy_(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    batches = [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)]
    fitted = convert(model, "instance", batches=batches, fit=True)
    assert fitted.model[2].weight[1] == model[2].weight[1]
    # β is what the old norm put out there: γ (0 − μ) / √(σ² + eps) + β
    expected = -0.7 * 0.3 / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(fitted.model[2].bias[1].item(), expected, rtol=1e-5, atol=1e-6)
    assert fitted.model[2].weight.abs().max() < 10
    model.eval()
    before, after = (torch.cat([net.eval()(x).flatten() for x in batches]) for net in (model, fitted.model))
    change = (after - before).square().mean().sqrt() / before.std(correction=0)
    torch.testing.assert_close(fitted.report.change, change.item(), rtol=1e-4, atol=1e-6)


def test_a_change_of_rounding_in_what_does_not_vary_is_not_known():
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False))
    same = torch.randn(1, 3, generator=torch.Generator().manual_seed(1)).expand(7, 3)
    row = convert(model, "ghost", batches=[same]).report.rows[0]
    assert row.change is None
    assert "its output hardly varies" in row.note


def test_a_norm_that_begins_with_gamma_0_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    nn.init.zeros_(model[1].weight)
    assert convert(model, "group", batches=[torch.randn(2, 3, 8, 8)]).report.rows[0].change == 0

"""What surgery has to leave alone, or take along, beside the norms themselves."""

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from normlab import convert, diagnose, fold, freeze, recalibrate, sync, unfreeze
from normlab.errors import InputError
from normlab.nn import BatchNorm2d, GroupNorm, RunningBatchNorm2d
from situation import assert_near, assert_same_as, by_hand, evaluated, numbers, state_of, with_drawn_state

VERBS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "convert": lambda model, x: convert(model, "running", inplace=True).undo(),
    "convert, measured": lambda model, x: convert(model, "group", batches=[x], fit=True, inplace=True).undo(),
    "freeze": lambda model, x: freeze(model, inplace=True).undo(),
    "recalibrate": lambda model, x: recalibrate(model, [x]).undo(),
    "diagnose": lambda model, x: diagnose(model, [x]),
    "fold": lambda model, x: fold(model, x, inplace=True).undo(),
}
each_verb = pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)


class Adapted(nn.Linear):
    """A linear layer with an adapter, which `eval` adds to the weight and `train` takes out again."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(numbers(1, inputs)), nn.Parameter(numbers(outputs, 1))
        self.merged = False

    def train(self, mode: bool = True) -> "Adapted":
        super().train(mode)
        if self.merged == mode:
            self.weight.data += (self.up @ self.down) * (-1 if mode else 1)
            self.merged = not mode
        self.down.requires_grad_(mode)
        return self

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y if self.merged else y + input @ self.down.T @ self.up.T


@each_verb
def test_adapters_that_evaluation_merges_are_apart_again(verb):
    model = nn.Sequential(Adapted(4, 6), with_drawn_state(nn.BatchNorm1d(6)))
    before = state_of(model)
    verb(model, numbers(16, 4))
    assert_same_as(before, model)
    assert not model[0].merged


def test_statistics_behind_an_adapter_are_those_of_the_layer_with_it():
    model, x = nn.Sequential(Adapted(4, 6), nn.BatchNorm1d(6)), numbers(64, 4, seed=1)
    recalibrate(model, [x])
    assert_near(model[1].running_mean, evaluated(model[0], x).double().mean(0))


class Recording(nn.BatchNorm2d):
    """Keeps what it was given, and draws random numbers."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.means: list[float] = []

    def forward(self, input: Tensor) -> Tensor:
        self.means.append(float(input.mean()))
        random.random(), np.random.rand()
        return super().forward(input)


@each_verb
def test_a_list_that_a_norm_writes_has_no_made_up_inputs_in_it(verb):
    model, x = nn.Sequential(with_drawn_state(Recording(3))), numbers(4, 3, 5, 5)
    python, (_, keys, place, *_) = random.getstate(), np.random.get_state()
    verb(model, x)
    assert all(mean == pytest.approx(float(x.mean())) for mean in model[0].means)
    assert random.getstate() == python
    assert np.random.get_state()[2] == place
    assert np.array_equal(np.random.get_state()[1], keys)


class Split(nn.BatchNorm2d):
    """In training half of a batch goes through a norm of its own, as in AdvProp."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.other = nn.BatchNorm2d(num_features)

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        half = len(input) // 2
        return torch.cat([super().forward(input[:half]), self.other(input[half:])])


@each_verb
def test_norms_inside_a_norm_keep_their_statistics(verb):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Split(4))
    other = model[1].other
    verb(model, numbers(6, 3, 5, 5))
    assert other.num_batches_tracked == 0
    assert torch.equal(other.running_mean, torch.zeros(4))


class Pair(NamedTuple):
    norm: nn.Module
    number: int


class Slots:
    __slots__ = ("norm",)

    def __init__(self, norm: nn.Module):
        self.norm = norm


class Held(nn.Module):
    """Calls its norm by another road than the registered one."""

    def __init__(self, road: str):
        super().__init__()
        self.norm = with_drawn_state(nn.BatchNorm2d(3))
        self.first = self.second = Pair(self.norm, 1)
        self.slots, self.road = Slots(self.norm), road

    def forward(self, x: Tensor) -> Tensor:
        roads = {"tuple": self.first.norm, "same tuple": self.second.norm, "slot": self.slots.norm}
        return roads[self.road](x)


@pytest.mark.parametrize("road", ["tuple", "same tuple", "slot"])
def test_a_norm_is_replaced_wherever_it_is_held(road):
    model, x = Held(road), numbers(2, 3, 4, 4)
    before = by_hand(x, model.norm)
    operation = convert(model, "running")
    assert isinstance(operation.model.norm, RunningBatchNorm2d)
    assert len({id(one) for one in (operation.model.norm, operation.model.second.norm)}) == 1
    operation.model.train()(x)
    assert operation.model.norm.num_batches_tracked == 1001
    undone = operation.undo()
    assert isinstance(undone.slots.norm, nn.BatchNorm2d)
    assert_near(evaluated(model, x), before)


class Keeping(nn.Module):
    """Keeps the features before the norm, for a loss of distillation."""

    def __init__(self, in_list: bool):
        super().__init__()
        self.conv, self.norm, self.in_list = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), in_list
        self.features: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        self.features = [y] if self.in_list else y
        return self.norm(y)


@pytest.mark.parametrize("in_list", [False, True])
def test_features_that_a_model_keeps_are_the_same_after_fold(in_list):
    model, x = with_drawn_state(Keeping(in_list)), numbers(2, 3, 6, 6)
    folded, report = fold(model, x)
    folded(x)
    kept = folded.features[0] if in_list else folded.features
    assert_near(kept, nn.functional.conv2d(x, model.conv.weight, model.conv.bias))
    assert "attribute" in report.rows[0].note


class Domains(nn.Module):
    """A norm for each of two domains, with γ and β in common."""

    def __init__(self):
        super().__init__()
        self.one, self.two = with_drawn_state(nn.BatchNorm2d(3)), with_drawn_state(nn.BatchNorm2d(3), seed=2)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(2 * x)


def test_norms_that_share_gamma_and_beta_are_both_converted():
    model, x = Domains(), numbers(4, 3, 5, 5)
    operation = convert(model, "running", batches=[x])
    assert len(operation.report.touched) == 2
    assert operation.model.one.weight is operation.model.two.weight
    assert_near(evaluated(operation.model, x), by_hand(x, model.one) + by_hand(2 * x, model.two))


class WithResidual(nn.Module):
    def __init__(self, later: bool = False):
        super().__init__()
        self.norm, self.later = with_drawn_state(BatchNorm2d(8)), later

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) if self.later and len(x) > 2 else self.norm(x, residual=3 * x**2)


@pytest.mark.parametrize("to", ["group", "frozen", "sync", "torch", "none"])
def test_a_norm_that_adds_a_residual_is_left_where_the_new_one_cannot(to):
    model, x = WithResidual(), numbers(4, 8, 5, 5)
    operation = convert(model, to, batches=[x])
    assert "residual=" in operation.report.rows[0].note
    assert_near(evaluated(operation.model, x), by_hand(x, model.norm) + 3 * x**2)
    if to != "none":
        assert "assumed to be called without" in convert(model, to).report.rows[0].note


def test_a_residual_on_a_later_batch_is_an_error_that_says_so():
    model = WithResidual(later=True)
    before = state_of(model)
    with pytest.raises(InputError, match="residual="):
        convert(model, "group", batches=[numbers(4, 8, 5, 5), numbers(2, 8, 5, 5)], inplace=True)
    assert_same_as(before, model)


def test_a_fit_leaves_out_the_residual():
    model, x = WithResidual(), numbers(8, 8, 5, 5)
    operation = convert(model, "running", batches=[x], fit=True)
    assert_near(evaluated(operation.model, x), by_hand(x, model.norm) + 3 * x**2)
    assert operation.report.change < 1e-5


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = with_drawn_state(GroupNorm(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, mask=torch.arange(x.shape[2]).expand(len(x), -1) < 4)


def test_the_change_of_a_masked_norm_is_that_of_the_masked_one():
    model, x = Masked(), numbers(4, 8, 9)
    operation = convert(model, "instance", batches=[x])
    old, new = evaluated(model, x).double(), evaluated(operation.model, x).double()
    change = (new - old).square().mean().sqrt() / old.std(correction=0)
    assert operation.report.rows[0].change == pytest.approx(float(change), rel=1e-4)


def test_sync_keeps_the_process_group_of_torchs():
    group: Any = object()
    model = nn.Sequential(nn.SyncBatchNorm(4, process_group=group))
    assert sync(model, inplace=True).model[0].process_group is group


def test_gamma_of_another_shape_is_left_and_trains():
    class Shaped(nn.BatchNorm2d):
        def __init__(self, num_features: int):
            super().__init__(num_features)
            self.weight = nn.Parameter(self.weight.detach().view(1, -1, 1, 1))

        def forward(self, input: Tensor) -> Tensor:
            y = nn.functional.batch_norm(input, self.running_mean, self.running_var, training=self.training)
            return y * self.weight + self.bias.view(1, -1, 1, 1)

    model = nn.Sequential(Shaped(3))
    operation = convert(model, "running")
    assert "shape (1, 3, 1, 1)" in operation.report.rows[0].note
    operation.model.train()(numbers(4, 3, 5, 5)).sum().backward()


def test_statistics_that_are_rounded_are_named():
    model = convert(nn.Sequential(with_drawn_state(nn.BatchNorm2d(3))), "running").model.to(torch.bfloat16)
    assert "rounded to torch.bfloat16" in convert(model, "torch").report.rows[0].note


def test_a_forward_put_on_an_instance_is_read_too():
    model = nn.Module()
    model.norm = nn.BatchNorm2d(3)
    model.forward = lambda x: x - model.norm.running_mean[:, None, None]
    assert convert(model, "group", inplace=True).report.rows[0].became is None


class Constants(nn.Module):
    """A frozen batch norm of other origin, whose tensors have the shape of maps."""

    def __init__(self, num_features: int):
        super().__init__()
        drawn = with_drawn_state(nn.BatchNorm2d(num_features))
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(drawn, name).detach().view(1, -1, 1, 1).clone())
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) * (self.running_var + self.eps).rsqrt() * self.weight + self.bias


def learn(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()(x).square().mean().backward()
    optimizer.step()


def test_what_constants_learned_is_there_after_undo():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), Constants(4)), numbers(8, 3, 6, 6)
    before = state_of(model)
    unfreeze(model, inplace=True).undo()
    assert_same_as(before, model)
    operation = unfreeze(model, inplace=True)
    learn(model, x)
    learned, batch = evaluated(model, x), model[1]
    operation.undo()
    assert isinstance(model[1], Constants)
    assert_near(evaluated(model, x), learned)
    assert_near(learned, by_hand(evaluated(model[0], x), batch))


def test_undo_does_not_lose_a_gamma_that_was_not_there_before():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), with_drawn_state(nn.BatchNorm2d(4, affine=False))), numbers(8, 3, 6, 6)
    operation = convert(model, "running", affine=True, inplace=True)
    learn(model, x)
    learned = evaluated(model, x)
    with pytest.raises(InputError, match="has a weight that BatchNorm2d had not"):
        operation.undo()
    assert_near(evaluated(model, x), learned)


@pytest.mark.parametrize("way", ["undo", "unfreeze"])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_norm_that_comes_back_is_of_the_type_that_the_model_has_now(way, affine, dtype):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), with_drawn_state(nn.BatchNorm2d(4, affine=affine)))
    operation = freeze(model, inplace=True)
    model.to(dtype)
    back = operation.undo() if way == "undo" else unfreeze(model).model
    x = numbers(8, 3, 6, 6).to(dtype)
    expected = by_hand(evaluated(back[0], x), back[1])
    assert_near(evaluated(back, x).double(), expected, 1e-5 if dtype is torch.float64 else 0.02)
    learn(back, x)


def test_the_report_names_a_frozen_norm_whose_gamma_learns():
    model = convert(nn.Sequential(with_drawn_state(nn.BatchNorm2d(3))), "frozen").model
    assert "go on learning" in freeze(model).report.rows[0].note
    assert freeze(model, affine=False).report.rows[0].note == "is frozen already"
    assert freeze(model.requires_grad_(False)).report.rows[0].note == "is frozen already"


def test_surgery_inside_inference_mode_is_that_outside():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), with_drawn_state(nn.BatchNorm2d(4))), numbers(4, 3, 6, 6)
    fitted = convert(model, "group", batches=[x], fit=True).report
    with torch.inference_mode():
        folded = fold(model, x)
        assert convert(model, "group", batches=[x], fit=True).report.change == pytest.approx(fitted.change)
    assert [row.became for row in folded.report] == ["torch Identity"]
    assert_near(evaluated(folded.model, x), by_hand(evaluated(model[0], x), model[1]))


@pytest.mark.parametrize(
    ("to", "options", "said"),
    [
        ("group", {"groups": 2}, "Did you mean 'num_groups'"),
        ("running", {"num_features": 3}, "num_features"),
        ("torch", {"eps": 0.1}, "those of the old ones"),
    ],
)
def test_an_option_that_the_new_norm_has_not_is_named(to, options, said):
    with pytest.raises(InputError, match=said):
        convert(nn.Sequential(nn.BatchNorm2d(4)), to, **options)
    assert convert(nn.Sequential(nn.BatchNorm2d(4)), "group", num_groups=2).model[0].num_groups == 2

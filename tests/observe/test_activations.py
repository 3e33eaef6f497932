"""Activation statistics: against float64, in training only, and without touching the training."""

import math

import pytest
import torch
from torch import nn

from normlab.observe import ActivationStats, blocks
from normlab.observe.activations import mean_and_deviation
from normlab.training import Learner


class Known(nn.Module):
    """Puts out what it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_mean_and_deviation_of_every_training_batch():
    model = Known()
    inputs = [torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(i)) * (i + 1) + i for i in range(5)]
    with ActivationStats({"it": model}) as stats:
        for x in inputs:
            model(x)
    doubles = [x.double().flatten() for x in inputs]
    assert stats.means == {"it": pytest.approx([float(x.mean()) for x in doubles], rel=1e-6)}
    expected = [math.sqrt(float(((x - x.mean()) ** 2).mean())) for x in doubles]
    assert stats.deviations == {"it": pytest.approx(expected, rel=1e-6)}


def test_nothing_is_recorded_in_evaluation_nor_outside():
    model = Known()
    stats = ActivationStats({"it": model})
    model(torch.ones(2))
    with stats:
        model(torch.ones(2))
        model.eval()
        model(torch.ones(2))
    model.train()
    model(torch.ones(2))
    assert stats.means == {"it": [1.0]}
    assert not model._forward_hooks


def test_a_fit_records_its_training_batches_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    batch = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
    learner = Learner(model, [batch] * 3, [batch] * 7, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    with ActivationStats(blocks(model)) as stats:
        learner.fit(2)
    assert {name: len(values) for name, values in stats.means.items()} == {"0 Linear": 6, "2 Linear": 6}
    assert {name: len(values) for name, values in stats.deviations.items()} == {name: 6 for name in blocks(model)}


def test_watching_changes_nothing_and_holds_no_graph():
    def train(watched: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
        batch = torch.ones(4, 2), torch.tensor([0, 1, 0, 1])
        stats = ActivationStats(blocks(model) if watched else {})
        with stats:
            Learner(model, [batch] * 3, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).fit(1)
        assert not any(value.requires_grad for values in stats._values.values() for value in values)
        return nn.utils.parameters_to_vector(model.parameters()).detach()

    assert torch.equal(train(True), train(False))


def test_the_hooks_are_gone_after_a_failure():
    model = Known()
    with pytest.raises(ZeroDivisionError), ActivationStats({"it": model}):
        raise ZeroDivisionError
    assert not model._forward_hooks


def test_nothing_recorded_is_an_empty_list():
    stats = ActivationStats({"it": Known()})
    assert stats.means == stats.deviations == {"it": []}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_statistics_are_computed_in_float32_at_least(dtype):
    x = (torch.randn(400, 100, generator=torch.Generator().manual_seed(0)) * 3 + 100).to(dtype)
    mean, deviation = mean_and_deviation(x)
    assert mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(mean) == pytest.approx(float(x.double().mean()), rel=1e-6)
    assert float(deviation) == pytest.approx(float(x.double().std(correction=0)), rel=1e-5)


def test_a_single_value_has_no_deviation():
    assert mean_and_deviation(torch.tensor([3.0])).tolist() == [3, 0]


def test_blocks_are_the_direct_children_with_parameters_by_place_and_kind():
    model = nn.Sequential(nn.Sequential(nn.Linear(1, 1)), nn.ReLU(), nn.BatchNorm1d(1))
    assert blocks(model) == {"0 Sequential": model[0], "2 BatchNorm1d": model[2]}
    named = nn.ModuleDict({"encoder": nn.Linear(1, 1), "decoder": nn.Bilinear(1, 1, 1)})
    assert list(blocks(named)) == ["encoder Linear", "decoder Bilinear"]

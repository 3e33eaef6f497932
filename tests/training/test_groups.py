"""Parameter groups: what decays and what is spared."""

import doctest

import pytest
import torch
from torch import nn

from normlab.errors import InputError
from normlab.nn import NORMS, build_norm
from normlab.training import groups, parameter_groups


def names(model: nn.Module, weight_decay: float = 0.1) -> list[list[str]]:
    by_id = {id(part): name for name, part in model.named_parameters()}
    return [[by_id[id(part)] for part in group["params"]] for group in parameter_groups(model, weight_decay)]


def test_norms_and_biases_are_spared():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LayerNorm([4, 5, 5]), nn.Flatten(), nn.Bilinear(3, 3, 2), nn.PReLU()
    )
    assert names(model) == [
        ["0.weight", "4.weight"],
        ["0.bias", "1.weight", "1.bias", "2.weight", "2.bias", "4.bias", "5.weight"],
    ]
    first, second = parameter_groups(model, 0.1)
    assert (first["weight_decay"], second["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", sorted(NORMS))
def test_every_norm_of_ours_is_spared(name):
    norm = build_norm(name, 4, 2)
    assert names(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm))[0] == ["0.weight"]


def test_tied_parameters_are_there_once_and_frozen_ones_not_at_all():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].requires_grad_(False)
    assert names(model) == [["0.weight"], ["0.bias", "1.bias"]]


def test_only_what_is_there_makes_a_group():
    assert len(parameter_groups(nn.BatchNorm2d(4), 0.1)) == 1
    assert parameter_groups(nn.ReLU(), 0.1) == []


def test_decay_acts_on_weights_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = {name: part.detach().clone() for name, part in model.named_parameters()}
    model(torch.zeros(2, 4)).sum().mul(0).backward()
    torch.optim.SGD(parameter_groups(model, 0.5), lr=0.1).step()
    for name, part in model.named_parameters():
        torch.testing.assert_close(part.detach(), before[name] * (0.95 if name == "0.weight" else 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((nn.Linear, 0.1), "model: expected an instance, got the class Linear"),
        (([], 0.1), "model='list' is not usable. Accepted: a torch.nn.Module"),
        ((nn.ReLU(), -0.1), "weight_decay=-0.1 is not usable. Accepted: a number from 0"),
        ((nn.LazyLinear(2), 0.1), "model='weight, bias' .* run a batch through it first"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        parameter_groups(*arguments)


def test_the_example_runs():
    assert doctest.testmod(groups, extraglobs={"torch": torch}) == (0, 4)

"""Frozen norms stay as they are through training, and thaw into what they were."""

import copy
import pickle

import pytest
import torch
from torch import nn

from normlab.nn import BatchNorm2d, FrozenBatchNorm2d, RunningBatchNorm2d
from normlab.surgery import freeze, unfreeze
from surgery.test_convert import images, output, trained


def test_statistics_and_parameters_stay_while_the_rest_trains():
    model = freeze(trained()).model
    before = copy.deepcopy(model.state_dict())
    trained(model.train())
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "conv" in name or "head.1" in name or "head.3" in name}


def test_the_output_of_an_image_does_not_depend_on_the_others():
    model, x = freeze(trained()).model.train(), images()
    torch.testing.assert_close(model(x)[:1], model(x[:1]), rtol=1e-4, atol=1e-5)


def test_gamma_and_beta_may_go_on_learning():
    model = freeze(trained(), affine=False).model
    weight, mean = model.norm1.weight.detach().clone(), model.norm1.running_mean.clone()
    trained(model)
    assert not torch.equal(model.norm1.weight, weight)
    assert torch.equal(model.norm1.running_mean, mean)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, BatchNorm2d, RunningBatchNorm2d])
def test_there_and_back(norm):
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3), norm(8), nn.Flatten()))
    x = images()
    frozen = freeze(model)
    assert torch.allclose(output(frozen.model, x), output(model, x), atol=1e-5)
    thawed = unfreeze(pickle.loads(pickle.dumps(frozen.model))).model
    assert type(thawed[1]) is norm
    assert thawed[1].weight.requires_grad
    assert list(thawed.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in thawed.state_dict().items())
    trained(thawed)


def test_what_was_learned_while_frozen_stays():
    model = trained()
    freeze(model, affine=False, inplace=True)
    trained(model)
    weight = model.norm1.weight
    unfreeze(model, inplace=True)
    assert type(model.norm1) is nn.BatchNorm2d
    assert model.norm1.weight is weight


def test_what_did_not_learn_before_does_not_after():
    model = trained()
    model.norm1.bias.requires_grad_(False)
    thawed = unfreeze(freeze(model).model).model
    assert thawed.norm1.weight.requires_grad
    assert not thawed.norm1.bias.requires_grad


def test_the_report_names_norms_that_have_seen_no_batch():
    model = nn.Sequential(
        trained(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())), nn.BatchNorm1d(9)
    )
    assert ["no batch" in row.note for row in freeze(model).report] == [False, True]


def test_norms_without_statistics_are_left():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.BatchNorm2d(8, track_running_stats=False))
    conversion = freeze(model)
    assert [row.note for row in conversion.report] == ["has no running statistics"] * 2


def test_a_frozen_norm_of_other_origin_becomes_batch_norm():
    model = nn.Sequential(FrozenBatchNorm2d(3))
    assert type(unfreeze(model).model[0]) is BatchNorm2d


def test_undo_lets_learn_again():
    model = trained()
    freeze(model, inplace=True).undo()
    assert type(model.norm1) is nn.BatchNorm2d
    assert model.norm1.weight.requires_grad

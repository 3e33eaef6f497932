"""The norm card: what is not in a state dict is known when the weights are loaded."""

import copy
import doctest
import hashlib
import json

import numpy as np
import pytest
import torch
from torch import nn

import normlab
from normlab.errors import InputError
from normlab.nn import NORMS, build_norm
from normlab.surgery import _card


def net(**options) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **options), nn.Sequential(nn.GroupNorm(2, 4)))


def test_a_card_says_of_each_norm_what_a_state_dict_does_not():
    model = net(eps=1e-3, momentum=0.03)
    model(torch.randn(2, 3, 4, 4))
    card = json.loads(json.dumps(normlab.card(model)))
    assert list(card["norms"]) == ["1", "2.0"]
    entry = card["norms"]["1"]
    bn = model[1]
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    sha = hashlib.sha256()
    for name, part in (("running_mean", bn.running_mean), ("running_var", bn.running_var)):
        sha.update(f"{name}(4,)".encode() + part.double().numpy().tobytes())
    assert entry == {
        "class": "torch BatchNorm2d",
        "num_features": 4,
        "eps": 1e-3,
        "momentum": 0.03,
        "affine": True,
        "track_running_stats": True,
        "num_batches_tracked": 1,
        "statistics": sha.hexdigest()[:12],
    }
    assert "statistics" not in card["norms"]["2.0"]
    assert normlab.check_card(model, card) == normlab.check_card(model, json.dumps(card)) == []


@pytest.mark.parametrize("name", [name for name in NORMS if name != "none"])
def test_every_norm_has_a_card_that_its_saved_state_meets(name):
    model = nn.Sequential(build_norm(name, 8))
    model(torch.randn(4, 8, 3, 3))
    card = json.loads(json.dumps(normlab.card(model)))
    assert card["norms"]
    other = nn.Sequential(build_norm(name, 8))
    other.load_state_dict(model.state_dict())
    assert normlab.check_card(other, card) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda bn: setattr(bn, "eps", 1e-5), "1: eps was 0.001 when saved, is 1e-05 here, and no state dict has it"),
        (lambda bn: setattr(bn, "momentum", None), "1: momentum was 0.1 when saved, is None here"),
        (lambda bn: setattr(bn, "track_running_stats", False), "1: track_running_stats was True when saved, is False"),
        (lambda bn: bn.running_mean.add_(1), "1: running statistics are others"),
        (lambda bn: bn.num_batches_tracked.add_(1), "1: num_batches_tracked was 0 when saved, is 1 here"),
    ],
)
def test_a_norm_that_differs_is_named_with_the_cure(change, said):
    model = net(eps=1e-3)
    card = normlab.card(model)
    change(model[1])
    differences = normlab.check_card(model, card)
    assert len(differences) == 1
    assert differences[0].startswith(said)


def test_a_difference_of_many_norms_is_one_line():
    model = nn.Sequential(*(nn.BatchNorm2d(2, eps=1e-3) for _ in range(6)))
    card = normlab.card(model)
    differences = normlab.check_card(nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(6))), card)
    said = "0, 1, 2, 3 and 2 more: eps was 0.001 when saved, is 1e-05 here, and no state dict has it."
    assert differences == [f"{said} Set it as it was saved."]


def test_norms_that_are_missing_added_or_of_another_kind_are_named():
    card = normlab.card(net())
    less = net()[:2]
    assert normlab.check_card(less, card) == [
        "2.0: torch GroupNorm when saved, not in this model. Build the model as it was saved."
    ]
    more = nn.Sequential(*net(), nn.InstanceNorm2d(4))
    assert normlab.check_card(more, card)[0].startswith("3: torch InstanceNorm2d here, not in the model")
    other = normlab.convert(net(), "running").model
    assert normlab.check_card(other, card)[0].startswith("1: torch BatchNorm2d when saved, RunningBatchNorm2d here")


def test_statistics_of_two_norms_that_were_swapped_are_seen():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model(torch.randn(4, 3, 5, 5) + 1)
    state = model.state_dict()
    swapped = {f"{1 - int(name[0])}{name[1:]}": part for name, part in state.items()}
    other = copy.deepcopy(model)
    other.load_state_dict(swapped)
    differences = normlab.check_card(other, normlab.card(model))
    assert len(differences) == 1
    assert differences[0].startswith("0, 1: running statistics are others than those saved")


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_card_of_a_wrapped_model_fits_the_model_itself(wrap):
    model = net()
    assert normlab.card(wrap(model)) == normlab.card(model)
    assert normlab.check_card(wrap(model), normlab.card(model)) == []


def test_a_card_fits_the_model_in_double_precision_and_after_json():
    model = net()
    model(torch.randn(2, 3, 4, 4))
    assert normlab.check_card(copy.deepcopy(model).double(), json.dumps(normlab.card(model))) == []


class Rescale(nn.Module):
    """Somebody's own norm, by no name that tells so."""

    def __init__(self):
        super().__init__()
        self.variance_eps = 1e-6
        self.gain = nn.Parameter(torch.ones(3))


class Whitens(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_covariance", torch.eye(3))


def test_foreign_norms_with_an_eps_or_running_statistics_are_on_it():
    model = nn.Sequential(Rescale(), Whitens(), nn.ReLU())
    norms = normlab.card(model)["norms"]
    assert list(norms) == ["0", "1"]
    assert norms["0"] == {"class": "Rescale", "variance_eps": 1e-6}
    assert len(norms["1"]["statistics"]) == 12


def test_a_model_on_no_device_has_a_card():
    assert normlab.card(net().to("meta"))["norms"]["1"]["statistics"] is None


@pytest.mark.parametrize(
    ("card", "said"),
    [
        ("{broken", "expected JSON that normlab.card made"),
        ("[1]", r"expected {'norms': …} as of normlab.card, got \[1\]"),
        ({}, "expected {'norms': …}"),
        ({"norms": {"1": {"eps": 1}}}, "expected a dict with the class of '1', got {'eps': 1}"),
        ({"norms": {"1": 3}}, "the class of '1', got 3"),
    ],
)
def test_what_is_no_card_is_refused(card, said):
    with pytest.raises(InputError, match=f"{said}.*Save the weights again"):
        normlab.check_card(net(), card)


def test_the_example_shows_what_comes():
    assert doctest.testmod(_card) == (0, 2)


def test_a_norm_beside_a_wrapped_one_of_its_name_has_an_entry_of_its_own():
    def model(eps: float) -> nn.Module:
        made = nn.Module()
        made.bn, made.module = nn.BatchNorm2d(3), nn.ModuleDict({"bn": nn.BatchNorm2d(3, eps=eps)})
        return made

    card = normlab.card(model(0.25))
    assert sorted(entry["eps"] for entry in card["norms"].values()) == [1e-5, 0.25]
    (difference,) = normlab.check_card(model(0.5), card)
    assert "eps was 0.25 when saved, is 0.5 here" in difference
    assert normlab.check_card(nn.DataParallel(model(0.25)), card) == []


def test_an_eps_of_numpys_is_on_it():
    card = normlab.card(nn.Sequential(nn.BatchNorm2d(3, eps=np.float32(0.5))))
    assert json.loads(json.dumps(card))["norms"]["0"]["eps"] == 0.5


def test_a_lazy_norm_has_a_card_without_statistics():
    assert normlab.card(nn.Sequential(nn.LazyBatchNorm2d()))["norms"]["0"]["statistics"] is None

"""The table of a model: shapes, counts, how its norms are set, and that it is left as it was."""

import doctest
import json

import pytest
import torch
from torch import nn

import normlab
from normlab.errors import InputError
from normlab.models import build_model
from normlab.nn import NORMS, RunningBatchNorm2d, build_norm
from normlab.surgery import _summary, summary


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3, momentum=0.2), nn.ReLU(), nn.GroupNorm(2, 8)
    )


def test_shapes_counts_and_settings():
    found = summary(net(), torch.randn(2, 3, 6, 6))
    assert [(row.name, row.kind, row.input, row.output, row.parameters) for row in found] == [
        ("0", "torch Conv2d", (2, 3, 6, 6), (2, 8, 4, 4), 216),
        ("1", "torch BatchNorm2d", (2, 8, 4, 4), (2, 8, 4, 4), 16),
        ("2", "torch ReLU", (2, 8, 4, 4), (2, 8, 4, 4), 0),
        ("3", "torch GroupNorm", (2, 8, 4, 4), (2, 8, 4, 4), 16),
    ]
    assert [(row.eps, row.momentum, row.values, row.statistics) for row in found.norms] == [
        (1e-3, 0.2, 32, "running"),
        (1e-5, None, 32, None),
    ]
    assert (found.parameters, found.learned) == (248, 248)
    assert not any(row.frozen for row in found)


def test_what_does_not_change_is_said():
    model = nn.Sequential(
        nn.Linear(4, 4), *(nn.BatchNorm1d(4) for _ in range(4)), nn.ReLU(), nn.BatchNorm1d(4, affine=False)
    )
    model[0].requires_grad_(False)
    model[1].requires_grad_(False)
    normlab.freeze(model, only="2", inplace=True)
    normlab.freeze(model, only="3", affine=False, inplace=True)
    normlab.freeze(model, only="6", inplace=True)
    found = summary(model, torch.randn(2, 4))
    assert [row.frozen for row in found] == ["all", "parameters", "all", "statistics", "", "", "all"]


def test_tied_parameters_are_counted_once_and_modules_used_twice_shown_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.append(model[0])
    found = summary(model, torch.randn(2, 4))
    assert found.parameters == 24
    assert [(row.name, row.calls) for row in found] == [("0", 2), ("1", 1)]


def test_modules_that_were_not_run_and_own_parameters_are_shown():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.idle, self.inner = nn.Parameter(torch.ones(1)), nn.Linear(2, 2), nn.ReLU()

        def forward(self, x, *, more):
            return {"y": self.inner(x) * self.scale, "more": more}

    found = summary(Own(), {"x": torch.randn(2, 3), "more": torch.ones(1)})
    assert [(row.name, row.input, row.output, row.calls) for row in found] == [
        ("", (2, 3), (2, 3), 1),
        ("idle", None, None, 0),
        ("inner", (2, 3), (2, 3), 1),
    ]
    assert "not run" in str(found)
    assert "(the model)" in str(found)


def test_several_arguments_are_a_tuple():
    found = summary(nn.Bilinear(2, 3, 4), (torch.randn(5, 2), torch.randn(5, 3)))
    assert found.rows[0].output == (5, 4)


@pytest.mark.parametrize("name", sorted(NORMS))
def test_every_norm_of_ours_is_known(name):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), build_norm(name, 8, 2))
    found = summary(model, torch.randn(2, 3, 4, 4))
    assert len(found.norms) == (0 if name == "none" else 1)
    json.dumps(found.to_dict())


def test_the_model_is_as_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), RunningBatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4).eval())
    before, random = {name: part.clone() for name, part in model.named_buffers()}, torch.get_rng_state()
    summary(model, torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(part, before[name]) for name, part in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == [True, True, True, False]
    assert not any(module._forward_hooks for module in model.modules())


def test_after_a_pass_that_fails_no_hook_is_left():
    model = net()
    with pytest.raises(RuntimeError):
        summary(model, torch.randn(2, 5, 6, 6))
    assert not any(module._forward_hooks for module in model.modules())


def test_the_table_of_a_network_ends_with_its_counts():
    model = build_model("resnet", norm="running", num_classes=10)
    found = summary(model, torch.randn(2, 1, 28, 28))
    total = sum(part.numel() for part in model.parameters())
    assert sum(row.parameters for row in found) == found.parameters == total
    assert str(found).splitlines()[-1] == f"{total:,} parameters, {total:,} learn; {len(found.norms)} norms"
    assert len(str(found).splitlines()) == len(found) + 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ReLU, "model: expected an instance, got the class ReLU"),
        ([], "model='list' is not usable. Accepted: a torch.nn.Module"),
        (nn.LazyLinear(2), "model='weight, bias' .* run a batch through it first"),
    ],
)
def test_what_is_no_model_is_refused(model, message):
    with pytest.raises(InputError, match=message):
        summary(model, torch.ones(1))


def test_the_example_runs():
    assert doctest.testmod(_summary) == (0, 3)

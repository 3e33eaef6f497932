"""Every registered norm builds for each number of space dimensions and trains; wrong names are explained."""

import pytest
import torch
from torch import nn

import normlab.nn as norms
from normlab.errors import InputError
from normlab.nn import NORMS, build_norm, register


@pytest.fixture
def registry(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr("normlab.nn.registry.NORMS", dict(NORMS))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("name", NORMS)
def test_every_norm_trains_a_step(name, dims):
    torch.manual_seed(0)
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(convolution(1, 12, 3), build_norm(name, 12, dims), nn.ReLU(), nn.Flatten())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(4, 1, *[5] * dims)

    def loss():
        return (model(x) - 1).pow(2).mean()

    before = loss()
    before.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    optimizer.step()
    assert loss() < before
    assert model.eval()(x).isfinite().all()


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("none", [nn.Identity] * 3),
        ("batch", [norms.BatchNorm1d, norms.BatchNorm2d, norms.BatchNorm3d]),
        ("group", [norms.GroupNorm] * 3),
        ("layer", [norms.LayerNorm] * 3),
        ("instance", [norms.InstanceNorm] * 3),
        ("running", [norms.RunningBatchNorm1d, norms.RunningBatchNorm2d, norms.RunningBatchNorm3d]),
    ],
)
def test_a_name_is_a_class(name, classes):
    assert [type(build_norm(name, 8, dims)) for dims in (1, 2, 3)] == classes
    assert type(build_norm(name, 8)) is classes[1]


def test_every_norm_says_what_it_does():
    assert all(norm.summary for norm in NORMS.values())


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (8, 8), (12, 4), (6, 2), (7, 1), (1, 1)])
def test_group_norm_takes_as_many_groups_as_divide(channels, groups):
    assert build_norm("group", channels).num_groups == groups


def test_options_reach_the_layer():
    layer = build_norm("running", 4, 1, eps=0.5, momentum=0.25, affine=False)
    assert (layer.eps, layer.momentum, layer.affine) == (0.5, 0.25, False)
    assert build_norm("group", 12, num_groups=3, eps=0.5).num_groups == 3


def test_unknown_name():
    with pytest.raises(InputError) as error:
        build_norm("runing", 4)
    assert str(error.value) == (
        "norm='runing' is unknown. Did you mean 'running'? Accepted: none, batch, group, layer, instance, running."
    )


@pytest.mark.parametrize("dims", [0, 4])
def test_dims_out_of_range(dims):
    with pytest.raises(InputError, match=f"dims={dims} .* 1, 2 or 3"):
        build_norm("batch", 4, dims)


@pytest.mark.usefixtures("registry")
def test_register_one_for_all_dimensions():
    register("cosine", norms.LayerNorm, summary="a test")
    assert isinstance(build_norm("cosine", 4, 3), norms.LayerNorm)
    assert norms.registry.NORMS["cosine"].summary == "a test"


@pytest.mark.usefixtures("registry")
def test_register_one_for_each_dimension():
    register("torchs", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kinds = [type(build_norm("torchs", 4, dims)) for dims in (1, 2, 3)]
    assert kinds == [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


@pytest.mark.usefixtures("registry")
def test_registered_name_is_offered():
    register("cosine", norms.LayerNorm)
    with pytest.raises(InputError, match="Did you mean 'cosine'"):
        build_norm("cosin", 4)


def test_taken_name_is_refused():
    before = dict(NORMS)
    with pytest.raises(InputError, match="name='batch'"):
        register("batch", norms.LayerNorm)
    assert before == NORMS


@pytest.mark.parametrize("count", [0, 2, 4])
def test_register_one_or_three(count):
    with pytest.raises(InputError, match="one builder, or three"):
        register("cosine", *[norms.LayerNorm] * count)
    assert "cosine" not in NORMS

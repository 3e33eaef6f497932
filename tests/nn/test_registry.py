"""Every registered norm builds for each number of space dimensions and trains; wrong names are explained."""

import itertools
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

import normlab.nn as norms
from normlab.colours import COLOURS, PALETTE
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


@pytest.mark.parametrize("name", NORMS)
def test_a_name_is_a_public_class_and_its_forms_are_named_alike(name):
    kinds = [type(build_norm(name, 8, dims)) for dims in (1, 2, 3)]
    assert type(build_norm(name, 8)) is kinds[1]
    assert all(getattr(norms, kind.__name__, nn.Identity) is kind for kind in kinds)
    if kinds[0] is not kinds[1]:
        two = re.sub("2d", "#d", kinds[1].__name__)
        assert [kind.__name__ for kind in kinds] == [two.replace("#", dims) for dims in "123"]
        assert not any(issubclass(kinds[one], kinds[other]) for one, other in itertools.permutations(range(3), 2))


def test_every_layer_is_registered():
    """But for those that a norm makes, or that stand beside one."""
    layers = {thing for thing in vars(norms).values() if isinstance(thing, type) and issubclass(thing, nn.Module)}
    known = {type(build_norm(name, 8, dims)) for name in NORMS for dims in (1, 2, 3)}
    others = {kind.__name__ for kind in layers - known if not issubclass(kind, _ConvNd)}
    assert others == {"BatchNormAct1d", "BatchNormAct2d", "BatchNormAct3d", "ThresholdedLinearUnit"}


def test_the_table_of_norms_in_the_readme_is_that_of_their_records():
    rows = [f"| `{name}` | {about} | {source} |".replace("|  |", "| |") for name, about, source in norms.list_norms()]
    readme = (Path(__file__).parents[2] / "README.md").read_text().splitlines()
    start = readme.index("| name | what it is | source |") + 2
    found = list(itertools.takewhile(lambda line: line.startswith("|"), readme[start:]))
    assert sorted(found) == sorted(rows), "README's table has to hold these rows:\n" + "\n".join(rows)


def test_no_two_norms_have_one_colour():
    assert sorted(COLOURS.values()) == sorted(PALETTE)
    assert COLOURS.keys() <= NORMS.keys()


def test_norms_that_are_the_activation_too():
    assert {name for name, norm in NORMS.items() if norm.activates} == {"evonorm_b0", "evonorm_s0", "filter_response"}


def test_norms_with_a_convolution_of_their_own():
    own = {name: norm.convs for name, norm in NORMS.items() if norm.convs != norms.registry.CONVS}
    assert own == {
        "mabn": (norms.CenteredConv1d, norms.CenteredConv2d, norms.CenteredConv3d),
        "group_ws": (norms.WeightStandardizedConv1d, norms.WeightStandardizedConv2d, norms.WeightStandardizedConv3d),
    }


def test_every_norm_says_what_it_does_in_a_line():
    assert all(0 < len(norm.summary) < 72 for norm in NORMS.values())
    assert all(norm.about and (norm.source or name == "none") for name, norm in NORMS.items())


@pytest.mark.parametrize(("channels", "groups"), [(64, 8), (8, 8), (12, 4), (6, 2), (7, 1), (1, 1)])
def test_as_many_groups_as_divide(channels, groups):
    for name in ("group", "group_ws", "evonorm_s0"):
        assert build_norm(name, channels).num_groups == groups


def test_options_reach_the_layer():
    layer = build_norm("running", 4, 1, eps=0.5, momentum=0.25, affine=False)
    assert (layer.eps, layer.momentum, layer.affine) == (0.5, 0.25, False)
    assert build_norm("group", 12, num_groups=3, eps=0.5).num_groups == 3


def test_unknown_name():
    with pytest.raises(InputError) as error:
        build_norm("runing", 4)
    accepted = ", ".join(NORMS)
    assert str(error.value) == f"norm='runing' is unknown. Did you mean 'running'? Accepted: {accepted}."


@pytest.mark.parametrize("dims", [0, 4])
def test_dims_out_of_range(dims):
    with pytest.raises(InputError, match=f"dims={dims} .* 1, 2 or 3"):
        build_norm("batch", 4, dims)


@pytest.mark.usefixtures("registry")
def test_register_one_for_all_dimensions():
    register("cosine", norms.LayerNorm, summary="a test")
    assert isinstance(build_norm("cosine", 4, 3), norms.LayerNorm)
    assert norms.registry.NORMS["cosine"].summary == "a test"


@pytest.mark.parametrize("name", ["group", "evonorm_s0", "group_ws"])
def test_number_of_groups_that_does_not_divide_is_refused_with_those_that_do(name):
    with pytest.raises(InputError, match=r"num_groups=5 .* 1, 2, 4, 8"):
        build_norm(name, 8, num_groups=5)


@pytest.mark.parametrize("channels", [2, 4, 8, 16, 24, 32])
def test_group_norm_of_features_tells_inputs_apart(channels):
    y = build_norm("group", channels, dims=1)(torch.randn(64, channels))
    assert (y.std(0) > 0.3).all()


def test_norms_whose_momentum_is_batch_norms():
    assert [name for name, norm in NORMS.items() if norm.averages] == [
        "renorm", "batch", "sync", "ghost", "switchable", "evonorm_b0",
    ]  # fmt: skip


@pytest.mark.usefixtures("registry")
def test_register_one_for_each_dimension():
    register("torchs", nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    kinds = [type(build_norm("torchs", 4, dims)) for dims in (1, 2, 3)]
    assert kinds == [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d]


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("name", NORMS)
def test_register_says_all_that_an_entry_can(name):
    layers, *rest = NORMS[name]
    register("mine", *layers, **dict(zip(norms.Norm._fields[1:], rest, strict=True)))
    assert norms.registry.NORMS["mine"] == NORMS[name]


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


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("convs", [[], [nn.Conv2d]])
def test_register_three_convolutions(convs):
    with pytest.raises(InputError, match=r"convs=.* three convolutions"):
        register("cosine", norms.LayerNorm, convs=convs)
    assert "cosine" not in norms.registry.NORMS


@pytest.mark.usefixtures("registry")
def test_a_misspelt_fact_is_refused():
    with pytest.raises(InputError, match=r"fact='sumary' is unknown\. Did you mean 'summary'"):
        register("cosine", norms.LayerNorm, sumary="a test")
    with pytest.raises(InputError, match=r"over='all' is not usable\. Accepted: the last batches, this batch"):
        register("cosine", norms.LayerNorm, over="all")
    assert "cosine" not in norms.registry.NORMS

"""Statistics measured anew are those of all images together, whatever the batch size."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from checks import assert_close, assert_same_state
from normlab.errors import InputError
from normlab.nn import EvoNorm2dB0, RunningBatchNorm2d
from normlab.surgery import recalibrate
from surgery.test_convert import Block, trained

IMAGES = torch.randn(60, 3, 6, 6, generator=torch.Generator().manual_seed(1)) * 3 - 1


def spoilt(model):
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.fill_(7)
            module.running_var.fill_(50)
    return model


@pytest.mark.parametrize("size", [1, 7, 60])
def test_the_first_norm_has_the_moments_of_its_input(size):
    model = spoilt(trained())
    recalibrate(model, IMAGES.split(size))
    given = model.conv1(IMAGES).detach().double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(model.norm1.running_mean.double(), given.mean(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.norm1.running_var.double(), given.var(1), rtol=1e-5, atol=1e-5)
    assert model.norm1.num_batches_tracked == len(IMAGES.split(size))


def deep(norm, norms=12):
    """As many norms, one after another."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 1), norm(8), nn.ReLU()]
    for _ in range(norms - 1):
        layers += [nn.Conv2d(8, 8, 3, padding=1), norm(8), nn.ReLU()]
    return spoilt(nn.Sequential(*layers))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, RunningBatchNorm2d])
@pytest.mark.parametrize(("size", "closeness"), [(60, 0.01), (6, 0.15), (1, 0.15)])
def test_evaluation_is_training_on_all_images_at_once(norm, size, closeness):
    model = deep(norm)
    recalibrate(model, IMAGES.split(size))
    expected = nn.Sequential(*(nn.BatchNorm2d(m.num_features) if isinstance(m, norm) else m for m in model)).train()
    change = (model.eval()(IMAGES) - expected(IMAGES)).square().mean().sqrt()
    assert change < closeness * expected(IMAGES).std()  # n or n − 1


@pytest.mark.parametrize("size", [1, 60])
def test_what_the_statistics_were_before_is_nothing_to_those_after(size):
    """However far off they were: what norms behind them were given then is not counted."""
    model, other = deep(nn.BatchNorm2d), deep(nn.BatchNorm2d)
    for name, part in other.named_buffers():
        if name.endswith("running_var"):
            part.fill_(1e-12)
    for one in (model, other):
        recalibrate(one, IMAGES.split(size))
    assert_close(list(model.buffers()), list(other.buffers()), 1e-4)


def test_it_says_how_far_they_moved_and_leaves_the_rest():
    model = trained()
    state = copy.deepcopy(model.state_dict())
    _, report = recalibrate(model, IMAGES.split(4), only="norm1")
    assert [row.name for row in report.touched] == ["norm1"]
    assert "mean moved by" in report.touched[0].note
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed <= {"norm1.running_mean", "norm1.running_var", "norm1.num_batches_tracked"}
    assert model.training


def test_statistics_that_were_not_finite_are_mended():
    model = trained()
    model.norm1.running_var[0] = float("nan")
    _, report = recalibrate(model, IMAGES.split(4))
    assert "was not finite" in str(report)
    assert model.eval()(IMAGES).isfinite().all()


def test_norms_that_have_none_or_are_not_run_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.GroupNorm(2, 4))
    model.add_module("unused", nn.BatchNorm2d(4))
    model.forward = lambda x: model[1](model[0](x))
    notes = {row.name: row.note for row in recalibrate(model, IMAGES.split(4)).report}
    assert notes == {"1": "has no running statistics", "unused": "not run"}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "at least one batch"),
        ([torch.full((2, 3, 6, 6), float("inf"))], "norm1"),
    ],
)
def test_batches_that_cannot_be_used(batches, message):
    model = trained()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=message):
        recalibrate(model, batches)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_batches_that_can_be_gone_through_but_once_will_do():
    model, other = trained(), trained()
    recalibrate(model, IMAGES.split(5))
    recalibrate(other, iter(IMAGES.split(5)))
    assert_same_state(model, other)


def test_inputs_of_several_parts():
    model = trained()
    batches = [{"image": x} for x in IMAGES.split(5)]
    recalibrate(model, batches, forward=lambda model, batch: model(batch["image"]), progress=True)
    other = Block()
    other.load_state_dict(trained().state_dict())
    recalibrate(other, [(x, 0) for x in IMAGES.split(5)])
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_compiled_model_is_looked_at_without_compiling():
    torch.manual_seed(0)
    model, batches = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), [torch.randn(8, 3, 5, 5)]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    recalibrate(compiled, batches)
    torch.testing.assert_close(model[1].running_mean, model[0](batches[0]).mean((0, 2, 3)))
    assert counter.frame_count == 0
    assert compiled(batches[0]).shape == (8, 4, 5, 5)
    assert counter.frame_count == 1


@pytest.mark.parametrize("key", ["image", "x"])
def test_batches_of_dicts_with_a_usual_key_measure_what_is_under_it(key):
    model = nn.Sequential(nn.BatchNorm2d(3))
    x = torch.randn(6, 3, 4, 4) * 2 + 1
    recalibrate(model, [{key: x, "label": torch.zeros(6)}])
    assert torch.allclose(model[0].running_mean, x.mean((0, 2, 3)), atol=1e-5)


def test_batches_of_dicts_without_a_usual_key_are_told_how_to_go_on():
    with pytest.raises(InputError, match=r"got a dict with the keys 'volume'.*forward=lambda model, batch"):
        recalibrate(nn.Sequential(nn.BatchNorm2d(3)), [{"volume": torch.randn(6, 3, 4, 4)}])


class OwnBatchNorm(nn.BatchNorm2d):
    """Batch norm in a class of somebody's own."""

    def forward(self, input):
        return super().forward(input)


@pytest.mark.parametrize(("momentum", "batches"), [(None, 10**6), (0.0, 5), (1e-6, 5)])
def test_norms_whose_statistics_hardly_move_are_measured_too(momentum, batches):
    model = nn.Sequential(OwnBatchNorm(3, momentum=momentum))
    model[0].num_batches_tracked.fill_(batches)
    recalibrate(model, IMAGES.split(20))
    torch.testing.assert_close(model[0].running_mean, IMAGES.mean((0, 2, 3)))
    torch.testing.assert_close(model[0].running_var, IMAGES.var((0, 2, 3)))
    assert model[0].momentum == momentum


def test_a_mean_square_alone_is_said_to_be_statistics_of_another_kind():
    (row,) = recalibrate(nn.Sequential(EvoNorm2dB0(3)), [IMAGES]).report
    assert row.note == "keeps statistics of another kind than mean and variance of a channel"


def test_a_lazy_model_is_asked_for_its_parameters():
    with pytest.raises(InputError, match="run a batch through it first"):
        recalibrate(nn.Sequential(nn.LazyBatchNorm2d()), [IMAGES])

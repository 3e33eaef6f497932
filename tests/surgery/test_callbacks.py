"""Norms on a schedule: frozen at their place in the fit, measured before validation, saved with their card."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import normlab
from learners import classifier, samples, sees
from normlab.errors import InputError
from normlab.nn import FrozenBatchNorm1d, RunningBatchNorm1d
from normlab.study.weights import load_weights
from normlab.surgery import FreezeNorms, Recalibrate, SaveBest
from normlab.training import EMA, Callback, Checkpoint, Metrics, TransformInputs


def net(norm=nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), norm(4), nn.ReLU(), nn.Linear(4, 3))


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: part.detach().clone() for name, part in (*model.named_parameters(), *model.named_buffers())}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(part, other[name]) for name, part in one.items())


# --- FreezeNorms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm1d])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("at", "first"), [(0, 0), (0.5, 8), (0.75, 12), (0.7, 12), (1, 16)])
def test_norms_are_frozen_from_their_place_on(norm, affine, at, first):
    frozen = sees(lambda it: isinstance(it.model[1], FrozenBatchNorm1d), "after_pred", order=1)
    kept = sees(lambda it: tensors(it.model[1]), "after_step")
    model, freeze = net(norm), FreezeNorms(at, affine)
    learner = classifier(freeze, frozen, kept, model=model, n=16, valid=0)
    learner.fit(4)
    assert frozen.seen == [number >= first for number in range(16)]
    assert (freeze.report is None) == (first == 16)
    for number in range(max(first, 1), 15):
        before, after = kept.seen[number], kept.seen[number + 1]
        assert torch.equal(before["running_mean"], after["running_mean"])
        assert torch.equal(before["weight"], after["weight"]) == affine


def test_without_norms_it_says_so():
    freeze = FreezeNorms(0.5)
    with pytest.warns(UserWarning, match="the model has no norm with running statistics"):
        classifier(freeze).fit(2)


def test_a_second_fit_with_frozen_norms_goes_on():
    learner = classifier(FreezeNorms(0.5), model=net(), n=16)
    learner.fit(2)
    learner.fit(2)
    assert isinstance(learner.model[1], FrozenBatchNorm1d)


def test_the_norms_of_an_average_are_frozen_too():
    ema, seen = EMA(0.5), sees(lambda it: tensors(it.model), "after_step")
    model = net()
    classifier(ema, FreezeNorms(0.5), seen, model=model, n=16).fit(2)
    assert isinstance(ema.model[1], FrozenBatchNorm1d)
    expected = {name: part.double() for name, part in seen.seen[0].items()}
    for step in seen.seen[1:]:
        expected = {name: (expected[name] + part.double()) / 2 for name, part in step.items()}
    for name, part in tensors(ema.model).items():
        if part.is_floating_point():
            torch.testing.assert_close(part.double(), expected[name], rtol=1e-5, atol=1e-6)


class Ends(Callback):
    def __init__(self, step: int):
        self.at = step

    def after_step(self) -> None:
        if self.learner.step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, RunningBatchNorm1d])
@pytest.mark.parametrize("step", [5, 7, 8, 11])
def test_it_goes_on_from_a_checkpoint_bit_by_bit(tmp_path, norm, step):
    def callbacks():
        return [EMA(0.9), FreezeNorms(0.6), Metrics()]

    options = {"n": 24, "accumulate": 2, "precision": "float16"}
    whole = classifier(*callbacks(), model=net(norm), **options)
    history = whole.fit(4)
    checkpoint = Checkpoint(tmp_path / "a.ckpt", batches=5)
    assert whole.step == 12
    with pytest.raises(KeyboardInterrupt):
        classifier(*callbacks(), checkpoint, Ends(step), model=net(norm), **options).fit(4)
    again = classifier(*callbacks(), checkpoint, model=net(norm), **options)
    assert checkpoint.resume(again)
    found = again.fit(4)
    assert same(tensors(again.model), tensors(whole.model))
    assert same(tensors(again.callbacks[0].model), tensors(whole.callbacks[0].model))
    assert [row["valid"] for row in found] == [row["valid"] for row in history]


# --- Recalibrate ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ema", [[], [EMA(0.9)]])
def test_statistics_are_those_of_the_batches_before_each_validation(ema):
    x, y = samples(50, seed=5)
    seen = sees(
        lambda it: (it.model[0](it.callbacks[0].transform(x)).double(), tensors(it.model[1])), "begin_validate", 50
    )
    double, measured = TransformInputs(lambda x: 2 * x), Recalibrate([(x[:30], y[:30]), (x[30:], y[30:])])
    model = net()
    classifier(double, *ema, measured, seen, Metrics(), model=model, n=16).fit(2)
    for given, norm in seen.seen:
        torch.testing.assert_close(norm["running_mean"].double(), given.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(norm["running_var"].double(), given.var(0), rtol=1e-5, atol=1e-6)
    assert len(seen.seen) == 2
    assert "moved by" in str(measured.report)


def test_options_go_to_recalibrate():
    x, _ = samples(50, seed=5)
    model = net()
    measured = Recalibrate([x], only="1", forward=lambda model, batch: model(3 * batch))
    classifier(measured, model=model, n=16).fit(1)
    with torch.no_grad():
        given = model[0](3 * x)
    torch.testing.assert_close(model[1].running_mean, given.mean(0))


def test_without_validation_it_says_what_to_do():
    with pytest.raises(InputError, match=r"valid=None .* Call normlab.recalibrate\(model, batches\) after the fit"):
        classifier(Recalibrate([samples(4)]), valid=0).fit(1)


# --- SaveBest -------------------------------------------------------------------------------------------------------


class Figures(Callback):
    def __init__(self, figures: list[float]):
        self.figures = figures

    def after_epoch(self) -> None:
        row = {"epoch": self.learner.epoch + 1, "valid": {"score": self.figures[self.learner.epoch]}}
        self.learner.history.append(row)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    ("figures", "options", "kept", "best"),
    [
        ([3, 1, 2], {}, [2], 2),
        ([3, 1, 2], {"mode": "max"}, [1], 1),
        ([3, 1, 2, 5, 0], {"keep": 2}, [2, 5], 5),
        ([1, 1, 1], {}, [1], 1),
        ([float("nan"), 2, float("nan")], {"keep": 2}, [2], 2),
    ],
)
def test_the_best_and_the_last_are_kept(tmp_path, figures, options, kept, best):
    saver, states = SaveBest(tmp_path, "valid.score", **options), sees(lambda it: tensors(it.model), "after_epoch")
    model = net()
    classifier(Figures(figures), saver, states, model=model, n=16).fit(len(figures))
    assert names(tmp_path) == [*(f"epoch-{epoch:03d}.safetensors" for epoch in kept), "last.safetensors"]
    assert saver.path.name == f"epoch-{best:03d}.safetensors"
    for path, epoch in ((saver.path, best), (tmp_path / "last.safetensors", len(figures))):
        other = net()
        assert load_weights(other, path) == [], "the card fits"
        assert same(tensors(other), states.seen[epoch - 1])
    with safe_open(saver.path, "pt") as file:
        assert json.loads(file.metadata()["normlab.figures"]) == {"epoch": best, "valid.score": figures[best - 1]}
        assert list(json.loads(file.metadata()["normlab.card"])["norms"]) == ["1"]


def test_of_an_average_that_is_saved_which_was_validated(tmp_path):
    ema, saver, model = EMA(0.9), SaveBest(tmp_path), net()
    classifier(Metrics(), ema, saver, model=model, n=16).fit(1)
    other = net()
    assert load_weights(other, tmp_path / "last.safetensors") == []
    assert same(tensors(other), tensors(ema.model))
    assert not same(tensors(other), tensors(model))


def test_after_a_crash_the_files_are_those_of_an_undisturbed_fit(tmp_path):
    figures = [3.0, 2.0, 4.0, 1.0, 5.0]
    classifier(Figures(figures), SaveBest(tmp_path / "whole", "valid.score", keep=2), model=net(), n=16).fit(5)
    for step in (4, 9, 18):
        folder, checkpoint = tmp_path / str(step), Checkpoint(tmp_path / f"{step}.ckpt", batches=3)
        saver = SaveBest(folder, "valid.score", keep=2)
        killed = classifier(Figures(figures), saver, checkpoint, Ends(step), model=net(), n=16)
        with pytest.raises(KeyboardInterrupt):
            killed.fit(5)
        saver = SaveBest(folder, "valid.score", keep=2)
        again = classifier(Figures(figures), saver, checkpoint, model=net(), n=16)
        assert checkpoint.resume(again)
        again.fit(5)
        assert names(folder) == names(tmp_path / "whole")
        for path in folder.iterdir():
            assert same(load_file(path), load_file(tmp_path / "whole" / path.name))


def test_tied_weights_are_saved(tmp_path):
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    saver = SaveBest(tmp_path)
    classifier(Metrics(), saver, model=model, n=16).fit(1)
    other = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5), nn.BatchNorm1d(5))
    assert load_weights(other, saver.path) == []
    assert torch.equal(other[1].weight, model[1].weight)


def test_what_cannot_be_written_is_said_and_the_fit_goes_on(tmp_path):
    (tmp_path / "file").write_text("")
    learner = classifier(Metrics(), SaveBest(tmp_path / "file"), model=net(), n=16)
    with pytest.warns(UserWarning, match="cannot be written"):
        history = learner.fit(2)
    assert len(history) == 2


def test_before_a_fit_there_is_no_best(tmp_path):
    with pytest.raises(InputError, match=r"SaveBest: no epoch with a finite valid.loss yet"):
        _ = SaveBest(tmp_path).path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FreezeNorms(at=75), "at=75 is not usable. Accepted: a number from 0 to 1, a share of the fit"),
        (lambda: FreezeNorms(at="0.5"), "at='0.5' is not usable"),
        (lambda: Recalibrate(iter([])), "batches='list_iterator' is not usable. Accepted: batches that can be gone"),
        (lambda: Recalibrate(torch.ones(3)), "batches='Tensor' is not usable"),
        (lambda: SaveBest(3), "folder=3 is not usable. Accepted: a path"),
        (lambda: SaveBest("a", mode="up"), "mode='up' is not usable. Accepted: 'min' where less is better"),
        (lambda: SaveBest("a", keep=0), "keep=0 is not usable. Accepted: a whole number from 1"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_an_unknown_choice_is_named_with_its_callback():
    learner = classifier(FreezeNorms(0, only="9"), model=net(), n=16)
    with pytest.raises(InputError, match="only='9' is unknown") as error:
        learner.fit(1)
    assert "FreezeNorms.begin_batch" in error.value.__notes__[0]
    assert not normlab.is_norm(learner.model[0])

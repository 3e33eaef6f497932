"""Short fits: what they find, and that they leave everything as it was."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from learners import classifier, of_known_losses, samples, sees
from normlab.data import TensorBatches
from normlab.errors import InputError
from normlab.nn import RunningBatchNorm1d
from normlab.training import Callback, FindLearningRate, Learner, Recorder, TransformInputs, overfit_one_batch


def test_the_sweep_is_geometric_and_stops_at_max_steps():
    recorder = Recorder()
    learner = classifier(recorder, FindLearningRate(8, 1e-3, 1e1), n=12)
    learner.fit(100)
    assert learner.step == 8
    assert recorder.lrs[0] == pytest.approx([1e-3 * 10 ** (4 * i / 8) for i in range(8)])
    assert learner.epoch == 2


def test_the_sweep_pauses_in_validation():
    rates = sees(lambda it: (it.training, it.optimizer.param_groups[0]["lr"]))
    classifier(rates, FindLearningRate(20)).fit(1)
    trained = [rate for training, rate in rates.seen if training]
    assert [rate for training, rate in rates.seen if not training] == trained[-1:] * 2


@pytest.mark.parametrize("bad", [20.1, math.nan, math.inf])
def test_the_sweep_stops_when_the_loss_passes_ten_times_its_best(bad):
    losses = [4.0, 2.0, 20.0, 3.0, bad, 1.0, 1.0]
    recorder = Recorder()
    of_known_losses(losses, recorder, FindLearningRate(), batches=7).fit(1)
    assert recorder.losses == pytest.approx(losses[:5], nan_ok=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_sweep_stops_when_the_first_loss_is_not_finite(bad):
    recorder = Recorder()
    of_known_losses([bad, 1.0], recorder, FindLearningRate(), batches=2).fit(1)
    assert len(recorder.losses) == 1


def test_the_best_loss_is_forgotten_between_fits():
    finder = FindLearningRate(2)
    learner = of_known_losses([0.1, 0.1, 5.0, 5.0], finder, batches=4)
    learner.fit(1)
    learner.fit(1)
    assert learner.step == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "max_steps=0 is not usable"),
        ({"min_lr": 0.0}, "min_lr=0.0 is not usable"),
        ({"min_lr": 2.0, "max_lr": 1.0}, "min_lr=2.0 is not usable. Accepted: a number above 0 and below max_lr=1.0"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        FindLearningRate(**options)


def searched(optimizer: torch.optim.Optimizer, model: nn.Module, *callbacks: Callback, **options) -> Learner:
    return classifier(FindLearningRate(8, 1e-3, 1e1), *callbacks, n=40, optimizer=optimizer, model=model, **options)


def contents(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """Copies of all tensors there are; buffers that no state dict has, too."""
    state = [value for one in optimizer.state.values() for value in one.values() if torch.is_tensor(value)]
    return [part.detach().clone() for part in (*model.parameters(), *model.buffers(), *state)]


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_after_the_search_everything_is_as_before(kind, begun):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), RunningBatchNorm1d(4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    groups = [{"params": model[0].parameters(), "lr": 0.03}, {"params": model[1:].parameters(), "lr": 0.07}]
    optimizer = kind(groups, weight_decay=0.01)
    if begun:
        classifier(model=model, optimizer=optimizer).fit(1)
    before, settings = contents(model, optimizer), [dict(group) for group in optimizer.param_groups]
    groups = list(optimizer.param_groups)
    moved = sees(lambda it: float((it.model[0].weight.detach() - before[0]).abs().max()), "after_step")
    searched(optimizer, model, moved).fit(1)
    assert max(moved.seen) > 0.01, "the search trained"
    after = contents(model, optimizer)
    assert len(after) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(group is same for group, same in zip(optimizer.param_groups, groups, strict=True))
    for group, was in zip(optimizer.param_groups, settings, strict=True):
        assert {n: v for n, v in group.items() if n != "params"} == {n: v for n, v in was.items() if n != "params"}
    twin, moments = contents(model, optimizer), classifier(model=model, optimizer=optimizer)
    moments.fit(1)
    assert not torch.equal(model[0].weight, twin[0]), "training goes on from there"


def test_after_a_search_that_fails_everything_is_as_before():
    model = nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
    before = model.weight.detach().clone()

    class Fails(Callback):
        def after_step(self) -> None:
            if self.learner.step == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(optimizer, model, Fails()).fit(1)
    assert torch.equal(model.weight, before)
    assert optimizer.param_groups[0]["lr"] == 0.03
    assert not optimizer.state


def test_a_search_of_a_model_whose_parameters_are_not_made_is_refused():
    model = nn.LazyLinear(3)
    with pytest.raises(InputError, match=r"weight, bias.*run a batch"):
        searched(torch.optim.SGD(model.parameters(), lr=0.1), model).fit(1)


def test_after_the_search_random_numbers_data_and_modes_are_as_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 3))
    model[2].eval()
    learner = classifier(FindLearningRate(7), model=model, n=40, precision="float16")
    learner.train = TensorBatches(*samples(40), 4, shuffle=True)
    scaler = learner.precision.state_dict()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), learner.train.state_dict()
    learner.fit(2)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1], learner.train.state_dict()
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]
    assert (before[2] == after[2]).all()
    assert torch.equal(before[3].pop("generator"), after[3].pop("generator"))
    assert before[3] == after[3]
    assert [module.training for module in model] == [True, True, False, True]
    assert learner.precision.state_dict() == scaler


def found(losses: list[float], lrs: list[float] | None = None) -> FindLearningRate:
    finder = FindLearningRate()
    finder.losses, finder.lrs = losses, lrs or [10.0 ** (i / 10 - 4) for i in range(len(losses))]
    return finder


def test_the_suggestion_is_where_the_loss_falls_fastest():
    losses = [2 - 1.5 / (1 + math.exp(-(i - 30) / 3)) + (0.1 * math.exp((i - 55) / 3)) for i in range(70)]
    finder = found([*losses, math.nan])
    assert finder.suggestion == pytest.approx(10.0 ** (30 / 10 - 4), rel=0.5)
    lines = finder.plot().axes[0].lines
    assert [line.get_label() for line in lines] == ["loss", "smoothed", f"suggestion {finder.suggestion:.2g}"]


@pytest.mark.parametrize("losses", [[], [1.0, 2.0, 3.0], [math.nan], [1.0] * 30])
def test_without_a_fall_there_is_no_suggestion(losses):
    finder = found(losses)
    with pytest.raises(InputError, match=r"the loss did not fall in \d+ steps from 1e-06 to 10"):
        _ = finder.suggestion
    assert finder.plot().axes[0].get_title() == "the loss did not fall"


def test_the_search_on_a_real_net_suggests_a_rate_that_trains():
    finder = FindLearningRate(60, 1e-5, 100.0)
    learner = classifier(finder, n=200)
    learner.fit(10)
    assert len(finder.lrs) == len(finder.losses) == learner.step
    assert 1e-4 < finder.suggestion < 10


# --- overfit_one_batch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"precision": "bfloat16"}, {"precision": "float16"}])
def test_one_batch_is_learnt_and_nothing_is_left_of_it(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.1), RunningBatchNorm1d(8), nn.Linear(8, 3))
    recorder, optimizer = Recorder(), torch.optim.AdamW(model.parameters(), 1e-2)
    learner = classifier(recorder, model=model, optimizer=optimizer, **options)
    learner.fit(1)
    before, attributes, random_before = contents(model, optimizer), dict(vars(learner)), torch.get_rng_state()
    seen = list(recorder.losses)
    result = overfit_one_batch(learner, 60)
    assert result.falls
    assert len(result.losses) == 60 * options.get("accumulate", 1)
    assert result.losses[-1] < result.losses[0]
    assert str(result).startswith("The loss of one batch falls: ")
    assert all(torch.equal(a, b) for a, b in zip(contents(model, optimizer), before, strict=True))
    assert torch.equal(torch.get_rng_state(), random_before)
    assert {**vars(learner), "precision": None} == {**attributes, "precision": None}
    assert recorder.losses == seen


def test_a_loss_that_cannot_fall_is_reported():
    result = overfit_one_batch(classifier(lr=0.0), 10)
    assert not result.falls
    assert "does not fall" in str(result)
    assert "learning rate" in str(result)


def test_one_batch_is_made_what_training_makes_of_it():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 3))
    assert overfit_one_batch(classifier(TransformInputs(lambda x: x.view(-1, 1, 5)), model=model), 50).falls


def test_after_a_check_that_fails_all_is_as_before():
    learner = classifier()
    before, train, callbacks = learner.model.weight.detach().clone(), learner.train, learner.callbacks
    losses = iter([1.0, 1.0])
    learner.loss_func = lambda output, targets: output.sum() * next(losses)
    with pytest.raises(StopIteration):
        overfit_one_batch(learner)
    assert torch.equal(learner.model.weight, before)
    assert learner.train is train
    assert learner.callbacks is callbacks


def test_one_step_cannot_show_a_fall():
    with pytest.raises(InputError, match=r"steps=1 is not usable. Accepted: a whole number from 2"):
        overfit_one_batch(classifier(), 1)

"""Short fits: what they find, and that they leave everything as it was."""

import math

import pytest
import torch
from torch import nn

from learners import classifier, of_known_losses, sees
from normlab.errors import InputError
from normlab.nn import RunningBatchNorm1d
from normlab.training import Callback, FindLearningRate, Learner, Recorder


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

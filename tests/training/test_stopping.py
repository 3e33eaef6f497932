"""Guards that stop at the step they should."""

import math

import pytest
import torch
from torch import nn

from learners import classifier, of_known_losses, samples, sees
from normlab.data import TensorBatches
from normlab.errors import InputError
from normlab.training import (
    Callback,
    Checkpoint,
    EarlyStopping,
    Learner,
    Metrics,
    Recorder,
    StopAtNonFinite,
    StopWhenDiverged,
)
from normlab.training.stopping import LOOK_EVERY


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("valid", [True, False])
@pytest.mark.parametrize(
    ("step", "batches", "done"),
    [
        (1, 40, LOOK_EVERY),
        (5, 40, LOOK_EVERY),
        (LOOK_EVERY, 40, LOOK_EVERY),
        (LOOK_EVERY + 1, 40, 40),
        (40, 40, 40),
        (43, 40, 72),
        (80, 40, 80),
        (3, 3, 3),
        (5, 3, 6),
    ],
)
def test_it_says_the_step_at_which_the_loss_was_first_not_finite(step, batches, done, valid, bad):
    losses = [1.0] * (step - 1) + [bad] + [1.0, math.nan] * 100
    guard, recorder = StopWhenDiverged(), Recorder()
    learner = of_known_losses(losses, recorder, guard, batches=batches, valid=valid)
    learner.fit(3)
    assert guard.step == step
    assert len(recorder.losses) == done
    assert learner.epoch == (step - 1) // batches


def test_validation_of_a_diverged_epoch_is_left_out():
    seen = sees(lambda it: it.training)
    of_known_losses([1.0, math.nan], seen, StopWhenDiverged(), batches=2).fit(2)
    assert seen.seen == [True, True]


def test_a_fit_that_does_not_diverge_is_left_alone():
    guard = StopWhenDiverged()
    learner = of_known_losses([1.0] * 100, guard, batches=50)  # its validation losses are nan
    learner.fit(2)
    assert guard.step is None
    assert learner.epoch == 1


def test_the_guard_begins_again_with_each_fit():
    guard = StopWhenDiverged()
    learner = of_known_losses([1.0, math.nan, 1.0, 1.0, 1.0, math.nan], guard, batches=4, valid=False)
    values = [1.0, math.nan, 1.0, 1.0], [1.0] * 4, [1.0, 1.0, math.nan, 1.0]
    for losses, step in zip(values, (2, None, 3), strict=True):
        learner.loss_func = iterated(losses)
        learner.fit(1)
        assert guard.step == step


def iterated(values: list[float]):
    left = iter(values)
    return lambda output, targets: output.sum() * 0 + next(left)


def test_a_real_run_that_diverges_is_stopped_and_its_losses_agree():
    guard, recorder = StopWhenDiverged(), Recorder()
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    model = nn.Linear(5, 1)
    learner = Learner(
        model,
        TensorBatches(x, x.sum(1, keepdim=True), 1),
        loss_func=nn.functional.mse_loss,
        optimizer=torch.optim.SGD(model.parameters(), lr=1e3),
        callbacks=[guard, recorder],
    )
    learner.fit(5)
    finite = [math.isfinite(loss) for loss in recorder.losses]
    assert guard.step == finite.index(False) + 1 > 1


# --- EarlyStopping --------------------------------------------------------------------------------------------------


class Figures(Callback):
    """Puts these figures into the history."""

    def __init__(self, figures: list[float]):
        self.figures = figures

    def after_epoch(self) -> None:
        row = {"epoch": self.learner.epoch + 1, "valid": {"score": self.figures[self.learner.epoch]}}
        self.learner.history.append(row)


@pytest.mark.parametrize(
    ("figures", "options", "epochs", "best"),
    [
        ([3, 2, 1, 0], {"patience": 1}, 4, 4),
        ([3, 2, 2, 2, 2], {"patience": 2}, 4, 2),
        ([3, 4, 2, 5, 5, 5, 5], {"patience": 2}, 5, 3),
        ([1, 2, 3, 2, 2], {"patience": 1, "mode": "max"}, 4, 3),
        ([3, 2.9, 2.8, 2.7, 0], {"patience": 2, "min_delta": 0.5}, 3, 1),
        ([3, 2.9, 2.8, 2.7, 0], {"patience": 4, "min_delta": 0.5}, 5, 5),
        ([math.nan, 2, math.nan, math.nan, 1], {"patience": 2}, 4, 2),
        ([math.nan] * 5, {"patience": 3}, 3, 0),
    ],
)
def test_it_waits_for_a_better_figure(figures, options, epochs, best):
    early = EarlyStopping("valid.score", **options)
    history = classifier(Figures(figures), early).fit(len(figures))
    assert len(history) == epochs
    assert early.best_epoch == best


def test_metrics_are_what_it_looks_at():
    early = EarlyStopping(patience=2)
    learner = classifier(early, Metrics(), lr=0.0)  # nothing gets better
    assert len(learner.fit(9)) == 3
    assert early.best_epoch == 1


def test_it_decides_the_same_after_a_crash(tmp_path):
    figures = [3.0, 2.0, 2.0, 2.0, 2.0]
    for epochs in range(1, 5):
        checkpoint = Checkpoint(tmp_path / f"{epochs}.ckpt")
        classifier(Figures(figures), EarlyStopping("valid.score", patience=2), checkpoint).fit(epochs)
        again = classifier(Figures(figures), EarlyStopping("valid.score", patience=2), checkpoint)
        assert checkpoint.resume(again)
        assert len(again.fit(5)) == 4


def test_a_figure_that_is_not_there_is_named():
    with pytest.raises(InputError, match=r"EarlyStopping: metric='valid.los' .* Did you mean 'valid.loss'\?"):
        classifier(EarlyStopping("valid.los"), Metrics()).fit(2)
    with pytest.raises(InputError, match=r"EarlyStopping: the history is empty. Put Metrics\(\)"):
        classifier(EarlyStopping()).fit(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": 3}, "metric=3 is not usable. Accepted: a name such as 'valid.loss'"),
        ({"mode": "lower"}, "mode='lower' is not usable. Accepted: 'min' where less is better"),
        ({"patience": 0}, "patience=0 is not usable. Accepted: a whole number from 1"),
        ({"min_delta": -1}, "min_delta=-1 is not usable. Accepted: a number from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        EarlyStopping(**options)


# --- StopAtNonFinite ------------------------------------------------------------------------------------------------


class Bad(nn.Module):
    """Divides by zero from the third batch on."""

    batches = 0

    def forward(self, x):
        self.batches += self.training
        return x / 0 if self.batches > 2 else x


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Sequential(nn.BatchNorm1d(4), Bad()), nn.ReLU(), nn.Linear(4, 3))


def step_func(batch, model):
    output = model(batch[0])
    return nn.functional.cross_entropy(output, batch[1]), output


@pytest.mark.parametrize("options", [{}, {"step_func": step_func}, {"precision": "bfloat16"}, {"accumulate": 2}])
def test_the_first_module_whose_output_is_not_finite_is_named(options):
    model, guard = net(), StopAtNonFinite()
    events = sees(lambda it: [part.detach().clone() for part in it.model.parameters()], "begin_batch")
    learner = classifier(guard, events, model=model, n=40, **options)
    with pytest.warns(UserWarning, match=r"not finite at step \d. 1.1 \(Bad\) is the first module with such an output"):
        learner.fit(1)
    assert guard.step == (2 if "accumulate" in options else 3)
    assert "of inputs up to" in guard.where
    assert len(events.seen) == 3, "the fit ended"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), events.seen[2], strict=True)), "before its step"
    assert not any(module._forward_hooks for module in model.modules())
    assert int(model[1][0].num_batches_tracked) == 3, "the second pass does not count"


def test_other_reasons_are_named():
    x, y = samples(4)
    for change, message in [
        (lambda model: model[0].bias.data.fill_(math.nan), r"parameter 0.bias is not finite: an earlier step"),
        (lambda model: x.fill_(math.inf), r"inputs of the batch are not finite. Look at the data"),
    ]:
        learner = classifier(StopAtNonFinite(), model=nn.Sequential(nn.Linear(5, 3)))
        learner.train = [(x, y)]
        change(learner.model)
        with pytest.warns(UserWarning, match=message):
            learner.fit(1)
    with pytest.warns(UserWarning, match="The outputs of all modules are finite: it is the loss function"):
        of_known_losses([1.0, math.nan], StopAtNonFinite(), batches=2).fit(1)


def test_a_step_func_that_makes_steps_is_not_run_again():
    model, steps = nn.Linear(5, 3), []

    def own_steps(batch, model):
        steps.append(1)
        return model(batch[0]).sum() * math.nan, None

    guard = StopAtNonFinite()
    with pytest.warns(UserWarning, match="With a step_func that makes steps no module is looked at"):
        classifier(guard, model=model, step_func=own_steps, optimizer=None).fit(1)
    assert steps == [1]


def test_while_all_is_well_nothing_is_done():
    guard = StopAtNonFinite()
    learner = of_known_losses([1.0] * 6, guard, batches=6)  # its validation losses are nan
    learner.fit(1)
    assert (guard.step, guard.where, learner.step) == (None, None, 6)

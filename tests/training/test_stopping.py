"""Guards that stop at the step they should."""

import math

import pytest
import torch
from torch import nn

from learners import of_known_losses, sees
from normlab.data import TensorBatches
from normlab.training import Learner, Recorder, StopWhenDiverged
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

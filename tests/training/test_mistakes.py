"""Mistakes in what a learner, a callback, a schedule is given are refused there, with the cure."""

import traceback
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import normlab
from normlab.errors import InputError
from normlab.training import (
    EVENTS,
    Callback,
    ClipGradients,
    FindLearningRate,
    Learner,
    Metrics,
    Recorder,
    ScheduleParameter,
    ShowProgress,
    ToDevice,
    TransformInputs,
    accuracy,
)
from normlab.training.schedules import combine, constant, cosine, exponential, linear, one_cycle

BATCHES = [(torch.ones(2, 3), torch.ones(2, 1))]


def learner(*callbacks, **options) -> Learner:
    """Of a linear regression, with mistakes among `options`."""
    model = nn.Linear(3, 1)
    usual = {
        "model": model,
        "train": BATCHES,
        "loss_func": nn.functional.mse_loss,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "callbacks": callbacks,
    }
    return Learner(**{**usual, **options})


def with_method(name: str, method=lambda self: None) -> Callback:
    return type("Mine", (Callback,), {name: method})()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("after_bach", "after_batch"),
        ("begin_epochs", "begin_epoch"),
        ("before_batch", "begin_batch"),
        ("before_fit", "begin_fit"),
        ("afterbatch", "after_batch"),
        ("after_canceled_batch", "after_cancel_batch"),
        ("begin_validation", "begin_validate"),
    ],
)
def test_a_misspelt_event_names_the_nearest(name, meant):
    with pytest.raises(InputError, match=rf"callbacks\[1\]: Mine\.{name} is no event\. Did you mean '{meant}'\?"):
        learner(Recorder(), with_method(name))


def test_a_callback_added_later_is_looked_at_when_the_fit_begins():
    fitting = learner()
    fitting.callbacks.append(with_method("after_bach"))
    with pytest.raises(InputError, match="after_bach is no event"):
        fitting.fit(1)


@pytest.mark.parametrize("name", [*EVENTS, "close", "start", "fit", "step", "report", "_after_bach", "_begin_part"])
def test_events_and_helpers_are_taken(name):
    learner(with_method(name)).fit(1)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([Recorder], r"callbacks\[0\]: expected an instance, got the class Recorder. Write Recorder\(\)"),
        (Recorder, r"callbacks: expected an instance, got the class Recorder"),
        (Recorder(), r"callbacks: expected a list of callbacks, got one Recorder. Write callbacks=\[…\]"),
        ([print], r"callbacks\[0\]: expected a normlab.training.Callback, got builtin_function_or_method"),
        ([None], r"callbacks\[0\]: expected a normlab.training.Callback, got NoneType"),
        ([with_method("after_batch", None)], r"Mine.after_batch is no method, but None"),
        ([with_method("after_batch", lambda self, learner: None)], r"Mine.after_batch needs learner, .* self.learner"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks, message):
    with pytest.raises(InputError, match=message):
        learner(callbacks=callbacks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": nn.Flatten}, r"model: expected an instance, got the class Flatten. Write Flatten\(\)"),
        ({"train": None}, "train='NoneType' is not usable. Accepted: batches"),
        ({"train": 3}, "train='int' is not usable"),
        ({"train": torch.ones(4, 3)}, "train='Tensor' is not usable"),
        ({"valid": "mnist"}, "valid='mnist' is not usable"),
        ({"loss_func": nn.MSELoss}, r"loss_func: expected an instance, got the class MSELoss. Write MSELoss\(\)"),
        ({"loss_func": "mse"}, "loss_func='mse' is not usable. Accepted: a function of output and targets"),
        ({"optimizer": torch.optim.SGD}, r"optimizer: .* the class SGD. Write SGD\(model.parameters\(\), …\)"),
        ({"optimizer": partial(torch.optim.SGD, lr=0.1)}, "optimizer='partial' is not usable"),
        ({"optimizer": "adam"}, "optimizer='adam' is not usable. Accepted: a torch.optim.Optimizer"),
    ],
)
def test_a_learner_names_the_argument(options, message):
    with pytest.raises(InputError, match=message):
        learner(**options)


def test_an_optimizer_of_another_model_is_refused():
    other = torch.optim.SGD(nn.Linear(3, 1).parameters(), lr=0.1)
    with pytest.raises(
        InputError, match=r"optimizer: expected the parameters of the model.* after the model was changed"
    ):
        learner(optimizer=other).fit(1)


@pytest.mark.parametrize("epochs", [1.5, "2", True, None])
def test_epochs_are_whole_numbers(epochs):
    with pytest.raises(InputError, match=r"epochs=.* is not usable. Accepted: a whole number from 1"):
        learner().fit(epochs)


def test_batches_that_can_be_passed_once_are_refused_in_the_second_epoch():
    learner(train=iter(BATCHES)).fit(1)
    with pytest.raises(InputError, match=r"train: expected one batch or more, got none in epoch 2. An iterator gives"):
        learner(train=iter(BATCHES)).fit(2)
    with pytest.raises(InputError, match=r"valid: .*, got none in epoch 2"):
        learner(valid=iter(BATCHES)).fit(2)


def test_a_training_of_nothing_is_refused():
    with pytest.raises(InputError, match="train: expected one batch or more, got none in epoch 1"):
        learner(train=[]).fit(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(ScheduleParameter, "lr", 0.1),
            r"'lr'\): schedule=0.1 is not usable.* Write schedules.constant\(0.1\)",
        ),
        (partial(ScheduleParameter, "lr", [constant(1.0), 0.1]), r"schedule=0.1 is not usable"),
        (partial(ScheduleParameter, "lr", "one-cycle"), r"schedule='one-cycle' is not usable"),
        (
            partial(ScheduleParameter, "lr", linear),
            r"of the position 0..1 alone, got linear .*schedules.linear\(0.1, 0.0",
        ),
        (partial(ScheduleParameter, constant(1.0), "lr"), r"ScheduleParameter: name=.* Accepted: a name"),
        (partial(combine, [1.0], [0.1]), r"schedules\[0\]=0.1 is not usable"),
        (partial(combine, 1.0, [constant(1.0)]), r"shares=1.0 is not usable. Accepted: a list"),
        (partial(combine, [1.0], constant(1.0)), r"schedules=.* Accepted: a list"),
        (partial(combine, ["1"], [constant(1.0)]), r"shares=\['1'\] is not usable. Accepted: numbers"),
        (partial(one_cycle, 0.1, 1.0, 0.0, warm_up=25), "warm_up=25 is not usable. Accepted: a number from 0 to 1"),
        (partial(linear, "0.1", 0.0), "start='0.1' is not usable. Accepted: a number"),
        (partial(cosine, 0.1, None), "end=None is not usable. Accepted: a number"),
        (partial(exponential, "1", 2.0), "start='1' is not usable. Accepted: a number"),
        (partial(constant, [0.1]), r"start=\[0.1\] is not usable. Accepted: a number"),
        (partial(Metrics, accuracy=0.9), r"Metrics\(accuracy=…\): metric=0.9 is not usable"),
        (partial(Metrics, loss=accuracy), "Metrics: name='loss' is not usable. Accepted: any other"),
        (partial(ClipGradients, "1"), "max_norm='1' is not usable. Accepted: a number above 0"),
        (partial(ClipGradients, float("nan")), "max_norm=nan is not usable"),
        (partial(FindLearningRate, 10.5), "max_steps=10.5 is not usable. Accepted: a whole number from 1"),
        (partial(FindLearningRate, min_lr="1e-6"), "min_lr='1e-6' is not usable"),
        (partial(FindLearningRate, max_lr=None), "max_lr=None is not usable"),
        (partial(ToDevice, "gpu"), "device='gpu' is not usable.* Write 'cuda'"),
        (partial(ToDevice, "cudaa"), "device='cudaa' is not usable. Accepted: 'cpu', 'cuda'"),
        (partial(ToDevice, None), "device=None is not usable"),
        (partial(TransformInputs, None), "TransformInputs: transform=None is not usable. Accepted: a function"),
        (partial(TransformInputs, nn.Flatten), r"TransformInputs: transform: .* the class Flatten. Write Flatten\(\)"),
        (partial(ShowProgress, "stdout"), "ShowProgress: console='stdout' is not usable"),
    ],
)
def test_a_callback_or_schedule_names_the_argument_and_the_cure(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_schedule_that_gives_a_schedule_is_refused():
    with pytest.raises(InputError, match=r"'lr'\): schedule's result=.* Accepted: a value"):
        learner(ScheduleParameter("lr", constant)).fit(1)


def test_any_function_of_a_position_is_a_schedule():
    recorder = Recorder()
    learner(ScheduleParameter("lr", lambda position, scale=0.5: scale), recorder).fit(1)
    assert recorder.lrs == [[0.5]]


class _Fails(nn.Module):
    """In the forward pass, the backward pass or evaluation."""

    def __init__(self, where: str):
        super().__init__()
        self.where, self.linear = where, nn.Linear(3, 1)

    def forward(self, x):
        if self.where == "forward" or (self.where == "evaluation" and not self.training):
            raise ZeroDivisionError
        output = self.linear(x)
        if self.where == "backward":
            output.register_hook(_fail)
        return output


def _fail(*arguments):
    raise ZeroDivisionError


def after(times: int):
    """A loss that fails when it was computed so often."""
    left = iter(range(times))
    return lambda output, targets: _fail() if next(left, None) is None else nn.functional.mse_loss(output, targets)


@pytest.mark.parametrize(
    "options",
    [
        *({"model": _Fails(where), "valid": BATCHES} for where in ("forward", "backward", "evaluation")),
        {"loss_func": _fail},
        {"step_func": _fail},
        {"loss_func": after(2), "optimizer": torch.optim.LBFGS},
        *({"callbacks": [with_method(event, _fail)], "valid": BATCHES} for event in EVENTS if "cancel" not in event),
        {"callbacks": [Metrics(own=_fail)]},
        {"callbacks": [Metrics(own=after(1))], "valid": BATCHES},
    ],
)
def test_a_traceback_through_user_code_has_few_frames_of_ours(options):
    model = options.get("model", nn.Linear(3, 1))
    optimizer = options.pop("optimizer", torch.optim.SGD)(model.parameters(), lr=0.1)
    failing = learner(**{"model": model, "optimizer": optimizer, **options})
    with pytest.raises(ZeroDivisionError) as caught:
        failing.fit(1)
    frames = traceback.extract_tb(caught.value.__traceback__)
    ours = [frame.name for frame in frames if frame.filename.startswith(str(Path(normlab.__file__).parent))]
    assert ours[0] == "fit"
    assert 2 <= len(ours) <= 5
    assert frames[-1].filename == __file__

"""The loop: which events come when, what leaves which level of it, and what is left behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import normlab
from normlab.data import TensorBatches, TensorPairs, load_dataset
from normlab.errors import InputError
from normlab.models import build_model
from normlab.training import (
    EVENTS,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelTrain,
    Learner,
    Metrics,
    ScheduleParameter,
    accuracy,
)
from normlab.training.schedules import linear

TRAIN_BATCH = ["begin_batch", "after_pred", "after_loss", "after_backward", "begin_step", "after_step", "after_batch"]
VALID_BATCH = ["begin_batch", "after_pred", "after_loss", "after_batch"]
BATCHES = 2  # of training; half as many of validation


class Trace(Callback):
    """Writes down every event, and raises `error` at one of them, in one part, the first time."""

    def __init__(self, error: type[BaseException] | None = None, at: str = "", part: str = "train"):
        self.error, self.at, self.part, self.events = error, at, part, []

    def hear(self, event: str) -> None:
        self.events.append(event)
        part = "train" if self.learner.training else "valid"
        if self.error and event == self.at and part == self.part:
            error, self.error = self.error, None
            raise error


for name in EVENTS:
    setattr(Trace, name, lambda self, event=name: self.hear(event))


def on(event: str, f) -> Callback:
    """A callback that calls `f(learner)` at one event."""
    return type("On", (Callback,), {event: lambda self: f(self.learner)})()


def numbers(samples: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(samples, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5]], dtype=torch.float64)


def linear_model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Linear(3, 1, dtype=torch.float64)


def small(*callbacks: Callback, batches: int = BATCHES, valid: bool = True, model=None, train=None, optimizer=None):
    """A learner of a linear regression; plain SGD, batches of 4."""
    model = model or linear_model()
    return Learner(
        model,
        TensorBatches(*numbers(4 * batches), 4) if train is None else train,
        [numbers(4, seed=1)] * (batches // 2) if valid else None,
        loss_func=nn.functional.mse_loss,
        optimizer=optimizer or torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=callbacks,
    )


def weights(learner: Learner) -> torch.Tensor:
    return nn.utils.parameters_to_vector(learner.model.parameters()).detach().clone()


# --- events ---------------------------------------------------------------------------------------------------------


def test_events_in_order():
    trace = Trace()
    small(trace).fit(2)
    epoch = ["begin_epoch", *TRAIN_BATCH * 2, "begin_validate", *VALID_BATCH, "after_epoch"]
    assert trace.events == ["begin_fit", *epoch * 2, "after_fit"]


def test_events_without_validation():
    trace = Trace()
    learner = small(trace, valid=False)
    learner.fit(1)
    assert trace.events == ["begin_fit", "begin_epoch", *TRAIN_BATCH * 2, "after_epoch", "after_fit"]
    assert learner.model.training


def test_the_events_named_are_the_events_fired():
    names = set()
    for error, at in ((CancelBatch, "after_pred"), (CancelEpoch, "after_pred"), (CancelTrain, "after_pred")):
        trace = Trace(error, at)
        small(trace).fit(1)
        names |= set(trace.events)
    assert names == set(EVENTS)


def test_mode_and_gradients_of_each_part():
    seen = []
    small(
        on("after_pred", lambda it: seen.append((it.training, it.model.training, it.output.requires_grad))),
        on("begin_validate", lambda it: seen.append((it.training, it.model.training, torch.is_grad_enabled()))),
        model=linear_model().eval(),
    ).fit(2)
    assert seen == ([(True, True, True)] * 2 + [(False, False, False)] * 2) * 2


def test_callbacks_by_order_equal_ones_as_given():
    calls = []

    class Named(Callback):
        def __init__(self, name: str, order: int):
            self.name, self.order = name, order

        def begin_epoch(self) -> None:
            calls.append(self.name)

    small(Named("c", 1), Named("a", 0), Named("z", -1), Named("d", 1), Named("b", 0), Named("e", 2)).fit(1)
    assert calls == ["z", "a", "b", "c", "d", "e"]


# --- cancelling -----------------------------------------------------------------------------------------------------


def begun_batch(at: str, kind: list[str]) -> list[str]:
    """The events of a batch in which a whole part or fit was left at one of them; none, if it was left before."""
    if at not in kind:
        return []
    return kind if at == "after_batch" else [*kind[: kind.index(at) + 1], "after_batch"]


def cancelled_batch(at: str, kind: list[str]) -> list[str]:
    """The events of a batch that was left at one of them."""
    return [*kind[: kind.index(at) + 1], "after_cancel_batch", "after_batch"]


@pytest.mark.parametrize("at", TRAIN_BATCH[:-1])
def test_cancel_a_training_batch(at):
    trace = Trace(CancelBatch, at)
    learner = small(trace)
    learner.fit(1)
    batches = [*cancelled_batch(at, TRAIN_BATCH), *TRAIN_BATCH]
    end = ["begin_validate", *VALID_BATCH, "after_epoch", "after_fit"]
    assert trace.events == ["begin_fit", "begin_epoch", *batches, *end]
    assert learner.step == (2 if at == "after_step" else 1)


@pytest.mark.parametrize("at", VALID_BATCH[:-1])
def test_cancel_a_validation_batch(at):
    trace = Trace(CancelBatch, at, "valid")
    small(trace, batches=4).fit(1)
    start = trace.events.index("begin_validate")
    batches = [*cancelled_batch(at, VALID_BATCH), *VALID_BATCH]
    assert trace.events[start:] == ["begin_validate", *batches, "after_epoch", "after_fit"]


@pytest.mark.parametrize("at", ["begin_epoch", *TRAIN_BATCH])
def test_cancel_the_training_part_of_an_epoch(at):
    trace = Trace(CancelEpoch, at)
    learner = small(trace)
    learner.fit(2)
    left = begun_batch(at, TRAIN_BATCH)
    rest = ["begin_validate", *VALID_BATCH, "after_epoch"]
    first = ["begin_epoch", *left, "after_cancel_epoch", *rest]
    assert trace.events == ["begin_fit", *first, "begin_epoch", *TRAIN_BATCH * 2, *rest, "after_fit"]


@pytest.mark.parametrize("at", ["begin_validate", *VALID_BATCH])
def test_cancel_the_validation_part_of_an_epoch(at):
    trace = Trace(CancelEpoch, at, "valid")
    small(trace).fit(1)
    left = begun_batch(at, VALID_BATCH)
    start = trace.events.index("begin_validate")
    assert trace.events[start:] == ["begin_validate", *left, "after_cancel_epoch", "after_epoch", "after_fit"]
    assert torch.is_grad_enabled()


WHOLE = [("begin_fit", "train"), ("begin_epoch", "train"), ("begin_validate", "valid"), ("after_epoch", "valid")]
WITHIN = [(at, "train") for at in TRAIN_BATCH[:-1]] + [(at, "valid") for at in VALID_BATCH[:-1]]


@pytest.mark.parametrize(("at", "part"), WHOLE + WITHIN)
def test_cancel_the_fit(at, part):
    trace = Trace(CancelTrain, at, part)
    learner = small(trace)
    assert learner.fit(3) is learner.history
    in_batch = ["after_batch"] if (at, part) in WITHIN else []
    end = [at, *in_batch, "after_cancel_train", "after_fit"]
    assert trace.events[-len(end) :] == end
    assert trace.events.count("begin_epoch") == (at != "begin_fit")
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize(("at", "part"), WHOLE + WITHIN)
def test_a_failure_ends_with_after_fit_and_goes_on(error, at, part):
    trace = Trace(error, at, part)
    with pytest.raises(error):
        small(trace).fit(1)
    in_batch = ["after_batch"] if (at, part) in WITHIN else []
    end = [at, *in_batch, "after_fit"]
    assert trace.events[-len(end) :] == end
    assert trace.events.count("after_fit") == 1
    assert not any("cancel" in event for event in trace.events)


def test_a_model_that_fails_ends_with_after_fit():
    trace = Trace()
    with pytest.raises(RuntimeError, match="mat1"):
        small(trace, model=nn.Linear(5, 1, dtype=torch.float64)).fit(1)
    assert trace.events == ["begin_fit", "begin_epoch", "begin_batch", "after_batch", "after_fit"]


# --- state ----------------------------------------------------------------------------------------------------------


def test_counters_and_position():
    seen = []

    def look(learner: Learner) -> None:
        place = learner.epoch, learner.batch, learner.num_batches, learner.step, learner.training
        seen.append((*place, learner.position, learner.num_epochs))

    learner = small(on("begin_batch", look), batches=4)
    learner.fit(2)
    assert seen == [
        *[(0, i, 4, i, True, i / 4, 2) for i in range(4)],
        *[(0, i, 2, 4, False, 1, 2) for i in range(2)],
        *[(1, i, 4, 4 + i, True, 1 + i / 4, 2) for i in range(4)],
        *[(1, i, 2, 8, False, 2, 2) for i in range(2)],
    ]


def test_position_between_the_batches():
    seen = []
    look = [on(event, lambda it, e=event: seen.append((e, it.position))) for event in ("begin_epoch", "begin_validate")]
    small(*look, on("after_epoch", lambda it: seen.append(("after_epoch", it.position))), batches=4).fit(2)
    assert seen == [
        *[("begin_epoch", 0), ("begin_validate", 1), ("after_epoch", 1)],
        *[("begin_epoch", 1), ("begin_validate", 2), ("after_epoch", 2)],
    ]


@pytest.mark.parametrize("event", ["after_backward", "begin_step", "after_step", "after_batch"])
def test_output_and_loss_hold_no_graph_after_backward(event):
    held = []
    small(on(event, lambda it: held.append(it.loss.requires_grad or it.output.requires_grad))).fit(1)
    assert held
    assert not any(held)


def double_inputs(learner: Learner) -> None:
    learner.inputs = learner.inputs * 2


def double_output(learner: Learner) -> None:
    learner.output = learner.output * 2


def double_targets(learner: Learner) -> None:
    learner.targets = learner.targets * 2


def triple_loss(learner: Learner) -> None:
    learner.loss = learner.loss * 3


@pytest.mark.parametrize(
    ("event", "change", "loss"),
    [
        ("begin_batch", double_inputs, lambda model, x, y: nn.functional.mse_loss(model(x * 2), y)),
        ("after_pred", double_output, lambda model, x, y: nn.functional.mse_loss(model(x) * 2, y)),
        ("after_pred", double_targets, lambda model, x, y: nn.functional.mse_loss(model(x), y * 2)),
        ("after_loss", triple_loss, lambda model, x, y: nn.functional.mse_loss(model(x), y) * 3),
    ],
)
def test_what_a_callback_changes_is_what_the_loop_uses(event, change, loss):
    learner = small(on(event, change))
    learner.fit(1)
    model, (x, y) = linear_model(), numbers(8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for part in (slice(0, 4), slice(4, 8)):
        optimizer.zero_grad()
        loss(model, x[part], y[part]).backward()
        optimizer.step()
    assert torch.equal(weights(learner), nn.utils.parameters_to_vector(model.parameters()))


def test_a_callback_may_change_model_optimizer_and_data_for_the_epoch():
    other = nn.Linear(3, 1, dtype=torch.float64)
    x, y = numbers(3, seed=9)
    seen = []

    def swap(learner: Learner) -> None:
        learner.model, learner.optimizer = other, torch.optim.Adam(other.parameters())
        learner.train = [(x, y)]

    first = linear_model()
    before = nn.utils.parameters_to_vector(first.parameters()).detach().clone()
    look = on("after_step", lambda it: seen.append((it.model is other, len(it.inputs), it.num_batches)))
    learner = small(on("begin_epoch", swap), look, model=first)
    learner.fit(1)
    assert seen == [(True, 3, 1)]
    assert torch.equal(before, nn.utils.parameters_to_vector(first.parameters()))
    assert len(learner.optimizer.state) == 2


# --- gradients ------------------------------------------------------------------------------------------------------


def plain_loop(batches, epochs: int = 1, **options) -> torch.Tensor:
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_it_trains_as_a_plain_loop_does():
    x, y = numbers(11)
    model = linear_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    learner = small(model=model, optimizer=optimizer, train=TensorBatches(x, y, 4))
    learner.fit(3)
    plain = plain_loop(list(TensorBatches(x, y, 4)), epochs=3, momentum=0.9, weight_decay=0.01)
    assert torch.equal(weights(learner), plain)


def test_gradients_accumulate_over_cancelled_batches():
    class EverySecond(Callback):
        def after_backward(self) -> None:
            if self.learner.batch % 2 == 0:
                raise CancelBatch

    learner = small(EverySecond(), batches=4)
    learner.fit(1)
    x, y = numbers(16)
    model = linear_model()
    for part in (slice(0, 8), slice(8, 16)):
        loss = 2 * nn.functional.mse_loss(model(x[part]), y[part])  # the sum of two means of half as many
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    expected = nn.utils.parameters_to_vector(model.parameters())
    torch.testing.assert_close(weights(learner), expected, rtol=1e-12, atol=1e-12)
    assert learner.step == 2


@pytest.mark.parametrize("at", ["after_backward", "after_step"])
def test_the_next_fit_starts_without_the_gradients_of_one_that_was_left(at):
    learner = small(Trace(CancelTrain, at))
    learner.fit(1)
    model = linear_model()
    model.load_state_dict(learner.model.state_dict())
    learner.fit(1)
    fresh = small(model=model)
    fresh.fit(1)
    assert torch.equal(weights(learner), weights(fresh))


def test_a_batch_cancelled_after_its_step_leaves_no_gradient():
    learner = small(Trace(CancelBatch, "after_step"))
    learner.fit(1)
    assert torch.equal(weights(learner), plain_loop(list(TensorBatches(*numbers(8), 4))))


# --- data -----------------------------------------------------------------------------------------------------------


class Stream:
    """Batches that can be passed again, of unknown number."""

    def __iter__(self):
        x, y = numbers(8)
        yield from zip(x.split(4), y.split(4), strict=True)


class StreamOfSamples(IterableDataset):
    def __iter__(self):
        yield from zip(*numbers(8), strict=True)


@pytest.mark.parametrize(
    ("train", "length"),
    [
        (TensorBatches(*numbers(8), 4), 2),
        (DataLoader(TensorPairs(*numbers(8)), 4), 2),
        (list(TensorBatches(*numbers(8), 4)), 2),
        (Stream(), None),
        (DataLoader(StreamOfSamples(), 4), None),
    ],
    ids=["TensorBatches", "DataLoader", "list", "iterable", "stream"],
)
def test_any_iterable_of_batches(train, length):
    seen = []
    learner = small(on("after_batch", lambda it: seen.append((it.num_batches, it.position))), train=train)
    learner.fit(2)
    assert torch.equal(weights(learner), plain_loop(Stream(), epochs=2))
    assert seen[:2] == [(length, 0), (length, 0.5 if length else 0)]


def test_a_schedule_over_batches_without_a_length_is_refused():
    with pytest.raises(InputError, match=r"train has no length.*Accepted: batches with len\(\)"):
        small(ScheduleParameter("lr", linear(1, 0)), train=Stream()).fit(1)


def test_every_fit_starts_anew():
    learner = small(Metrics())
    assert [row["epoch"] for row in learner.fit(2)] == [1, 2]
    first = weights(learner)
    assert [row["epoch"] for row in learner.fit(1)] == [1]
    assert learner.step == BATCHES
    assert not torch.equal(first, weights(learner))


@pytest.mark.parametrize("epochs", [0, -1])
def test_no_epochs_are_refused(epochs):
    with pytest.raises(InputError, match=rf"epochs={epochs} is not usable. Accepted: a whole number from 1"):
        small().fit(epochs)


# --- the real thing -------------------------------------------------------------------------------------------------


def test_it_learns_mnist():
    data = load_dataset("mnist")
    mean, deviation = data.x_train.mean(), data.x_train.std()
    torch.manual_seed(0)
    model = build_model("convnet", "batch", 10)
    history = Learner(
        model,
        TensorBatches((data.x_train[:5000] - mean) / deviation, data.y_train[:5000], 64, shuffle=True),
        TensorBatches((data.x_valid[:2000] - mean) / deviation, data.y_valid[:2000], 512),
        optimizer=torch.optim.SGD(model.parameters(), lr=0.4),
        callbacks=[Metrics(accuracy=accuracy), ScheduleParameter("lr", linear(0.4, 0.08))],
    ).fit(1)
    assert history[0]["valid"]["accuracy"] > 0.9
    assert history[0]["valid"]["loss"] < history[0]["train"]["loss"]


SCRIPT = """
import torch
from normlab.data import TensorBatches
from normlab.models import build_model
from normlab.training import Learner, Recorder

torch.manual_seed(3)
x, y = torch.randn(64, 1, 28, 28), torch.randint(10, (64,))
model, recorder = build_model("convnet", "running", 10), Recorder()
train = TensorBatches(x, y, 8, shuffle=True, seed=3)
Learner(model, train, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), callbacks=[recorder]).fit(2)
print([loss.hex() for loss in recorder.losses])
"""


def test_the_same_seed_gives_the_same_losses_in_a_fresh_process(capsys):
    settings = {"PYTHONPATH": str(Path(normlab.__file__).parents[1]), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    fresh = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, check=True, text=True, env={**os.environ, **settings}
    )
    exec(SCRIPT, {})
    assert fresh.stdout.count("0x") == 16
    assert fresh.stdout == capsys.readouterr().out


# --- optimizers that evaluate the loss again ------------------------------------------------------------------------


def test_it_trains_with_lbfgs_as_a_plain_loop_does():
    x, y = numbers(12)
    learned, plain = (nn.Linear(3, 1, dtype=torch.float64) for _ in range(2))
    plain.load_state_dict(learned.state_dict())
    metrics = Metrics()
    optimizer = torch.optim.LBFGS(learned.parameters(), max_iter=5)
    learner = Learner(learned, [(x, y)] * 3, loss_func=nn.functional.mse_loss, optimizer=optimizer, callbacks=[metrics])
    learner.fit(1)
    reference, first = torch.optim.LBFGS(plain.parameters(), max_iter=5), []

    def closure():
        reference.zero_grad()
        loss = nn.functional.mse_loss(plain(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        first.append(reference.step(closure).item())
    for a, b in zip(learned.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    assert learner.step == 3
    assert learner.history[0]["train"]["loss"] == pytest.approx(sum(first) / 3), "each batch counts once"

"""The callbacks: figures against float64, schedules batch by batch, and guards that stop at the step they should."""

import math

import pytest
import torch
from torch import nn

from normlab.data import TensorBatches
from normlab.errors import InputError
from normlab.nn import RunningBatchNorm1d
from normlab.training import (
    Callback,
    CancelBatch,
    CancelEpoch,
    ClipGradients,
    FindLearningRate,
    Learner,
    Metrics,
    Recorder,
    ScheduleParameter,
    StopWhenDiverged,
    ToDevice,
    TransformInputs,
    accuracy,
)
from normlab.training.callbacks import LOOK_EVERY
from normlab.training.schedules import constant, linear


def samples(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 5, generator=generator), torch.randint(3, (n,), generator=generator)


def classifier(*callbacks: Callback, n: int = 11, valid: int = 7, lr: float = 0.5, **options) -> Learner:
    """A linear classifier of 3 classes on batches of 4, of which the last is smaller."""
    torch.manual_seed(0)
    model = options.pop("model", nn.Linear(5, 3))
    options.setdefault("optimizer", torch.optim.SGD(model.parameters(), lr=lr))
    held = TensorBatches(*samples(valid, 1), min(4, valid)) if valid else None
    return Learner(model, TensorBatches(*samples(n), min(4, n)), held, **options, callbacks=callbacks)


def of_known_losses(values: list[float], *callbacks: Callback, batches: int, valid: bool = True) -> Learner:
    """A learner whose training losses are these, in this order, and whose validation losses are nan."""
    model = nn.Linear(1, 1)
    values_left = iter(values)

    def loss(output, targets):
        return output.sum() * 0 + (next(values_left) if torch.is_grad_enabled() else math.nan)

    x = torch.ones(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    held = [(x, x)] * 2 if valid else None
    return Learner(model, [(x, x)] * batches, held, loss_func=loss, optimizer=optimizer, callbacks=callbacks)


def sees(look, event: str = "begin_batch", order: int = 5) -> Callback:
    """A callback that keeps `look(learner)` at every such event, once the others have acted, as its `seen`."""
    note = {event: lambda self: self.seen.append(look(self.learner))}
    callback = type("Sees", (Callback,), {"order": order, **note})()
    callback.seen = []
    return callback


# --- Metrics --------------------------------------------------------------------------------------------------------


def margin(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Not linear in the batch, so that only weighting by its size gives the figure expected here."""
    return output.std() + len(targets)


class Batches(Callback):
    """Keeps outputs and targets of each part of each epoch."""

    def begin_epoch(self) -> None:
        self.parts = {"train": [], "valid": []}

    def after_loss(self) -> None:
        part = "train" if self.learner.training else "valid"
        self.parts[part].append((self.learner.output.detach().double(), self.learner.targets))


def weighted(batches, figure) -> float:
    sizes = [len(targets) for _, targets in batches]
    total = math.fsum(size * float(figure(*batch)) for size, batch in zip(sizes, batches, strict=True))
    return total / sum(sizes)


@pytest.mark.parametrize(("n", "valid"), [(11, 7), (12, 8), (4, 1), (1030, 5)])
def test_figures_are_means_over_samples(n, valid):
    batches = Batches()
    learner = classifier(batches, Metrics(accuracy=accuracy, margin=margin), n=n, valid=valid)
    history = learner.fit(2)
    for part in ("train", "valid"):
        seen = batches.parts[part]
        assert sum(len(targets) for _, targets in seen) == (n if part == "train" else valid)
        figures = history[1][part]
        assert list(figures) == ["loss", "accuracy", "margin"]
        assert figures["loss"] == pytest.approx(weighted(seen, nn.functional.cross_entropy), rel=1e-6)
        assert figures["accuracy"] == pytest.approx(weighted(seen, lambda o, t: (o.argmax(1) == t).double().mean()))
        assert figures["margin"] == pytest.approx(weighted(seen, margin), rel=1e-6)


def test_a_row_an_epoch():
    history = classifier(Metrics()).fit(3)
    assert [row["epoch"] for row in history] == [1, 2, 3]
    assert all(list(row) == ["epoch", "train", "valid", "seconds"] and row["seconds"] > 0 for row in history)
    assert all(list(row["train"]) == list(row["valid"]) == ["loss"] for row in history)


def test_a_row_without_validation():
    assert list(classifier(Metrics(), valid=0).fit(1)[0]) == ["epoch", "train", "seconds"]


def test_only_the_batches_that_were_done_are_counted():
    class TwoBatches(Callback):
        def begin_batch(self) -> None:
            if self.learner.batch == 1:
                raise CancelBatch
            if self.learner.batch == 3 and self.learner.training:
                raise CancelEpoch

    batches = Batches()
    history = classifier(batches, Metrics(), TwoBatches(), n=22, valid=9).fit(1)
    assert [len(batches.parts[part]) for part in ("train", "valid")] == [2, 2]
    for part in ("train", "valid"):
        expected = weighted(batches.parts[part], nn.functional.cross_entropy)
        assert history[0][part]["loss"] == pytest.approx(expected, rel=1e-6)


def test_a_validation_that_was_skipped_has_no_figures():
    class OnlyTrain(Callback):
        order = -1

        def begin_validate(self) -> None:
            raise CancelEpoch

    assert [list(row) for row in classifier(OnlyTrain(), Metrics()).fit(2)] == [["epoch", "train", "seconds"]] * 2


# --- Recorder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [3, 256, 300])
def test_recorder_keeps_losses_and_rates_of_the_training_batches(batches):
    values = [float(i) for i in range(2 * batches)]
    recorder = Recorder()
    learner = of_known_losses(values, recorder, ScheduleParameter("lr", linear(1.0, 0.0)), batches=batches)
    learner.fit(2)
    assert recorder.losses == values
    assert recorder.lrs == [pytest.approx([1 - i / (2 * batches) for i in range(2 * batches)])]


def test_recorder_keeps_a_list_for_each_group_and_begins_again_with_each_fit():
    recorder = Recorder()
    learner = two_groups(recorder)
    learner.fit(2)
    assert recorder.lrs == [[0.5] * 6, [0.25] * 6]
    learner.fit(1)
    assert recorder.lrs == [[0.5] * 3, [0.25] * 3]
    assert len(recorder.losses) == 3


def two_groups(*callbacks: Callback) -> Learner:
    model = nn.Linear(5, 3)
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.25}]
    return classifier(*callbacks, model=model, optimizer=torch.optim.SGD(groups, lr=9.0, momentum=0.5))


# --- ScheduleParameter ----------------------------------------------------------------------------------------------


def test_a_schedule_sets_each_training_batch_by_its_position():
    rates = sees(lambda it: (it.training, it.optimizer.param_groups[0]["lr"]))
    positions = []

    def schedule(position: float) -> float:
        positions.append(position)
        return 2 + position

    classifier(rates, ScheduleParameter("lr", schedule), lr=77.0).fit(2)
    assert positions == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    trained = [rate for training, rate in rates.seen if training]
    assert trained == [2 + position for position in positions]
    assert [rate for training, rate in rates.seen if not training] == [trained[2]] * 2 + [trained[5]] * 2


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
def test_one_schedule_for_all_groups(name):
    values = sees(lambda it: [group[name] for group in it.optimizer.param_groups])
    two_groups(values, ScheduleParameter(name, linear(0.0, 0.6))).fit(1)
    assert values.seen[:3] == [pytest.approx([v, v]) for v in (0, 0.2, 0.4)]


def test_a_schedule_for_each_group():
    values = sees(lambda it: [group["lr"] for group in it.optimizer.param_groups])
    two_groups(values, ScheduleParameter("lr", [constant(1.0), linear(0.0, 3.0)])).fit(1)
    assert values.seen[:3] == [pytest.approx([1, v]) for v in (0, 1, 2)]


def test_a_schedule_overrides_the_optimizer_and_trains_accordingly():
    still, moved = classifier(ScheduleParameter("lr", constant(0.0)), lr=0.5), classifier(lr=0.5)
    before = still.model.weight.detach().clone()
    still.fit(1)
    moved.fit(1)
    assert torch.equal(still.model.weight, before)
    assert not torch.equal(moved.model.weight, before)


def test_a_number_of_schedules_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"schedule='3 schedules' is not usable. Accepted: one, or 2"):
        two_groups(ScheduleParameter("lr", [constant(1.0)] * 3)).fit(1)


def test_an_unknown_hyperparameter_is_refused():
    with pytest.raises(InputError, match=r"name='momentun' is unknown. Did you mean 'momentum'.*weight_decay") as error:
        classifier(ScheduleParameter("momentun", constant(1.0))).fit(1)
    assert "params" not in str(error.value)


# --- FindLearningRate -----------------------------------------------------------------------------------------------


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


# --- ToDevice, TransformInputs, ClipGradients -----------------------------------------------------------------------


def test_to_device_moves_model_and_batches():
    places = sees(lambda it: {it.inputs.device.type, it.targets.device.type, it.model.weight.device.type})
    classifier(places, ToDevice("meta")).fit(1)
    assert places.seen == [{"meta"}] * 5


def test_inputs_are_transformed_in_both_parts_after_the_other_callbacks():
    before, after = (sees(lambda it: (tuple(it.inputs.shape), len(it.targets)), order=order) for order in (1, 3))
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 3))
    classifier(TransformInputs(lambda x: x.view(-1, 1, 5)), before, after, model=model).fit(1)
    sizes = [4, 4, 3, 4, 3]
    assert before.seen == [((n, 5), n) for n in sizes]
    assert after.seen == [((n, 1, 5), n) for n in sizes]


def gradient(learner: Learner) -> torch.Tensor:
    return torch.cat([p.grad.flatten().clone() for p in learner.model.parameters()])


def first_gradient(*callbacks: Callback) -> torch.Tensor:
    look = sees(gradient, "begin_step")
    classifier(*callbacks, look).fit(1)
    return look.seen[0]


def test_a_large_gradient_is_scaled_a_small_one_is_kept():
    whole = first_gradient()
    norm = float(whole.norm())
    torch.testing.assert_close(first_gradient(ClipGradients(norm / 4)), whole / 4, rtol=1e-4, atol=0)
    assert torch.equal(first_gradient(ClipGradients(norm * 4)), whole)


def test_a_norm_of_nothing_is_refused():
    with pytest.raises(InputError, match=r"max_norm=0 is not usable. Accepted: a number above 0"):
        ClipGradients(0)


# --- StopWhenDiverged -----------------------------------------------------------------------------------------------


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

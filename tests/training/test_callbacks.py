"""The callbacks: figures against float64, schedules batch by batch, gradients, devices."""

import math

import pytest
import torch
from torch import nn

from learners import classifier, of_known_losses, sees
from normlab.errors import InputError
from normlab.training import (
    Callback,
    CancelBatch,
    CancelEpoch,
    ChannelsLast,
    ClipGradients,
    Learner,
    Metrics,
    Recorder,
    ScheduleParameter,
    ToDevice,
    TransformInputs,
    accuracy,
)
from normlab.training.schedules import constant, linear

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


# --- ToDevice, ChannelsLast, TransformInputs, ClipGradients ---------------------------------------------------------


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


def test_channels_last_changes_the_layout_alone():
    layouts = sees(lambda it: it.inputs.is_contiguous(memory_format=torch.channels_last), order=4)
    x, y = torch.randn(6, 3, 5, 5), torch.randint(2, (6,))
    outputs = []
    for callbacks in ([], [ChannelsLast(), layouts]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        Learner(model, [(x, y)], optimizer=optimizer, callbacks=callbacks).fit(3)
        outputs.append(model(x))
    assert layouts.seen == [True] * 3
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(outputs[1], outputs[0])


def test_channels_last_looks_into_structures_and_knows_volumes():
    look = sees(lambda it: it.inputs, order=4)
    parts = {"image": torch.randn(2, 3, 4, 5), "more": [torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3), "name"]}
    model = nn.Conv3d(3, 1, 1)

    def step(batch, model):
        return model(batch["more"][0]).sum(), None

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Learner(model, [parts], step_func=step, optimizer=optimizer, callbacks=[ChannelsLast(), look]).fit(1)
    assert look.seen[0]["image"].is_contiguous(memory_format=torch.channels_last)
    assert look.seen[0]["more"][0].is_contiguous(memory_format=torch.channels_last_3d)
    assert look.seen[0]["more"][1] is parts["more"][1]
    assert model.weight.is_contiguous(memory_format=torch.channels_last_3d)


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

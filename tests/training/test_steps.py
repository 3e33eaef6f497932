"""What makes a step: several batches, a function of one's own, several optimizers."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from normlab.data import TensorBatches
from normlab.errors import InputError
from normlab.observe import ActivationStats
from normlab.training import (
    EMA,
    Callback,
    CancelBatch,
    CancelEpoch,
    CancelTrain,
    ClipGradients,
    EarlyStopping,
    Learner,
    Metrics,
    Recorder,
    accuracy,
    load_checkpoint,
)
from normlab.training.events import CANCELLED_IN, EVENTS


def data(samples=22, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 5, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GroupNorm(1, 7), nn.ReLU(), nn.Linear(7, 3)).double()


def trained(batch_size, *callbacks, train=None, **options):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    learner = Learner(
        model, train or TensorBatches(*data(), batch_size), optimizer=optimizer, callbacks=callbacks, **options
    )
    learner.fit(2)
    return learner


def weights(learner):
    return nn.utils.parameters_to_vector(learner.model.parameters()).detach()


class WithoutLength:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


# --- accumulation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(("size", "accumulate"), [(2, 4), (4, 2), (1, 8), (3, 1)])
def test_several_batches_are_one_large_one_also_at_the_end_of_an_epoch(size, accumulate, known, compile):
    """Of 22 samples the last group of 8 has 6; of batches of 4 the last has 2."""
    whole = trained(size * accumulate)
    small = TensorBatches(*data(), size)
    found = trained(size, train=small if known else WithoutLength(small), accumulate=accumulate, compile=compile)
    torch.testing.assert_close(weights(found), weights(whole), rtol=1e-10, atol=1e-12)
    assert found.step == whole.step == 2 * -(-22 // (size * accumulate))


def test_the_whole_gradient_is_clipped_once():
    whole, found = trained(8, ClipGradients(0.1)), trained(2, ClipGradients(0.1), accumulate=4)
    torch.testing.assert_close(weights(found), weights(whole), rtol=1e-10, atol=1e-12)


def test_events_of_a_step_come_once():
    heard = []

    class Trace(Callback):
        def after_backward(self):
            heard.append("backward")

        def begin_step(self):
            heard.append("step")

    trained(8, Trace(), accumulate=2)
    assert heard == ["backward", "backward", "step", "backward", "step"] * 2


@pytest.mark.parametrize("wrong", [0, 1.5, True, "2"])
def test_no_number_of_batches_is_refused(wrong):
    with pytest.raises(InputError, match=r"accumulate=.* is not usable\. Accepted: a whole number from 1"):
        trained(2, accumulate=wrong)


# --- a function of one's own ------------------------------------------------------------------------------------------


@dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor
    patient: list[str]


def step(batch, model):
    output = model(batch.image)
    return nn.functional.cross_entropy(output, batch.label), output, batch.label


def test_batches_of_any_kind_train_as_pairs_do():
    pairs = [(x, y) for x, y in TensorBatches(*data(), 4)]
    samples = [Sample(x, y, ["a"]) for x, y in pairs]
    expected = trained(4, Metrics(accuracy=accuracy))
    found = trained(4, Metrics(accuracy=accuracy), train=samples, step_func=step)
    assert torch.equal(weights(found), weights(expected))
    assert [row["train"] for row in found.history] == [row["train"] for row in expected.history]


def test_validation_calls_it_too_without_gradients():
    model, seen = net(), []

    def watched(batch, model):
        seen.append((model.training, torch.is_grad_enabled()))
        return step(batch, model)

    samples = [Sample(*data(4), ["a"])]
    Learner(model, samples, samples, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), step_func=watched).fit(1)
    assert seen == [(True, True), (False, False)]


@pytest.mark.parametrize("result", [None, torch.ones(()), (1,), (1, 2, 3, 4)])
def test_a_result_of_another_form_is_refused(result):
    with pytest.raises(InputError, match=r"step_func's result=.*Return \(loss, output\), or \(loss, output, targets\)"):
        trained(4, step_func=lambda batch, model: result)


def test_a_loss_of_another_form_is_refused():
    with pytest.raises(InputError, match=r"the loss of step_func's result='float'"):
        trained(4, step_func=lambda batch, model: (1.0, None))


def test_a_gan_has_two_optimizers_and_steps_by_itself():
    torch.manual_seed(0)
    model = nn.ModuleDict({"made": nn.Linear(2, 5), "judge": nn.Linear(5, 1)}).double()
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.01) for part in model.values()]

    def play(batch, model):
        losses = []
        made = model["made"](torch.randn(len(batch[0]), 2, dtype=torch.float64))
        for optimizer, sign in zip(optimizers, (1, -1), strict=True):
            model.zero_grad()
            loss = nn.functional.softplus(sign * model["judge"](made)).mean() + model["judge"](batch[0]).square().mean()
            loss.backward(retain_graph=True)
            optimizer.step()
            losses.append(loss.detach())
            made = made.detach()
        return sum(losses), made

    before = [part.clone() for part in model.parameters()]
    learner = Learner(model, TensorBatches(*data(), 4), optimizer=optimizers, step_func=play, callbacks=[Metrics()])
    learner.fit(1)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert learner.step == 6
    with pytest.raises(InputError, match=r"optimizer='list' is not usable.*step_func"):
        Learner(model, [data()], optimizer=optimizers)
    with pytest.raises(InputError, match="optimizer='NoneType'"):
        Learner(model, [data()], optimizer=None)


# --- what a callback raises -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("cancel", [CancelBatch, CancelEpoch, CancelTrain])
def test_a_cancel_ends_its_level_or_is_explained(cancel, event):
    """Whatever is raised where: either the fit ends in good order, or an error names callback, event and where to."""

    class Cancels(Callback):
        raised = False

        def raise_it(self):
            if not self.raised:
                Cancels.raised = True
                raise cancel

    first = {"after_cancel_batch": CancelBatch, "after_cancel_epoch": CancelEpoch, "after_cancel_train": CancelTrain}
    setattr(Cancels, event, Cancels.raise_it)
    if event in first and event != "begin_step":

        def begin(self):
            if self.learner.training and self.learner.epoch == 0:
                raise first[event]

        Cancels.begin_step = begin
    model = net()
    metrics = Metrics(accuracy=accuracy)
    learner = Learner(
        model,
        TensorBatches(*data(), 8),
        [data()],
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[Cancels(), metrics],
    )
    if event in CANCELLED_IN[cancel]:
        learner.fit(2)
        assert len(learner.history) in ((0, 1) if CancelTrain in (cancel, first.get(event)) else (2,))
    else:
        with pytest.raises(InputError, match=rf"Cancels\.{event} raised {cancel.__name__}, which has nothing to end"):
            learner.fit(2)
    learner.callbacks = [metrics]
    assert len(learner.fit(2)) == 2  # all can be used again


def test_an_error_names_callback_and_event():
    class Breaks(Callback):
        def after_loss(self):
            raise KeyError("lr")

    with pytest.raises(KeyError) as caught:
        trained(8, Breaks())
    assert caught.value.__notes__ == ["In the callback's Breaks.after_loss, epoch 1, batch 1."]


@pytest.mark.parametrize("event", [event for event in EVENTS if "cancel" not in event])
@pytest.mark.parametrize("order", [-5, 5])
def test_after_an_error_learner_and_callbacks_can_be_used_again(order, event):
    class Breaks(Callback):
        broken = False

        def break_it(self):
            if not self.broken:
                self.broken = True
                raise RuntimeError("broken")

    Breaks.order = order
    setattr(Breaks, event, Breaks.break_it)
    model = net().float()
    images, targets = data()
    callbacks = [ActivationStats(model, every=1), Metrics(accuracy=accuracy), Recorder(), EMA(0.9), Breaks()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pairs = [(images.float(), targets)] * 2
    learner = Learner(model, pairs, pairs, optimizer=optimizer, callbacks=[*callbacks, EarlyStopping()])
    with pytest.raises(RuntimeError, match="broken"):
        learner.fit(1)
    assert len(learner.fit(1)) == 1


# --- the example ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]])
def test_the_example_trains_a_net_of_monai_in_one_process_or_two(tmp_path, launcher):
    pytest.importorskip("monai")
    script = Path(__file__).parents[2] / "examples" / "train.py"
    run = subprocess.run([sys.executable, *launcher, script], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    scores = [float(found) for found in re.findall(r"valid: loss [\d.]+, dice ([\d.]+)", run.stdout)]
    assert len(scores) == 6
    assert scores[-1] > 0.95
    assert load_checkpoint(tmp_path / "run" / "last.ckpt")["epoch"] == 6

"""The compiled step trains as the plain one does, with every callback that does not change the graph."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from normlab.data import TensorBatches, load_dataset
from normlab.errors import InputError
from normlab.nn import build_norm
from normlab.surgery import FreezeNorms
from normlab.training import (
    Callback,
    CancelBatch,
    ClipGradients,
    Learner,
    Metrics,
    Recorder,
    ScheduleParameter,
    accuracy,
)
from normlab.training.schedules import linear

CALLS: list[str] = []


def counting_backend(graph, inputs):
    CALLS.append("compiled")
    return graph


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    CALLS.clear()


@pytest.fixture
def plain_backend(monkeypatch):
    """The compiler's graph, without the minutes that its code takes."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options: real(f, backend="aot_eager"))


def block(norm, channels, out):
    return nn.Conv2d(channels, out, 3, 3), nn.ReLU(), build_norm(norm, out)


def digits(batch_size, images):
    data = load_dataset("mnist")
    return TensorBatches(data.x_train[:images], data.y_train[:images], batch_size, shuffle=True, seed=0)


def fit(norm, images, compile, *callbacks, **options):
    batches = digits(8, images)
    torch.manual_seed(0)
    model = nn.Sequential(*block(norm, 1, 4), *block(norm, 4, 8), nn.Flatten(), nn.Linear(72, 10))
    recorder = Recorder()
    learner = Learner(
        model,
        batches,
        batches,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.05, **options),
        callbacks=[Metrics(accuracy=accuracy), recorder, *callbacks],
        compile=compile,
    )
    return learner, learner.fit(1), recorder.losses


def assert_same(one, other):
    (learner, history, losses), (expected_learner, expected_history, expected_losses) = one, other
    torch.testing.assert_close(losses, expected_losses, rtol=2e-3, atol=2e-3)
    for row, expected in zip(history, expected_history, strict=True):
        assert row["train"] == pytest.approx(expected["train"], rel=5e-3, abs=5e-3)
        assert row["valid"] == pytest.approx(expected["valid"], rel=5e-3, abs=5e-3)
    states = zip(learner.model.state_dict().values(), expected_learner.model.state_dict().values(), strict=True)
    for value, expected in states:
        torch.testing.assert_close(value.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("norm", ["running", "batch", "group"])
@pytest.mark.usefixtures("plain_backend")
def test_trains_as_the_plain_step_does(norm):
    callbacks = lambda: (ScheduleParameter("lr", linear(0.05, 0.01)), ClipGradients(1.0))  # noqa: E731
    compiled = fit(norm, 80, True, *callbacks(), momentum=0.9)
    assert_same(compiled, fit(norm, 80, False, *callbacks(), momentum=0.9))


def test_compiled_code_trains_as_the_plain_step_does():
    # 44 images: with a smaller last batch
    assert_same(fit("running", 44, True), fit("running", 44, False))


@pytest.mark.usefixtures("plain_backend")
def test_gradients_accumulate():
    class EveryOther(Callback):
        def after_backward(self):
            if self.learner.training and self.learner.batch % 2 == 0:
                raise CancelBatch

    found = fit("group", 80, True, EveryOther())
    assert_same(found, fit("group", 80, False, EveryOther()))
    assert found[0].step == 5


@pytest.mark.parametrize(("norm", "affine"), [("running", True), ("batch", False)])
@pytest.mark.usefixtures("plain_backend")
def test_norms_that_freeze_within_a_fit_freeze_in_the_compiled_step(norm, affine):
    class Look(Callback):
        def after_batch(self):
            if self.learner.training:
                seen.append({name: part.clone() for name, part in self.learner.model[2].state_dict().items()})

    seen: list[dict[str, torch.Tensor]] = []
    freezing = lambda: FreezeNorms(0.6, affine)  # noqa: E731
    found, expected = (fit(norm, 80, compile, freezing(), Look(), momentum=0.9) for compile in (True, False))
    assert found[2] == pytest.approx(expected[2], rel=1e-5)
    for one, other in zip(seen[:10], seen[10:], strict=True):  # each of 10 batches, compiled and not
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    moved = [not torch.equal(one["running_mean"], other["running_mean"]) for one, other in pairwise(seen[:10])]
    assert moved == [number < 5 for number in range(9)], "from the seventh batch on they stay"
    assert torch.equal(seen[8]["weight"], seen[9]["weight"]) == affine


@pytest.mark.usefixtures("plain_backend")
def test_parameters_that_are_frozen_or_unused_get_no_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.unused = nn.Linear(2, 2)
    model[0].bias.requires_grad_(False)
    model.forward = lambda x: model[1](model[0](x))
    kept, seen = model[0].bias.clone(), []

    class Look(Callback):
        def after_backward(self):
            seen.append((model[0].bias.grad, model.unused.weight.grad, model[0].weight.grad is not None))

    batches = [(torch.randn(5, 3), torch.randint(0, 2, (5,)))] * 2
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    Learner(model, batches, optimizer=optimizer, callbacks=[Look()], compile=True).fit(1)
    assert seen == [(None, None, True)] * 2
    assert torch.equal(model[0].bias, kept)


def test_is_compiled_once_a_shape_and_once_a_learner(monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options: real(f, backend=counting_backend, dynamic=False))
    for learners in range(1, 11):  # more than the eight times that the compiler allows a function
        model = nn.Linear(3, 2)
        batches = [(torch.randn(4, 3), torch.randint(0, 2, (4,)))] * 3
        learner = Learner(model, batches, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), compile=True)
        learner.fit(2)
        learner.fit(1)
        assert len(CALLS) == learners


def test_a_torch_that_cannot_compile_gradients_is_named(monkeypatch):
    from normlab.training import compiled

    monkeypatch.setattr(compiled, "_SWITCH", "not_there")
    model = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"compile=True.*torch"):
        Learner(model, [], optimizer=torch.optim.SGD(model.parameters(), lr=0.1), compile=True)

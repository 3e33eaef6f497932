"""A guard says what will fail at the first batch, looks when losses part, in any loop, and leaves nothing behind."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab
from normlab.training import Learner


def net() -> nn.Sequential:
    """Its last map has one pixel."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 2))


def pairs(size: int, count: int = 6):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 1, 7, 7, generator=generator), torch.randint(0, 2, (size,), generator=generator))
        for _ in range(count)
    ]


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def test_a_plain_loop_is_told_at_the_first_batch_which_norms_have_few_values():
    model, said = net(), []
    with normlab.watch(model, say=said.append):
        for x, _ in pairs(2):
            model(x)
            (text,) = said  # at the first, and no more
    assert text.startswith("4: a batch has 2 values a channel")
    assert 'convert(model, "running")' in text
    assert hooks(model) == 0


def test_one_value_a_channel_is_said_before_torch_raises():
    model, said = net(), []
    with normlab.watch(model, say=said.append), pytest.raises(ValueError, match="Expected more than 1 value"):
        model(pairs(1)[0][0])
    assert said[0].startswith("4: a batch has one value a channel")
    assert hooks(model) == 0


def test_it_warns_where_nothing_else_is_asked_for():
    with pytest.warns(UserWarning, match="4: a batch has 2 values"), normlab.watch(model := net()):
        model(pairs(2)[0][0])


@pytest.mark.parametrize("make", [lambda: net(), lambda: normlab.convert(net(), "running").model])
def test_a_sound_training_hears_nothing(make):
    model, said = make(), []
    with normlab.watch(model, say=said.append) as guard:
        model(pairs(2 if isinstance(model[1], normlab.nn.RunningBatchNorm2d) else 16)[0][0])
        guard.log(train=1.0, valid=1.1)
    assert said == []


def test_norms_frozen_by_halves_are_named():
    model, said = net(), []
    model[1].requires_grad_(False)
    model[4].eval()
    with normlab.watch(model, say=said.append):
        model(pairs(16)[0][0])
    assert len(said) == 2
    assert any(text.startswith("1: γ and β do not learn") for text in said)
    assert any(text.startswith("4: in evaluation mode") for text in said)


def test_processes_with_statistics_of_their_own_are_named(monkeypatch):
    monkeypatch.setattr("normlab.health.guard._world", lambda: 4)
    model, said = net(), []
    with normlab.watch(model, say=said.append):
        model(pairs(16)[0][0])
    assert said == [text for text in said if text.startswith("1, 4: each of 4 processes") and "normlab.sync" in text]
    assert len(said) == 1
    synced = normlab.sync(net()).model
    with normlab.watch(synced, say=said.append):
        synced(pairs(2)[0][0])  # eight values of all
    assert len(said) == 1


def test_parting_losses_start_the_diagnosis_once():
    model, said = net(), []
    of_model = pairs(16)
    with normlab.watch(model, batches=of_model, loss=F.cross_entropy, say=said.append) as guard:
        for x, _ in of_model:
            model(x)
        model[4].running_var[2] = float("nan")
        guard.log(train=0.5, valid=0.6)
        assert guard.diagnosis is None
        guard.log(train=0.5, valid=torch.tensor(float("nan")))
        found = guard.diagnosis
        guard.log(train=0.5, valid=9.0)
    assert [finding.fault for finding in found.findings] == ["statistics not finite"]
    assert found.to_dict() == normlab.diagnose(model, of_model, loss=F.cross_entropy).to_dict()
    assert guard.diagnosis is found
    assert len(said) == 1
    assert "0.5" in said[0]
    assert "statistics not finite" in said[0]


def test_the_batches_that_the_loop_gave_are_looked_at_as_it_gave_them():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, a, *, b):
            return self.norm(a) + b

    model = Two()
    with normlab.watch(model, say=lambda text: None) as guard:
        for x, _ in pairs(16):
            model(x + 9, b=x)
        model.norm.reset_running_stats()
        guard.log(train=0.1, valid=1.0)
    assert (guard.diagnosis.output.batches, guard.diagnosis.output.images) == (4, 64)
    assert [finding.fault for finding in guard.diagnosis.findings] == ["statistics never updated"]


def test_a_diagnosis_that_fails_ends_no_training():
    model, said = net(), []
    with normlab.watch(model, batches=[torch.zeros(2, 3, 7, 7)], say=said.append) as guard:
        guard.log(train=0.1, valid=1.0)
    assert "could not be looked at" in said[0]
    assert "(2, 3, 7, 7)" in said[0]


def test_a_learner_is_watched_by_a_callback_alone():
    model, said = net(), []
    of_model = pairs(2)
    for_validation = [(x * 50 + 200, y) for x, y in pairs(16)]
    guard = normlab.watch(model, say=said.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    Learner(model, of_model, for_validation, optimizer=optimizer, callbacks=[guard]).fit(2)
    assert said[0].startswith("4: a batch has 2 values a channel")
    assert "has parted" in said[1]
    assert len(said) == 2
    assert "batch too small" in [finding.fault for finding in guard.diagnosis.findings]
    assert guard.diagnosis.output.training_loss is not None
    assert hooks(model) == 0


@pytest.mark.parametrize(
    ("train", "valid", "parted"),
    [
        (-0.8, -0.79, False),
        (-0.8, -0.7, False),
        (-0.8, -0.3, True),
        (0.0, 0.0, False),
        (1.0, 1.4, False),
        (1, 1.6, True),
    ],
)
def test_losses_below_0_part_by_half_of_their_size(train, valid, parted):
    """Minus a Dice score, as nnU-Net has it."""
    model, said = net(), []
    with normlab.watch(model, batches=[x for x, _ in pairs(16)], say=said.append) as guard:
        guard.log(train=train, valid=valid)
    assert bool(said) is parted


def test_norms_that_could_not_be_looked_at_are_not_acquitted():
    model, said = nn.Sequential(torch.jit.script(nn.BatchNorm2d(1))), []
    with normlab.watch(model, say=said.append) as guard:
        model(pairs(16)[0][0])
        guard.log(train=0.1, valid=1.0)
    assert "not the cause" not in said[0]
    assert "compiled by TorchScript" in said[0]


class Frozen(nn.Module):
    """As detection libraries write it: everything is a buffer."""

    def __init__(self, channels):
        super().__init__()
        for name, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def test_a_frozen_norm_of_another_library_needs_nothing_in_evaluation_mode():
    model, said = nn.Sequential(nn.Conv2d(1, 4, 3), Frozen(4)), []
    model[1].eval()
    model[1].running_var.fill_(0.4)
    with normlab.watch(model, say=said.append):
        model(pairs(16)[0][0])
    assert said == []
    found = normlab.diagnose(model, [x for x, _ in pairs(16)])
    assert "frozen by mode" not in [finding.fault for finding in found.findings]
    assert found.notes == []


def test_norms_in_evaluation_mode_do_not_normalise_by_part_of_a_batch(monkeypatch):
    monkeypatch.setattr("normlab.health.guard._world", lambda: 4)
    model, said = net(), []
    model[1].eval(), model[4].eval()
    with normlab.watch(model, say=said.append):
        model(pairs(16)[0][0])
    assert not any("4 processes" in text for text in said)


def test_norms_that_wait_for_other_processes_are_not_run_by_one_alone(monkeypatch):
    monkeypatch.setattr("normlab.health.guard._world", lambda: 4)
    model, said = normlab.sync(net()).model, []
    with normlab.watch(model, batches=[x for x, _ in pairs(16)], say=said.append) as guard:
        guard.log(train=0.1, valid=1.0)
    assert "1, 4 would wait for other processes" in said[0]
    assert guard.diagnosis is None


def test_the_graph_behind_the_batches_is_not_kept():
    """A discriminator is given what a generator made."""
    generator, model = nn.Conv2d(1, 1, 3, padding=1), net()
    with normlab.watch(model, say=lambda text: None) as guard:
        made = generator(pairs(16)[0][0])
        model(made).sum().backward()
    ((kept,), _) = guard._kept[0]
    assert kept.grad_fn is None
    assert torch.equal(kept, made)
    assert generator.weight.grad is not None


def test_the_commands_of_a_guard_run_in_the_loop_that_it_watched():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, a, b=0):
            return self.norm(a) + b

    for arguments, expected in (({}, "(model, batches)"), ({"b": 1}, "(model, batches, forward=forward)")):
        model = Two()
        with normlab.watch(model, say=lambda text: None) as guard:
            model(pairs(16)[0][0] + 9, **arguments)
            model.norm.reset_running_stats()
            guard.log(train=0.1, valid=1.0)
        assert guard.diagnosis.findings[0].command == f"normlab.recalibrate{expected}"


def test_a_copy_of_the_model_is_not_watched():
    model, said = net(), []
    with normlab.watch(model, say=said.append):
        copy.deepcopy(model)(pairs(2)[0][0])
        assert said == []


def test_a_compiled_model_is_watched():
    model, said = net(), []
    compiled = torch.compile(model, backend="eager")
    with normlab.watch(compiled, say=said.append):
        for x, _ in pairs(2):
            compiled(x)
    assert len(said) == 1
    assert "a batch has 2 values a channel" in said[0]


def test_after_the_first_batch_one_call_before_and_one_after_the_model_are_left():
    model = net()
    with normlab.watch(model) as guard:
        for x, _ in pairs(64):
            model(x)
        assert hooks(model) == 2
        assert len(guard._kept) == 4


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_of_lightning_is_watched():
    lightning = pytest.importorskip("pytorch_lightning")
    from normlab.health.lightning import WatchCallback

    class Module(lightning.LightningModule):
        """Calls its net, and never itself."""

        def __init__(self):
            super().__init__()
            self.net = net()

        def training_step(self, batch, index):
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, index):
            self.log("val_loss", F.cross_entropy(self.net(batch[0] * 50 + 200), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module, said = Module(), []
    callback = WatchCallback(module, forward=lambda module, batch: module.net(batch[0]), say=said.append)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], max_epochs=2,
    )  # fmt: skip
    x, y = (torch.cat(parts) for parts in zip(*pairs(2), strict=True))
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=2)
    trainer.fit(module, batches, batches)
    assert said[0].startswith("net.4: a batch has 2 values a channel")
    assert "has parted" in said[1]
    assert callback.guard.diagnosis.output.batches == 4
    assert hooks(module) == 0


@pytest.mark.filterwarnings("ignore")
def test_losses_of_lightning_are_compared_per_batch_and_in_the_epoch_they_are_of():
    """Gradients of four batches make a step, and every second epoch is validated."""
    lightning = pytest.importorskip("pytorch_lightning")
    from normlab.health.lightning import WatchCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(()))

        def training_step(self, batch, index):
            return 1.0 / (1 + self.current_epoch) + 0 * self.weight

        def validation_step(self, batch, index):
            self.log("val_loss", torch.tensor(1.1 / (1 + self.current_epoch)))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module, said, logged = Module(), [], []
    callback = WatchCallback(module, batches=[torch.zeros(2, 1)], say=said.append)
    log = callback.guard.log
    callback.guard.log = lambda **losses: (logged.append(losses), log(**losses))
    batches = torch.utils.data.DataLoader(torch.zeros(8, 1), batch_size=1)
    lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], max_epochs=6, accumulate_grad_batches=4,
        check_val_every_n_epoch=2,
    ).fit(module, batches, batches)  # fmt: skip
    assert said == []
    assert [losses["train"] for losses in logged] == pytest.approx([1 / 2, 1 / 4, 1 / 6])
    assert [losses["valid"] for losses in logged] == pytest.approx([1.1 / 2, 1.1 / 4, 1.1 / 6])

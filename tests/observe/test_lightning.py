"""Activation statistics in Lightning's Trainer: its training batches, and nothing left behind."""

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

lightning = pytest.importorskip("pytorch_lightning")

from normlab.observe.lightning import ActivationStatsCallback  # noqa: E402


class Module(lightning.LightningModule):
    """Calls its net twice a batch, and never itself."""

    def __init__(self, fails: bool = False):
        super().__init__()
        self.net, self.fails = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)), fails

    def training_step(self, batch, index):
        if self.fails:
            raise ZeroDivisionError
        return (self.net(batch[:1]) + self.net(batch[1:])).mean()

    def validation_step(self, batch, index):
        self.net(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Module, stats: ActivationStatsCallback, **options) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[stats], **options,
    )  # fmt: skip
    batches = DataLoader(torch.ones(10, 2), batch_size=2)
    trainer.fit(module, batches, batches)


def hooks(module: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_records_its_training_batches_alone():
    module = Module()
    stats = ActivationStatsCallback(module, only="net.*", every=3)
    fit(module, stats, max_epochs=2, accumulate_grad_batches=2)
    assert stats.steps == [1, 4, 7, 10]
    assert list(stats.modules) == ["net.0", "net.1", "net.2"]
    assert stats.histograms["net.0"].sum(1).tolist() == [6] * 4
    assert stats.skipped == {}
    assert hooks(module) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_fails_closes_it():
    module = Module(fails=True)
    stats = ActivationStatsCallback(module)
    with pytest.raises(ZeroDivisionError):
        fit(module, stats, max_epochs=1)
    assert hooks(module) == 0
    module.fails = False
    fit(module, stats, max_steps=1, max_epochs=1)
    assert stats.steps == [1]

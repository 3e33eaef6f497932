"""The guard of a training as a callback of Lightning; needs `lightning` or `pytorch-lightning`."""

from collections.abc import Mapping
from typing import Any

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]

from .guard import Guard, watch


class WatchCallback(Callback):  # pyright: ignore[reportGeneralTypeIssues]
    """`normlab.watch` in a Trainer of Lightning, with either of its two packages.

        Trainer(callbacks=[WatchCallback(module, monitor="val_loss")]).fit(module, batches, others)

    The training loss is what `training_step` returns. The validation loss is what the module logs as `monitor`. Epochs
    without validation are passed over. The diagnosis calls the module with the first part of a batch: give `forward`
    where that is not how it is called.

    Args:
        module: the one that trains.
        monitor: the name under which it logs the validation loss.
        **options: see `watch`.

    Attributes:
        guard: what was said, and the diagnosis.
    """

    def __init__(self, module: Any, *, monitor: str = "val_loss", **options: Any):
        self.guard: Guard = watch(module, **options)
        self.monitor = monitor

    def on_train_epoch_start(self, *_: Any) -> None:
        """An epoch begins."""
        self.guard.begin_epoch()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, *_: Any) -> None:
        """A training batch begins."""
        self.guard.see(batch)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        """It is over."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if loss is not None:  # Lightning has divided it by the batches that make a step
            self.guard.add("train", loss * trainer.accumulate_grad_batches)
        self.guard.end()

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        """The loss of a validation is known."""
        if self.monitor in trainer.callback_metrics and not trainer.sanity_checking:
            self.guard.add("valid", trainer.callback_metrics[self.monitor])

    def on_train_epoch_end(self, *_: Any) -> None:
        """Both losses are known."""
        self.guard.after_epoch()

    def on_exception(self, *_: Any) -> None:
        """The training was broken off."""
        self.guard.end()

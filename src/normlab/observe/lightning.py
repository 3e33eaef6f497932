"""Activation statistics as a callback of Lightning; needs `lightning` or `pytorch-lightning`."""

from typing import Any

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
except ImportError:
    from pytorch_lightning import Callback  # pyright: ignore[reportMissingImports]

from .activations import ActivationStats


class ActivationStatsCallback(ActivationStats, Callback):  # pyright: ignore[reportGeneralTypeIssues]
    """`ActivationStats` that a Trainer of Lightning opens and closes, with either of its two packages.

        stats = ActivationStatsCallback(module)
        Trainer(callbacks=[stats]).fit(module, batches)
        plot_histograms(stats)

    It takes the same arguments.
    """

    def on_train_start(self, *_: Any) -> None:
        """Open."""
        self.begin_fit()

    def on_train_batch_start(self, *_: Any) -> None:
        """A training batch begins."""
        self._begin_batch()

    def on_train_batch_end(self, *_: Any) -> None:
        """It is over."""
        self._end_batch()

    def on_train_end(self, *_: Any) -> None:
        """Close."""
        self.after_fit()

    def on_exception(self, *_: Any) -> None:
        """Close, for the training was broken off."""
        self.after_fit()

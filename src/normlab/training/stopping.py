"""Callbacks that end a fit early."""

from typing import Any

import torch
from torch import Tensor

from .events import Callback, CancelTrain

# Steps between two looks at the losses: each look makes a GPU wait.
LOOK_EVERY = 32


class StopWhenDiverged(Callback):
    """Ends the fit when a training loss is not finite; it looks every 32 steps, and at the end of the epoch.

    Attributes:
        step: the first training step, from 1, whose loss was not finite; None while all were.
    """

    def begin_fit(self) -> None:
        self.step: int | None = None
        self._seen = 0
        self._losses: list[Tensor] = []

    def after_backward(self) -> None:
        self._losses.append(self.learner.loss)
        if len(self._losses) == LOOK_EVERY:
            self._look()

    def begin_validate(self) -> None:
        self._look()

    def after_epoch(self) -> None:
        self._look()

    def state_dict(self) -> dict[str, Any]:
        """The losses that were not looked at yet."""
        return {"seen": self._seen, "losses": self._losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._seen, self._losses = state["seen"], state["losses"]

    def _look(self) -> None:
        if self._losses:
            finite = torch.stack(self._losses).isfinite().tolist()
            if not all(finite):
                self.step = self._seen + finite.index(False) + 1
                raise CancelTrain
            self._seen += len(finite)
            self._losses = []

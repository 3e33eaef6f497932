"""Callbacks of the learner that change a model's norms while it trains, and that save it with its norm card."""

import json
import math
import warnings
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, check, is_real, is_whole
from ..files import write_whole
from ..training import EMA, Callback
from ..training.batches import split_batch
from ..training.callbacks import PREPARING
from ..training.history import check_metric, figures, flat
from ._card import with_card
from ._freeze import freeze
from ._recalibrate import recalibrate
from .build import is_frozen
from .report import Report


class FreezeNorms(Callback):
    """Freezes the norms with running statistics at a position of the fit; see `normlab.freeze`.

    From there on training sees the statistics that evaluation sees, and the weights settle on them. An `EMA` among the
    callbacks has its norms frozen too. The model stays so after the fit; `normlab.unfreeze` puts the norms back.

        callbacks=[Metrics(), FreezeNorms(at=0.75)]  # for the last quarter

    Args:
        at: the position, from 0 to 1 of all epochs.
        affine: freeze γ and β too.
        **options: of `freeze`: `only`, `skip`.

    Attributes:
        report: of every norm; None before.

    Raises:
        InputError: an argument cannot be used; in `fit`, a choice meets no norm.
    """

    order = 1

    def __init__(self, at: float = 0.75, affine: bool = True, **options: Any):
        check(is_real(at) and 0 <= at <= 1, "at", at, "a number from 0 to 1, a share of the fit")
        self.at, self._freeze = at, partial(freeze, affine=affine, inplace=True, **options)
        self.report: Report | None = None

    def begin_fit(self) -> None:
        self._frozen = False

    def begin_batch(self) -> None:
        learner = self.learner
        whole = not learner.gradients.samples  # not between the batches of one step
        if learner.training and not self._frozen and whole and learner.position >= self.at * learner.num_epochs:
            learner.ranks.average(learner.model)  # of processes each has statistics of its own
            self._freeze_in(learner)
            for one in learner.callbacks:
                if isinstance(one, EMA) and one.average is not None:
                    one.average.module = self._freeze(one.model).model

    def state_dict(self) -> dict[str, Any]:
        """Whether they are frozen."""
        return {"frozen": self._frozen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._frozen = state["frozen"]

    def prepare_model(self, learner: Any, state: dict[str, Any]) -> None:
        """Freeze the norms of a model that the weights of a saved state are for."""
        if state["frozen"]:
            self._freeze_in(learner)

    def _freeze_in(self, learner: Any) -> None:
        operation = self._freeze(learner.model)
        learner.model, self.report, self._frozen = operation.model, operation.report, True
        if not any(map(is_frozen, learner.model.modules())):
            warnings.warn("FreezeNorms: the model has no norm with running statistics.", stacklevel=2)


class Recalibrate(Callback):
    """Measures the statistics of norms anew before each validation; see `normlab.recalibrate`.

    Metrics and what `SaveBest` saves are then of those. With an `EMA` it is the average that is measured. Without, the
    trained model goes on with these statistics, which a norm that uses them in training, such as `running`, then sees.

        callbacks=[Metrics(), Recalibrate([(x, y) for x, y in few_batches])]

    Args:
        batches: as the learner's; they can be gone through again. `ToDevice`, `ChannelsLast` and `TransformInputs`
            among the callbacks make of them what training does.
        **options: of `recalibrate`: `only`, `skip`, `mask`, `forward`.

    Attributes:
        report: of the last time; None before.

    Raises:
        InputError: an argument cannot be used; in `fit`, there is no validation.
    """

    order = 30  # after an EMA has put the average in the model's place

    def __init__(self, batches: Iterable[Any], **options: Any):
        usable = isinstance(batches, Iterable) and not isinstance(batches, Iterator | Tensor | dict | str)
        check(usable, "batches", type(batches).__name__, "batches that can be gone through again: a list, a loader")
        self.batches, self.options = batches, options
        self.report: Report | None = None

    def begin_fit(self) -> None:
        cure = "Call normlab.recalibrate(model, batches) after the fit."
        check(self.learner.valid is not None, "valid", None, "batches to validate on, with Recalibrate", cure)

    def begin_validate(self) -> None:
        options = {"forward": self._forward, **self.options}
        self.report = recalibrate(self.learner.model, self.batches, **options).report
        self.learner.ranks.average(self.learner.model)  # a loader may give each process another order

    def _forward(self, model: nn.Module, batch: Any) -> Any:
        learner = self.learner
        learner.inputs, learner.targets = (batch, None) if isinstance(batch, Tensor) else split_batch(batch)
        for one in sorted(learner.callbacks, key=lambda one: one.order):
            if isinstance(one, PREPARING):
                one.begin_batch()
        return model(learner.inputs)


class SaveBest(Callback):
    """Saves the weights of the best epochs by a figure of the history, and of the last, with the norm card.

    The files are `epoch-003.safetensors`, of epoch 3, and `last.safetensors`; `normlab.check_card` says whether the
    norms of a model fit one. With an `EMA` they hold the average, as that is what was validated. If the disk is full
    the fit goes on with a warning.

        best = SaveBest("run", "valid.dice", "max", keep=3)
        Learner(model, train, valid, optimizer=optimizer, callbacks=[Metrics(dice=dice), best]).fit(10)
        best.path  # of the best of all

    Args:
        folder: where to; one a fit.
        metric: of the history: the part and the figure's name, as `valid.loss`.
        mode: "min" where less is better, "max" where more is.
        keep: how many of the best.

    Raises:
        InputError: an argument cannot be used; in `fit`, the history has no such figure.
    """

    order = 15  # after what fills the history, before EMA puts the model back

    def __init__(self, folder: str | Path, metric: str = "valid.loss", mode: str = "min", keep: int = 1):
        check(isinstance(folder, str | Path), "folder", folder, "a path")
        check_metric(metric, mode)
        check(is_whole(keep, 1), "keep", keep, "a whole number from 1")
        self.folder, self.metric, self.mode, self.keep = Path(folder), metric, mode, keep
        self._best: list[int] = []

    @property
    def path(self) -> Path:
        """Of the best.

        Raises:
            InputError: nothing was saved.
        """
        if not self._best:
            raise InputError(f"SaveBest: no epoch with a finite {self.metric} yet. Call it after learner.fit().")
        return self._path(self._best[0])

    def begin_fit(self) -> None:
        self._best = []

    def after_epoch(self) -> None:
        history = self.learner.history
        sign = 1 if self.mode == "min" else -1
        values = {epoch: sign * value for epoch, value in enumerate(figures(history, self.metric, "SaveBest"), 1)}
        ranked = sorted((epoch for epoch in values if math.isfinite(values[epoch])), key=values.__getitem__)
        self._best, others = ranked[: self.keep], ranked[self.keep :]
        if self.learner.ranks.rank == 0:
            self._write(len(history), others)

    def _write(self, epoch: int, others: list[int]) -> None:
        """The last epoch; those that are no longer among the best go."""
        figures_of_epoch = json.dumps(flat(self.learner.history[-1]))
        content = with_card(self.learner.model, {"normlab.figures": figures_of_epoch})
        paths = [self.folder / "last.safetensors", *([self._path(epoch)] if epoch in self._best else [])]
        try:
            for path in paths:
                write_whole(path, content)
        except InputError as error:
            warnings.warn(str(error), stacklevel=2)
            return
        for other in others:
            self._path(other).unlink(missing_ok=True)

    def _path(self, epoch: int) -> Path:
        return self.folder / f"epoch-{epoch:03d}.safetensors"

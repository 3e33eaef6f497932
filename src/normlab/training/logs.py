"""Figures of a fit in files, in TensorBoard, in Weights & Biases: an epoch's, and those of every so many steps."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

from ..errors import InputError, check, is_whole
from ..files import write_whole
from .events import Callback
from .history import flat


class Log(Callback):
    """Base of what keeps figures: a row of `learner.history` an epoch, loss and learning rate every so many steps.

    Args:
        every: steps of the optimizer from one to the next; None for none.

    Raises:
        InputError: an argument cannot be used; in `fit`, the history is empty.
    """

    order = 10  # after what fills the history

    def __init__(self, every: int | None = None):
        check(every is None or is_whole(every, 1), "every", every, "a whole number from 1, or None")
        self.every = every

    def after_step(self) -> None:
        learner = self.learner
        if self.every is not None and learner.step % self.every == 0 and learner.ranks.rank == 0:
            lrs = [group["lr"] for optimizer in learner.optimizers for group in optimizer.param_groups]
            named = {"lr": lrs[0]} if len(lrs) == 1 else {f"lr.{number}": lr for number, lr in enumerate(lrs)}
            self._add_step({"loss": float(learner.loss), **{name: float(lr) for name, lr in named.items()}})

    def after_epoch(self) -> None:
        if not self.learner.history:
            raise InputError(f"{type(self).__name__}: the history is empty. Put Metrics() among the callbacks.")
        if self.learner.ranks.rank == 0:
            self._add_epoch(self.learner.history[-1])

    def _add_step(self, figures: dict[str, float]) -> None:
        raise NotImplementedError

    def _add_epoch(self, row: dict[str, Any]) -> None:
        raise NotImplementedError


class LogCSV(Log):
    """Writes a table of epochs, and one of steps if asked for, as comma-separated values.

    `log.csv` has the columns epoch, train.loss, valid.loss, … and seconds; `log.steps.csv` step, epoch, loss and lr.
    Each fit begins them anew; one that goes on from a checkpoint goes on with them.

    Args:
        path: of the table of epochs.
        every: steps between two rows of the other; None for none.
    """

    def __init__(self, path: str | Path, every: int | None = None):
        super().__init__(every)
        self.path = _checked(path)
        self._steps = Lines(self.path.with_name(f"{self.path.stem}.steps{self.path.suffix}"))

    def begin_fit(self) -> None:
        self._steps.length = 0

    def state_dict(self) -> dict[str, Any]:
        """The length of the table of steps."""
        return {"length": self._steps.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._steps.length = state["length"]

    def _add_step(self, figures: dict[str, float]) -> None:
        row = {"step": self.learner.step, "epoch": self.learner.epoch + 1, **figures}
        self._steps.add(_table([row], heading=self._steps.length == 0))

    def _add_epoch(self, row: dict[str, Any]) -> None:
        write_whole(self.path, _table([flat(one) for one in self.learner.history]).encode())


class LogJSON(Log):
    """Writes a line of JSON an epoch, and every so many steps if asked for.

        {"step": 50, "epoch": 1, "loss": 0.5, "lr": 0.1}
        {"step": 100, "epoch": 1, "train": {"loss": 0.6}, "seconds": 2.1}

    What is not finite is null. Each fit begins the file anew; one that goes on from a checkpoint goes on with it.

    Args:
        path: of the file.
        every: steps between two lines; None for none.
    """

    def __init__(self, path: str | Path, every: int | None = None):
        super().__init__(every)
        self.path = _checked(path)
        self._lines = Lines(self.path)

    def begin_fit(self) -> None:
        self._lines.length = 0

    def state_dict(self) -> dict[str, Any]:
        """The length of the file."""
        return {"length": self._lines.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._lines.length = state["length"]

    def _add_step(self, figures: dict[str, float]) -> None:
        self._add({"step": self.learner.step, "epoch": self.learner.epoch + 1, **figures})

    def _add_epoch(self, row: dict[str, Any]) -> None:
        self._add({"step": self.learner.step, **row})

    def _add(self, row: dict[str, Any]) -> None:
        self._lines.add(json.dumps(_finite(row), allow_nan=False) + "\n")


class LogTensorBoard(Log):
    """Writes for TensorBoard; it needs the package `tensorboard`. Look at it with `tensorboard --logdir folder`.

    A fit that goes on from a checkpoint hides what was written after that.

    Args:
        folder: where to; one a fit.
        every: steps between two points of loss and learning rate; None for none.

    Raises:
        InputError: the package is not there.
    """

    def __init__(self, folder: str | Path, every: int | None = None):
        super().__init__(every)
        self.folder = _checked(folder)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError("LogTensorBoard needs tensorboard, which is not installed. Install it by pip.") from error
        self._new, self._writer = SummaryWriter, None

    def after_fit(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def _add_step(self, figures: dict[str, float]) -> None:
        self._add(figures)

    def _add_epoch(self, row: dict[str, Any]) -> None:
        self._add(flat(row))

    def _add(self, figures: dict[str, float]) -> None:
        if self._writer is None:
            self._writer = self._new(str(self.folder), purge_step=self.learner.step)
        for name, figure in _with_slashes(figures).items():
            self._writer.add_scalar(name, figure, self.learner.step)


class LogWandb(Log):
    """Gives the figures to a run of Weights & Biases, or of what has the same `run.log(figures, step=…)`, as trackio.

        run = wandb.init(project="norms")  # or trackio.init(project="norms")
        callbacks=[Metrics(), LogWandb(run, every=50)]

    Args:
        run: what `init` gave; it is not finished at the end of the fit.
        every: steps between two points of loss and learning rate; None for none.

    Raises:
        InputError: it is no run.
    """

    def __init__(self, run: Any, every: int | None = None):
        super().__init__(every)
        known = callable(getattr(run, "log", None)) and not isinstance(run, type)
        check(known, "run", run, "a run with log(figures, step=…)", "Write wandb.init(project=…).")
        self.run = run

    def _add_step(self, figures: dict[str, float]) -> None:
        self.run.log(_with_slashes(figures), step=self.learner.step)

    def _add_epoch(self, row: dict[str, Any]) -> None:
        self.run.log(_with_slashes(flat(row)), step=self.learner.step)


class Lines:
    """A file that text is added to. What stands behind its known length is cut off: it is from a fit that was killed.

    Attributes:
        length: in bytes; 0 begins the file anew.
    """

    def __init__(self, path: Path):
        self.path, self.length = path, 0

    def add(self, text: str) -> None:
        """Write it at the end.

        Raises:
            InputError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
            with self.path.open("r+b") as file:
                self.length = file.truncate(min(self.length, self.path.stat().st_size))
                file.seek(self.length)
                self.length += file.write(text.encode())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Choose another folder.") from error


def _table(rows: list[dict[str, Any]], heading: bool = True) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if heading:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _with_slashes(figures: dict[str, Any]) -> dict[str, Any]:
    """The names as both programs group them: `train/loss`."""
    return {name.replace(".", "/"): figure for name, figure in figures.items()}


def _checked(path: Any) -> Path:
    check(isinstance(path, str | Path), "path", path, "a path")
    return Path(path)

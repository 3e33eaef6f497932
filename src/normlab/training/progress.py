"""How far a fit is: a bar on a terminal, plain lines elsewhere."""

import random
import time

# rich draws a number when it is imported, and a training that imports this room shall draw what it drew without.
_drawn = random.getstate()
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

random.setstate(_drawn)
from ..errors import check  # noqa: E402
from .events import Callback  # noqa: E402

BAR_SECONDS = 0.1
LINE_SECONDS = 30.0


class ShowProgress(Callback):
    """Shows the batches done with the time left, and after each epoch the newest row of `learner.history`.

    On a terminal a bar that goes away; elsewhere a line every half minute.

    Args:
        console: where to; standard output by default.
    """

    order = 10  # after the callbacks that fill the history

    def __init__(self, console: Console | None = None):
        fits = console is None or isinstance(console, Console)
        check(fits, "ShowProgress: console", console, "a rich.console.Console", "Write Console(file=…).")
        self.console = console or Console()
        self._out = self.console
        self._bar: Progress | None = None

    def begin_fit(self) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        self._out = self.console if self.learner.ranks.rank == 0 else Console(quiet=True)
        self._bar = Progress(*columns, console=self._out, transient=True) if self._out.is_terminal else None
        if self._bar:
            self._task = self._bar.add_task("", total=None)
            self._bar.start()
        self._next = time.monotonic() + (BAR_SECONDS if self._bar else LINE_SECONDS)

    def begin_epoch(self) -> None:
        self._begin_part("train")

    def begin_validate(self) -> None:
        self._begin_part("valid")

    def after_batch(self) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        learner = self.learner
        if self._bar:
            self._bar.update(self._task, completed=learner.batch + 1, total=learner.num_batches)
            self._next = now + BAR_SECONDS
        else:
            total = f" of {learner.num_batches}" if learner.num_batches else ""
            self._out.print(
                f"{self._part}: batch {learner.batch + 1}{total}, loss {float(learner.loss):.4f}", soft_wrap=True
            )
            self._next = now + LINE_SECONDS

    def after_epoch(self) -> None:
        if self.learner.history:
            row = self.learner.history[-1]
            parts = "  ".join(
                f"{part}: " + ", ".join(f"{name} {value:.4f}" for name, value in row[part].items())
                for part in ("train", "valid")
                if part in row
            )
            self._out.print(f"epoch {row['epoch']}  {parts}  ({row['seconds']:.1f} s)", highlight=False, soft_wrap=True)

    def after_fit(self) -> None:
        if self._bar:
            self._bar.stop()

    def _begin_part(self, part: str) -> None:
        learner = self.learner
        self._part = f"epoch {learner.epoch + 1}/{learner.num_epochs} {part}"
        if self._bar:
            self._bar.reset(self._task, description=self._part, total=None)

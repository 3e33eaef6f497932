"""What an executor is given: jobs, one after the other, from a queue that hears how they go and keeps the records."""

import heapq
import itertools
import json
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..training import Callback
from .display import Display
from .interrupts import HeldCtrlC
from .record import Record
from .stopping import Rounds, Step
from .store import RunStore

TELL_SECONDS = 0.2
RETRIES = 3  # of a run whose process was killed


@dataclass(frozen=True)
class Job:
    """A run to be made, perhaps in another process or on another machine.

    Attributes:
        key: names it in the store.
        label: one line for people.
        cost: an estimate in any unit. The dearest job begins first, and the time left is reckoned by it.
        run: a function of a module, or a partial of one, that takes a callback and returns the record.
        settings: for the record if the run fails.
    """

    key: str
    label: str
    cost: float
    run: Callable[[Callback], Record]
    settings: dict[str, Any]


class JobQueue:
    """The jobs that wait, the dearest first. It hears from an executor how they go, and alone writes to the store.

    Args:
        jobs: in any order.
        store: of the records.
        display: shows how far the jobs are.
        ctrl_c: is raised by `take` and `check`.
        rounds: says which jobs may begin, and which are never made; None where all may begin at once.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        store: RunStore,
        display: Display,
        ctrl_c: HeldCtrlC,
        rounds: Rounds | None = None,
    ):
        self.store, self.display, self.ctrl_c, self._rounds = store, display, ctrl_c, rounds
        self._held: dict[str, Job] = {} if rounds is None else {job.key: job for job in jobs}
        self._waiting: list[tuple[bool, float, int, Job]] = []  # those that were lost last, then the dearest first
        self._numbers = itertools.count()
        self._losses: Counter[str] = Counter()
        for job in jobs if rounds is None else ():
            self._push(job)
        if rounds is not None:
            self._follow(rounds.first)

    def take(self) -> Job | None:
        """The next job, which no longer waits; None if there is none now.

        Later there may be one again: a job that was lost, or one that had to wait for the end of another.
        """
        self.ctrl_c.check()
        return heapq.heappop(self._waiting)[-1] if self._waiting else None

    def begin(self, job: Job, where: str) -> None:
        """The job has begun, here: `process 1234`, say, or the name of a machine.

        Raises:
            InputError: that cannot be written.
        """
        self.store.start(job.key, where)
        self.display.begin(job, where)

    def tell(self, job: Job, share: float) -> None:
        """So much of the job is done, from 0 to 1."""
        self.display.tell(job, share)

    def end(self, job: Job, record: Record) -> None:
        """The job has ended, and its record is kept.

        Raises:
            InputError: the record cannot be written.
        """
        self._keep(job, record)
        if self._rounds is not None:
            self._follow(self._rounds.end(record))

    def lose(self, job: Job, why: str) -> None:
        """The process of the job is gone: the job comes last, when there may be more memory; or has failed by now.

        Args:
            job: that had begun.
            why: as in "its process was killed by SIGKILL".
        """
        self._losses[job.key] += 1
        if self._losses[job.key] > RETRIES:
            error = f"The run was lost {self._losses[job.key]} times; the last time {why}."
            self.end(job, Record(job.key, job.settings, "failed", error=error))
        else:
            self.display.lose(job, why)
            self._push(job, lost=True)

    def _push(self, job: Job, lost: bool = False) -> None:
        heapq.heappush(self._waiting, (lost, 0.0 if lost else -job.cost, next(self._numbers), job))

    def _keep(self, job: Job, record: Record) -> None:
        self.store.append(record)
        self.display.end(job, record)

    def _follow(self, step: Step) -> None:
        """Let the jobs wait that may begin now, and keep the records of those that are never made."""
        for record in step.stopped:
            if record.key in self._held:
                self._keep(self._held.pop(record.key), record)
        for key in step.ready:
            self._push(self._held.pop(key))


class Executor(Protocol):
    """Makes the runs of a study, somewhere.

    Attributes:
        threads: of each run. Results are the same, bit for bit, for one number of threads on one kind of machine.
    """

    threads: int

    def run(self, queue: JobQueue) -> None:
        """Take jobs until there are none, and tell the queue of each that it began, and that it ended or was lost.

        Where the queue has none, ask again once a run that is on the way has ended.

        It leaves no process behind, whatever is raised: KeyboardInterrupt, or an InputError of the store.
        """
        ...


class Tell(Callback):
    """Tells how far a run is, at most every `seconds`.

    Args:
        tell: is called with the share that is done.
        seconds: between two calls.
    """

    order = 20

    def __init__(self, tell: Callable[[float], object], seconds: float = TELL_SECONDS):
        self._tell, self._seconds, self._next = tell, seconds, 0.0

    def after_batch(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + self._seconds
            self._tell(self.learner.position / self.learner.num_epochs)


def attempt(key: str, settings: dict[str, Any], make: Callable[[], Record]) -> Record:
    """The record that `make` gives; or, if it raises an error, one of the status `failed`."""
    try:
        record = make()
        json.dumps(record.to_json())  # what cannot be written must not end the other runs
        return record
    except (Exception, SystemExit) as error:
        message = f"{type(error).__name__}: {error}"
        return Record(key, settings, "failed", error=message, traceback=_traceback(error))


def _traceback(error: BaseException) -> str:
    """The traceback. Each path is cut to its last three parts, since records go to other machines."""
    told = traceback.TracebackException.from_exception(error)
    one: traceback.TracebackException | None = told
    while one is not None:
        for frame in one.stack:
            frame.filename = "/".join(Path(frame.filename).parts[-3:])
        one = one.__cause__ or one.__context__
    return "".join(told.format())

"""Runs jobs in several processes, keeps each result as it comes, and shows how far they are."""

import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import InputError, check, is_whole
from ..training import Callback
from .record import Record
from .store import RunStore

TELL_SECONDS = 0.2
LINE_SECONDS = 20.0


@dataclass(frozen=True)
class Job:
    """A run to be made in another process.

    Attributes:
        key: names it in the store.
        label: one line for people.
        cost: an estimate in any unit. The dearest job begins first, and the time left is reckoned by it.
        run: a function of the module, or a partial of one, that takes a callback and returns the record.
        settings: for the record if the run fails.
    """

    key: str
    label: str
    cost: float
    run: Callable[[Callback], Record]
    settings: dict[str, Any]


def run_jobs(jobs: Sequence[Job], store: RunStore, workers: int, console: Console) -> None:
    """Run the jobs that `store` does not hold yet in `workers` processes, adding each record as it ends.

    Each process uses its share of the cores, but no more threads than the variable OMP_NUM_THREADS says.

    An error in a job becomes a record of the status `failed`. Ctrl-C ends the runs that are on the way, and comes
    through as KeyboardInterrupt. These runs are lost; what has ended is kept.

    Raises:
        InputError: a worker process was killed from outside.
    """
    check(is_whole(workers, 1), "workers", workers, "a whole number from 1")
    jobs = sorted(jobs, key=lambda job: -job.cost)
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    told, stop = context.Queue(), context.Event()
    threads = threads_of_each(workers)
    with (
        _display(jobs, console) as display,
        _single_threaded_start(threads),
        ProcessPoolExecutor(min(workers, len(jobs)), context, _prepare_worker, (told, stop, threads)) as pool,
    ):
        pending: dict[Future[Record | None], Job] = {pool.submit(_work, job): job for job in jobs}
        try:
            while pending:
                ended, _ = wait(pending, timeout=TELL_SECONDS, return_when=FIRST_COMPLETED)
                for future in ended:
                    job, record = pending.pop(future), future.result()
                    if record is not None:
                        store.append(record)
                        display.end(job, record)
                display.update(_drain(told))
        except BrokenProcessPool as error:
            raise InputError(
                "A worker process was killed, perhaps for lack of memory. Run again with fewer workers to go on."
            ) from error
        except KeyboardInterrupt:
            stop.set()
            for future in pending:
                future.cancel()
            raise


def threads_of_each(workers: int) -> int:
    """The cores divided among the workers; no more than the variable OMP_NUM_THREADS says, if it is set."""
    share = max(1, (os.cpu_count() or 1) // workers)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # further ones are of nested regions
    return min(share, int(asked)) if asked.isdecimal() and int(asked) else share


class _Tell(Callback):
    """In a worker: tells the parent how far the run is, and ends it when the parent says so."""

    order = 20

    def __init__(self, key: str):
        self.key, self._next = key, 0.0

    def after_batch(self) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + TELL_SECONDS
            if _stop.is_set():
                raise _Stopped
            _told.put((self.key, self.learner.position / self.learner.num_epochs))


class _Stopped(Exception):
    pass


def _prepare_worker(told: Any, stop: Any, threads: int) -> None:
    global _told, _stop
    _told, _stop = told, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and says stop
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for its next job for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: Job) -> Record | None:
    try:
        return job.run(_Tell(job.key))
    except _Stopped:
        return None
    except Exception as error:  # whatever it is, the other runs go on and the table says so
        message = f"{type(error).__name__}: {error}"
        return Record(job.key, job.settings, "failed", error=message, traceback=_traceback(error))


def _traceback(error: Exception) -> str:
    """The traceback. Each path is cut to its last three parts, since records go to other machines."""
    told = traceback.TracebackException.from_exception(error)
    one: traceback.TracebackException | None = told
    while one is not None:
        for frame in one.stack:
            frame.filename = "/".join(Path(frame.filename).parts[-3:])
        one = one.__cause__ or one.__context__
    return "".join(told.format())


def _drain(told: Any) -> dict[str, float]:
    """The latest word of each running job."""
    latest: dict[str, float] = {}
    while True:
        try:
            key, share = told.get_nowait()
        except queue.Empty:
            return latest
        latest[key] = share


@contextmanager
def _single_threaded_start(threads: int):
    """Workers inherit how many threads OpenMP may start: they must not all start one a core."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


class _Display:
    """Says how far all the jobs are: a line for each that ends; in between it is up to `_show`."""

    def __init__(self, jobs: Sequence[Job], console: Console):
        self.console, self._costs = console, {job.key: job.cost for job in jobs}
        self._shares = dict.fromkeys(self._costs, 0.0)
        self._ended: set[str] = set()

    def end(self, job: Job, record: Record) -> None:
        if record.status != "finished":  # it stopped early: count what it did as all it had to do
            self._costs[job.key] *= self._shares[job.key]
        self._shares[job.key] = 1.0
        self._ended.add(job.key)
        self.console.print(f"{job.label}  {_outcome(record)}", highlight=False, soft_wrap=True)

    def update(self, shares: dict[str, float]) -> None:
        self._shares.update({key: share for key, share in shares.items() if key not in self._ended})
        done = sum(cost * self._shares[key] for key, cost in self._costs.items())
        self._show(f"{len(self._ended)} of {len(self._costs)} runs", done / (sum(self._costs.values()) or 1.0))

    def _show(self, text: str, share: float) -> None:
        raise NotImplementedError


class _Lines(_Display):
    """For a log: a line every so often."""

    def __init__(self, jobs: Sequence[Job], console: Console):
        super().__init__(jobs, console)
        self._start = time.monotonic()
        self._next = self._start + LINE_SECONDS

    def _show(self, text: str, share: float) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        self._next, spent = now + LINE_SECONDS, now - self._start
        left = f", about {spent / share - spent:.0f} s left" if share > 0.02 else ""
        self.console.print(f"{text}, {share:.0%}, {spent:.0f} s{left}", highlight=False, soft_wrap=True)


class _Bar(_Display):
    """For a terminal: a bar at the bottom, with the time left."""

    def __init__(self, jobs: Sequence[Job], console: Console, bar: Progress):
        super().__init__(jobs, console)
        self._bar, self._task = bar, bar.add_task("", total=1.0)

    def _show(self, text: str, share: float) -> None:
        self._bar.update(self._task, completed=share, description=text)


@contextmanager
def _display(jobs: Sequence[Job], console: Console) -> Iterator[_Display]:
    if not console.is_terminal:
        yield _Lines(jobs, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, speed_estimate_period=120) as bar:
        yield _Bar(jobs, console, bar)


def _outcome(record: Record) -> str:
    if record.status == "failed":
        return f"failed: {record.error}"
    if record.status == "diverged":
        return f"diverged at step {record.diverged_at_step}"
    result = f"no {record.metric}" if record.result is None else f"{record.result:.4f}"
    return f"{result}  ({record.seconds:.0f} s)"

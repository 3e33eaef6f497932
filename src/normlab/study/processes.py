"""Makes the runs of a study in several processes on this machine."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import torch

from ..errors import InputError, check, is_whole
from .jobs import TELL_SECONDS, Job, JobQueue, Tell, attempt
from .record import Record

END_SECONDS = 5.0
READY = "ready"
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class ProcessExecutor:
    """Makes runs in processes, which are kept for the next runs. A run whose process is killed is made again.

    Args:
        workers: processes; as many as there are cores if None.
        threads: of each process; a share of the cores if None, but no more than OMP_NUM_THREADS says.
    """

    def __init__(self, workers: int | None = None, threads: int | None = None):
        workers = granted_cores() if workers is None else workers
        check(is_whole(workers, 1), "workers", workers, "a whole number from 1")
        check(threads is None or is_whole(threads, 1), "threads", threads, "a whole number from 1, or None")
        self.workers, self.threads = workers, threads_of_each(workers) if threads is None else threads

    def run(self, queue: JobQueue) -> None:
        """See `Executor`.

        Raises:
            InputError: a process cannot start.
        """
        workers: list[_Worker] = []
        try:
            self._run(queue, workers)
            for worker in workers:
                worker.end()
        finally:
            for worker in workers:
                worker.kill()

    def _run(self, queue: JobQueue, workers: list["_Worker"]) -> None:
        while True:
            while sum(worker.job is not None for worker in workers) < self.workers and (job := queue.take()):
                worker = next((one for one in workers if one.job is None), None)
                if worker is None:
                    worker = _Worker(self.threads)
                    workers.append(worker)
                worker.give(job, queue)
            busy = [worker for worker in workers if worker.job is not None]
            if not busy:
                return
            connection.wait([one for worker in busy for one in worker.signs], TELL_SECONDS)
            queue.ctrl_c.check()
            for worker in busy:
                if not worker.report(queue):
                    worker.kill()
                    workers.remove(worker)


class _Worker:
    """A process that makes one run after the other, and the job it is at."""

    def __init__(self, threads: int):
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, threads))
        self.job: Job | None = None
        self._ready = False
        with _inherited(threads):
            self.process.start()
        other.close()

    @property
    def signs(self) -> list[Connection | int]:
        """What becomes readable when there is news."""
        return [self.pipe, self.process.sentinel]

    def give(self, job: Job, queue: JobQueue) -> None:
        """Let it make the run."""
        queue.begin(job, f"process {self.process.pid}")
        self.job = job
        try:
            run = ForkingPickler.dumps(job.run)
        except Exception as error:  # pickle raises many kinds
            self._end(queue, attempt(job.key, job.settings, lambda error=error: _raise(error)))
            return
        with suppress(OSError):  # it is dead, which `report` finds
            self.pipe.send((job.key, job.settings, bytes(run)))

    def report(self, queue: JobQueue) -> bool:
        """Tell the queue what it has said since; False if the process is gone, and its job lost."""
        alive = self.process.exitcode is None
        try:
            while self.job is not None and self.pipe.poll():
                self._hear(self.pipe.recv(), queue)
        except (EOFError, OSError):
            alive = False
        if not alive:
            self.process.join(END_SECONDS)
            code = self.process.exitcode or 0
            if code > 0 and not self._ready:
                raise InputError(
                    f"A worker process could not start, it ended with exit code {code}; what it said is above. "
                    'Call a study in a script under if __name__ == "__main__".'
                )
            if self.job is not None:
                queue.lose(self.job, _way_to_end(code))
        return alive

    def _hear(self, said: str | float | Record, queue: JobQueue) -> None:
        assert self.job is not None
        if said == READY:
            self._ready = True
        elif isinstance(said, Record):
            self._end(queue, said)
        else:
            queue.tell(self.job, float(said))

    def _end(self, queue: JobQueue, record: Record) -> None:
        assert self.job is not None
        job, self.job = self.job, None
        queue.end(job, record)

    def end(self) -> None:
        """It has nothing to do any more, and ends by itself."""
        self.pipe.close()
        self.process.join(END_SECONDS)

    def kill(self) -> None:
        """End it, at whatever it is."""
        self.process.kill()
        self.process.join(END_SECONDS)
        self.pipe.close()


def _serve(pipe: Connection, threads: int) -> None:
    """In a worker: makes the runs that come through the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver hears Ctrl-C, and kills
    threading.Thread(target=_die_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tell = Tell(pipe.send)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the driver has ended
        pipe.send(READY)
        while True:
            key, settings, run = pipe.recv()
            pipe.send(attempt(key, settings, lambda run=run: pickle.loads(run)(tell)))


def _die_with_parent() -> None:
    """A worker whose parent was killed would go on with its run."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _inherited(threads: int) -> Iterator[None]:
    """Inside, a process that starts takes over how many threads OpenMP may start, and does not hear Ctrl-C."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    posix = sys.platform != "win32"
    if posix:
        resource_tracker.ensure_running()  # its start would undo the next line
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if posix:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _way_to_end(code: int) -> str:
    if code >= 0:
        return f"its process ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"its process was ended by {name}" + (", perhaps for lack of memory" if name == "SIGKILL" else "")


def _raise(error: Exception) -> Record:
    raise error


def threads_of_each(workers: int) -> int:
    """The cores divided among the workers; no more than the variable OMP_NUM_THREADS says, if it is set."""
    share = max(1, granted_cores() // workers)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # further ones are of nested regions
    return min(share, int(asked)) if asked.isdecimal() and int(asked) else share


def granted_cores() -> int:
    """The cores that this process may use: those of its affinity, and no more than the quota of its container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *_quotas()]))


def _quotas() -> Iterator[int]:
    """What control groups grant, in whole cores: that of this process, and those that it is in."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, files = CGROUPS, ("cpu.max",)
        elif "cpu" in controllers.split(","):
            root, files = CGROUPS / controllers, ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        else:
            continue
        group = Path(path.lstrip("/"))
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # not there, or "max"
                quota, period = map(int, " ".join((root / folder / file).read_text() for file in files).split())
                if quota > 0:
                    yield -(-quota // period)

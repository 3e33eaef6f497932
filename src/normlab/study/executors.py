"""Makes the runs of a study in this process, in several, or on other machines, and keeps each record as it comes."""

from collections.abc import Sequence

from rich.console import Console

from ..errors import check, unknown
from .clusters import RayExecutor, SlurmExecutor
from .display import show
from .interrupts import HeldCtrlC
from .jobs import Executor, Job, JobQueue, Tell, attempt
from .processes import ProcessExecutor, threads_of_each
from .stopping import Rounds
from .store import RunStore
from .tasks import torch_threads

__all__ = ["EXECUTORS", "Executor", "HereExecutor", "Job", "make_executor", "run_jobs"]


class HereExecutor:
    """Makes one run after the other in this process, where a debugger and a print reach them.

    Args:
        threads: of each run; as many as there are cores if None, but no more than OMP_NUM_THREADS says.
    """

    def __init__(self, threads: int | None = None):
        self.threads = threads_of_each(1) if threads is None else threads

    def run(self, queue: JobQueue) -> None:
        """See `Executor`."""
        with torch_threads(self.threads):
            while (job := queue.take()) is not None:
                queue.begin(job, "here")
                with queue.ctrl_c.at_once():
                    record = _run(job, queue)
                queue.end(job, record)


def _run(job: Job, queue: JobQueue):
    tell = Tell(lambda share: queue.tell(job, share))
    return attempt(job.key, job.settings, lambda: job.run(tell))


def run_jobs(
    jobs: Sequence[Job], store: RunStore, executor: Executor | int, console: Console, rounds: Rounds | None = None
) -> None:
    """Make the runs of `jobs` and add the record of each to `store` as it ends.

    An error in a run becomes a record of the status `failed`. A run whose process is killed is made again, three
    times at most. Ctrl-C ends the runs that are on the way; these are lost, what has ended is kept.

    Args:
        jobs: the store must not hold them yet.
        store: of the records.
        executor: makes the runs; a number is that of processes on this machine.
        console: for the progress.
        rounds: of the trials of the jobs, where settings that are clearly beaten are stopped.

    Raises:
        InputError: a record cannot be written, which ends all runs at once; or no process can be started.
        KeyboardInterrupt: Ctrl-C.
    """
    executor = ProcessExecutor(executor) if isinstance(executor, int) else executor
    if jobs:
        with HeldCtrlC() as ctrl_c, show(jobs, console) as display:
            executor.run(JobQueue(jobs, store, display, ctrl_c, rounds))


EXECUTORS = ("here", "processes", "ray", "slurm")


def make_executor(name: str, workers: int | None = None, threads: int | None = None) -> Executor:
    """The executor of a name.

    Args:
        name: one of `EXECUTORS`. Behind a colon, `ray` may have the address of the cluster: `ray:10.0.0.1:6379`.
        workers: runs at a time; None for as many as there is room for.
        threads: of each run; None for a share of the cores on this machine, and for one elsewhere.

    Raises:
        InputError: there is no such executor, its library is not installed, or a number is below 1.
    """
    kind, _, address = name.partition(":")
    if kind not in EXECUTORS or (address and kind != "ray"):
        raise unknown("executor", name, EXECUTORS)
    if kind == "here":
        check(workers in (None, 1), "workers", workers, "1 in this process")
        return HereExecutor(threads)
    if kind == "processes":
        return ProcessExecutor(workers, threads)
    if kind == "ray":
        return RayExecutor(address or None, workers, threads or 1)
    return SlurmExecutor(workers=workers, threads=threads or 1)

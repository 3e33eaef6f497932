"""Makes the runs of a study on other machines: those of a Ray cluster, or those that Slurm hands out."""

import importlib
import os
import pickle
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import InputError, check, is_whole
from ..training import Callback
from .jobs import TELL_SECONDS, Job, JobQueue, Tell, attempt
from .record import Record

SHARE_SECONDS = 1.0  # between two words of a run on another machine
ANSWER_SECONDS = 10.0  # for a cluster to be there
LATE_SECONDS = 15.0  # between the end of a job and its result, on a slow shared disk


class RayExecutor:
    """Makes runs as remote functions of Ray Core. A run whose process or machine is lost is made again, by us.

    Needs the extra `ray`. The machines must have the same normlab and torch. The modules of a study are imported there
    from the folders of this process; where these are not shared, `working_dir` sends one.

    Args:
        address: `10.0.0.1:6379`, or `auto`; None for that of the variable RAY_ADDRESS, or else a cluster of this
            machine alone.
        workers: runs at a time; None for as many as the cluster has room for.
        threads: of each run, and cores that it takes.
        working_dir: a folder that Ray copies to the machines, where runs begin; None for the folder of this process.

    Raises:
        InputError: Ray is not installed, or a number is below 1.
    """

    def __init__(
        self,
        address: str | None = None,
        workers: int | None = None,
        threads: int = 1,
        working_dir: str | Path | None = None,
    ):
        _check_numbers(workers, threads)
        _library("ray")
        self.address, self.workers, self.threads, self.working_dir = address, workers, threads, working_dir

    def run(self, queue: JobQueue) -> None:
        """See `Executor`.

        Raises:
            InputError: there is no such cluster.
        """
        ray = _library("ray")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing goes to anybody
        ours = not ray.is_initialized()
        if ours:
            self._connect(ray)
        try:
            self._run(ray, queue)
        finally:
            if ours:
                ray.shutdown()  # the runs that are on the way end too

    def _connect(self, ray: Any) -> None:
        environment = None if self.working_dir is None else {"working_dir": str(self.working_dir)}
        address = self.address or os.environ.get("RAY_ADDRESS") or "local"
        host, _, port = address.rpartition(":")
        if address == "local" and not (Path.home() / ".ray" / "auth_token").exists():
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # or Ray would write one into that file
        try:
            if port.isdecimal() and "/" not in host:  # Ray itself would wait for minutes
                socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
            ray.init(
                address,
                include_dashboard=False,  # nobody looks at it, and Ray waits a second for its end
                log_to_driver=False,
                logging_level="error",
                runtime_env=environment,
            )
        except (OSError, ValueError, RuntimeError) as error:
            message = str(error).strip().partition("\n")[0]
            raise InputError(f"address={address!r}: no Ray cluster answers. {message}") from error

    def _run(self, ray: Any, queue: JobQueue) -> None:
        folder = None if self.working_dir else os.getcwd()
        words = ray.remote(num_cpus=0, max_restarts=0)(_Words)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        told = words.options(scheduling_strategy=here).remote()
        make = ray.remote(_make_there).options(
            num_cpus=self.threads, max_retries=0, scheduling_strategy="SPREAD", name="normlab run"
        )
        running: dict[Any, Job] = {}
        begun: set[str] = set()
        try:
            while True:
                while len(running) < (self.workers or _room(ray, self.threads)) and (job := queue.take()):
                    call = _call_of(job, ray.cloudpickle.dumps, self.threads, folder)
                    running[make.remote(call, told)] = job
                if not running:
                    return
                ended, _ = ray.wait(list(running), timeout=TELL_SECONDS)
                queue.ctrl_c.check()
                _pass_on(ray.get(told.take.remote()), running, begun, queue)
                for future in ended:
                    job = running.pop(future)
                    begun.discard(job.key)
                    try:
                        record = ray.get(future)
                    except ray.exceptions.RayTaskError as error:
                        queue.end(job, attempt(job.key, job.settings, lambda error=error: _raise(error)))
                    except ray.exceptions.RayError as error:
                        queue.lose(job, _in_short(error))
                    else:
                        queue.end(job, record)
        finally:
            for future in running:
                ray.cancel(future, force=True)
            ray.kill(told)


class _Words:
    """An actor beside the driver, to which runs say where and how far they are."""

    def __init__(self):
        self._heard: dict[str, tuple[str, float]] = {}

    def hear(self, key: str, where: str, share: float) -> None:
        self._heard[key] = where, share

    def take(self) -> dict[str, tuple[str, float]]:
        heard, self._heard = self._heard, {}
        return heard


def _pass_on(heard: dict[str, tuple[str, float]], running: dict[Any, Job], begun: set[str], queue: JobQueue) -> None:
    """Tell the queue what runs said since the last time."""
    for job in running.values():
        if job.key in heard:
            where, share = heard[job.key]
            if job.key not in begun:
                begun.add(job.key)
                queue.begin(job, where)
            queue.tell(job, share)


@dataclass(frozen=True)
class _Call:
    """A run on its way to another machine, with what it needs there.

    Attributes:
        run: of the job, pickled; so that an error on unpickling is one of the run.
        folder: of the driver; None to stay where it is.
        paths: of the driver, to import from.
    """

    key: str
    settings: dict[str, Any]
    run: bytes
    threads: int
    folder: str | None
    paths: list[str]

    def make(self, tell: Callback) -> Record:
        """On the other machine: make the run."""
        if self.folder is not None and Path(self.folder).is_dir():
            os.chdir(self.folder)
        sys.path += [path for path in self.paths if path not in sys.path and Path(path).exists()]
        torch.set_num_threads(self.threads)
        return attempt(self.key, self.settings, lambda: pickle.loads(self.run)(tell))


def _call_of(job: Job, dumps: Callable[[Any], bytes], threads: int, folder: str | None) -> _Call:
    paths = [] if folder is None else [folder, *filter(None, sys.path)]
    return _Call(job.key, job.settings, dumps(job.run), threads, folder, paths)


def _make_there(call: _Call, told: Any) -> Record:
    """In a Ray worker: make a run, and tell the actor how far it is."""
    where = socket.gethostname()
    told.hear.remote(call.key, where, 0.0)
    return call.make(Tell(lambda share: told.hear.remote(call.key, where, share), SHARE_SECONDS))


def _room(ray: Any, threads: int) -> int:
    """How many runs fit into the cluster; and one that waits, so that it is never idle, and grows if it can."""
    return int(ray.cluster_resources().get("CPU", 0)) // threads + 1


class SlurmExecutor:
    """Makes runs as jobs of Slurm, by submitit. A run whose job is killed, or ends early, is made again.

    Needs the extra `slurm`, and a folder that all machines see: the present one.

    Args:
        folder: for what submitit writes.
        workers: jobs at a time, those that wait included; None for 100.
        threads: of each run, and cores that it takes.
        cluster: `slurm`; `local` for processes of this machine.
        **options: of `submitit.AutoExecutor.update_parameters`: `timeout_min`, `mem_gb`, `slurm_partition` and others.

    Raises:
        InputError: submitit or Slurm is not there, a number is below 1, or an option is unknown.
    """

    def __init__(
        self,
        folder: str | Path = "runs/slurm",
        workers: int | None = None,
        threads: int = 1,
        cluster: str = "slurm",
        **options: Any,
    ):
        _check_numbers(workers, threads)
        submitit = _library("submitit", "slurm")
        self.folder, self.workers, self.threads = Path(folder).resolve(), workers or 100, threads
        try:
            self._submitit = submitit.AutoExecutor(self.folder, cluster=cluster)
            if cluster == "slurm":
                options = {"cpus_per_task": threads, **options}
            self._submitit.update_parameters(name="normlab", **options)
        except (RuntimeError, ValueError, NameError, TypeError) as error:
            raise InputError(f"submitit refuses: {error}. Mend cluster={cluster!r} or its options.") from error

    def run(self, queue: JobQueue) -> None:
        """See `Executor`."""
        running: dict[Any, Job] = {}
        gone: dict[Any, float] = {}  # since when a job has ended without a result, which may come late
        try:
            while True:
                self._submit(queue, running)
                if not running:
                    return
                queue.ctrl_c.check()
                time.sleep(TELL_SECONDS)
                for one, job in list(running.items()):
                    if self._ended(one, job, gone, queue):
                        del running[one]
        finally:
            for one in running:
                with suppress(Exception):  # it has ended by itself
                    one.cancel(check=False)

    def _submit(self, queue: JobQueue, running: dict[Any, Job]) -> None:
        jobs: list[Job] = []
        while len(running) + len(jobs) < self.workers and (job := queue.take()):
            jobs.append(job)
        if not jobs:
            return
        with self._submitit.batch():  # one array
            made = [self._submitit.submit(_make_in_job, self._call_of(job), self._share(job)) for job in jobs]
        for one, job in zip(made, jobs, strict=True):
            running[one] = job
            queue.begin(job, f"job {one.job_id}")

    def _call_of(self, job: Job) -> "_Call":
        return _call_of(job, _library("cloudpickle", "slurm").dumps, self.threads, os.getcwd())

    def _share(self, job: Job) -> Path:
        """The file in which a run says how far it is."""
        return self.folder / f"{job.key}.share"

    def _ended(self, one: Any, job: Job, gone: dict[Any, float], queue: JobQueue) -> bool:
        """Tell the queue how a job of Slurm is; whether it has ended."""
        if not one.done():
            with suppress(OSError, ValueError):  # it has not said anything yet
                queue.tell(job, float(self._share(job).read_text()))
            return False
        if one.paths.result_pickle.exists():
            queue.end(job, attempt(job.key, job.settings, one.result))
        elif time.monotonic() < gone.setdefault(one, time.monotonic()) + LATE_SECONDS:
            return False
        else:
            queue.lose(job, f"its job {one.job_id} ended as {one.state}")
        self._share(job).unlink(missing_ok=True)
        return True


def _make_in_job(call: _Call, share: Path) -> Record:
    """In a job of Slurm: make a run, and write into a file how far it is."""
    return call.make(Tell(lambda done: share.write_text(str(done)), SHARE_SECONDS))


def _library(name: str, extra: str | None = None) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        cure = f'Install it: pip install "normlab[{extra or name}]".'
        raise InputError(f"The library {name} is not installed. {cure}") from error


def _check_numbers(workers: int | None, threads: int) -> None:
    check(workers is None or is_whole(workers, 1), "workers", workers, "a whole number from 1, or None")
    check(is_whole(threads, 1), "threads", threads, "a whole number from 1")


def _in_short(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {line}"


def _raise(error: Exception) -> Record:
    raise error

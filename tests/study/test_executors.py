"""Jobs here and in real processes: errors, divergence, a killed worker, a killed driver, a store that is full."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from killed_study import killed_studies
from rich.console import Console

from normlab.errors import InputError
from normlab.study import fingerprint, processes, tasks
from normlab.study import jobs as queue
from normlab.study.compare import make_job
from normlab.study.executors import HereExecutor, Job, ProcessExecutor, make_executor, run_jobs
from normlab.study.plan import Trial
from normlab.study.processes import granted_cores, threads_of_each
from normlab.study.record import Record
from normlab.study.store import RunStore


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def trial_job(**settings) -> Job:
    return make_job(Trial(**{"norm": "batch", "batch_size": 50, "lr": 0.1, "images": 500, **settings}), None)


def broken_job() -> Job:
    # A call with a missing argument: raises in the worker.
    return Job("broken", "a broken job", 1.0, partial(int, "no number"), {"norm": "broken"})


def killer_job(marks: Path, times: int) -> Job:
    """A job whose process is killed so many times, each of which leaves a mark."""
    return Job("killer", "a job that is killed", 1.0, partial(_kill, marks, times), {"norm": "killer"})


def _kill(marks: Path, times: int, tell) -> Record:
    number = len(list(marks.iterdir()))
    if number < times:
        (marks / str(number)).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Record("killer", {"norm": "killer"}, "finished")


def _exit(tell) -> Record:
    sys.exit(3)


def _return_a_tensor(tell) -> Record:
    return Record("odd", {"norm": "odd"}, "finished", more={"figure": torch.ones(1)})


def shown(console: Console) -> str:
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("executor", [HereExecutor(1), 2], ids=["here", "processes"])
def test_results_are_kept_and_a_failure_is_a_record(tmp_path, executor):
    store, console = RunStore(tmp_path / "runs.jsonl"), quiet()
    jobs = [trial_job(), broken_job(), trial_job(norm="none", batch_size=2, lr=9.0)]
    run_jobs(jobs, store, executor, console)
    records = {record.key: record for record in store.read()}
    assert set(records) == {job.key for job in jobs}
    assert records[jobs[0].key].status == "finished"
    assert records[jobs[0].key].machine["threads"] >= 1
    assert records["broken"].status == "failed"
    assert "Error" in records["broken"].error
    assert 'File "normlab/study/jobs.py", line' in records["broken"].traceback
    assert 'File "/' not in records["broken"].traceback  # a folder of this machine
    assert records[jobs[2].key].status == "diverged"
    assert "failed: " in shown(console)
    assert "diverged at step" in shown(console)


def figures(store: RunStore) -> dict:
    return {one.key: (one.epochs[0]["train"], one.epochs[0]["valid"], one.curve) for one in store.read()}


def test_results_are_the_same_bit_by_bit_here_in_one_process_and_in_two(tmp_path):
    jobs, before = [trial_job(seed=seed) for seed in (0, 1)], torch.get_num_threads()
    stores = []
    for number, executor in enumerate((HereExecutor(1), ProcessExecutor(1, 1), ProcessExecutor(2, 1))):
        stores.append(RunStore(tmp_path / f"{number}.jsonl"))
        run_jobs(jobs, stores[-1], executor, quiet())
    assert len(figures(stores[0])) == 2
    assert figures(stores[0]) == figures(stores[1]) == figures(stores[2])
    assert torch.get_num_threads() == before


def test_data_are_the_same_however_many_threads_a_process_had_before():
    found = []
    for threads in (2, 1):
        tasks._load_normalized.cache_clear()
        fingerprint._data.cache_clear()
        with tasks.torch_threads(threads):
            data, _ = tasks.make_data(Trial(images=500))
            found.append((next(iter(data))[0], fingerprint.fingerprint(Trial(images=500), threads=1)["data"]))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("given", [{"workers": 0}, {"workers": 1.5}, {"threads": 0}, {"threads": True}])
def test_numbers_below_one_are_refused(given):
    (name, value), *_ = given.items()
    with pytest.raises(InputError, match=f"{name}={value}"):
        make_executor("processes", **given)


def test_executors_have_names():
    assert isinstance(make_executor("here", 1), HereExecutor)
    assert make_executor("processes", 3, 2).threads == 2
    with pytest.raises(InputError, match=r"executor='proceses' is unknown\. Did you mean 'processes'"):
        make_executor("proceses")
    with pytest.raises(InputError, match="workers=2"):
        make_executor("here", 2)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_run_whose_process_is_killed_is_made_again_and_the_others_go_on(tmp_path):
    store, console, marks = RunStore(tmp_path / "runs.jsonl"), quiet(), tmp_path / "marks"
    marks.mkdir()
    run_jobs([killer_job(marks, 2), trial_job()], store, 2, console)
    assert {record.key: record.status for record in store.read()} == {"killer": "finished", trial_job().key: "finished"}
    assert len(list(marks.iterdir())) == 2 == shown(console).count("is made again: its process was ended by SIGK")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_run_whose_process_is_always_killed_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "RETRIES", 1)
    store, marks = RunStore(tmp_path / "runs.jsonl"), tmp_path / "marks"
    marks.mkdir()
    run_jobs([killer_job(marks, 99), trial_job()], store, 1, quiet())
    records = {record.key: record for record in store.read()}
    assert records["killer"].status == "failed"
    assert records["killer"].error == (
        "The run was lost 2 times; the last time its process was ended by SIGKILL, perhaps for lack of memory."
    )
    assert records[trial_job().key].status == "finished"
    assert len(list(marks.iterdir())) == 2


def test_odd_runs_are_records_and_the_others_go_on(tmp_path):
    store, runs = RunStore(tmp_path / "runs.jsonl"), {"exits": _exit, "tensor": _return_a_tensor, "lambda": lambda _: 0}
    run_jobs([*(Job(name, name, 1.0, run, {}) for name, run in runs.items()), trial_job()], store, 1, quiet())
    records = {record.key: record for record in store.read()}
    assert [records[name].status for name in runs] == ["failed"] * 3
    assert records["exits"].error == "SystemExit: 3"
    assert records["tensor"].error == "TypeError: Object of type Tensor is not JSON serializable"
    assert "pickle" in records["lambda"].error
    assert records[trial_job().key].status == "finished"


class FullStore(RunStore):
    """A store on a disk that is full."""

    def append(self, record):
        raise InputError("the disk is full")


@pytest.mark.parametrize("executor", [HereExecutor(1), 2], ids=["here", "processes"])
def test_a_record_that_cannot_be_written_ends_the_study_at_once(tmp_path, executor):
    """No run begins after it."""
    jobs = [Job(str(number), "a mark", 1.0, partial(_mark, tmp_path, number), {}) for number in range(20)]
    with pytest.raises(InputError, match="the disk is full"):
        run_jobs(jobs, FullStore(tmp_path / "runs.jsonl"), executor, quiet())
    assert 1 <= len(list(tmp_path.glob("*.mark"))) <= 2


def _mark(folder: Path, number: int, tell) -> Record:
    (folder / f"{number}.mark").touch()
    time.sleep(0.5)
    return Record(str(number), {}, "finished")


def test_a_script_without_a_guard_is_told_of_it(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from normlab.study.compare import compare
        from normlab.study.plan import Trial
        compare([Trial(batch_size=50, images=100)], sys.argv[1], workers=1)
        """
    )
    path = tmp_path / "study.py"
    path.write_text(script)
    end = subprocess.run([sys.executable, str(path), str(tmp_path / "out")], capture_output=True, text=True)
    assert end.returncode == 1
    assert 'Call a study in a script under if __name__ == "__main__".' in end.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_study_keeps_what_ended_leaves_no_process_and_goes_on(tmp_path):
    script = textwrap.dedent(
        """
        import sys
        from normlab.study.compare import compare
        from normlab.study.plan import Trial, grid
        base = Trial(batch_size=50, lr=0.1, images=500)
        if __name__ == "__main__":
            trials = grid(["batch"], [50], [0.1], [0, 1], base)
            trials += grid(["batch"], [2], [0.01], [0], Trial(batch_size=2, images=50_000, epochs=50))
            compare(trials, sys.argv[1], workers=2)
        """
    )
    path = tmp_path / "study.py"
    path.write_text(script)
    process = subprocess.Popen([sys.executable, str(path), str(tmp_path / "out")], start_new_session=True)
    store = RunStore(tmp_path / "out" / "runs.jsonl")
    deadline = time.monotonic() + 60
    while len(store.read()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert [r.status for r in store.read()] == ["finished", "finished"]
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(process.pid)
    size = store.path.stat().st_size
    run_jobs([trial_job(seed=7)], store, 1, quiet())
    assert store.path.stat().st_size > size
    assert len(store.read()) == 3


def _alive(group: int) -> bool:
    """Whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_driver_and_workers_that_are_killed_lose_nothing(tmp_path):
    """A short form of tests/study/killed_study.py."""
    found = killed_studies(runs=8, kills=2)
    assert found.drivers + found.workers == 2
    assert not found.wrong


@pytest.mark.parametrize(
    ("asked", "workers", "threads"),
    [
        (None, 1, 8),
        (None, 4, 2),
        (None, 99, 1),
        ("1", 1, 1),
        ("3", 1, 3),
        ("3", 4, 2),
        ("4,2", 1, 4),
        ("", 2, 4),
        ("x", 2, 4),
    ],
)
def test_a_process_has_its_share_of_the_cores_but_no_more_threads_than_asked_for(monkeypatch, asked, workers, threads):
    monkeypatch.setattr(processes, "granted_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_of_each(workers) == threads


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/", {}, 64),
        ("0::/", {"cpu.max": "rubbish"}, 64),
        (
            "2:cpu,cpuacct:/x",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            3,
        ),
        ("2:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("9:memory:/x", {}, 64),
    ],
)
def test_cores_are_those_that_are_granted(monkeypatch, tmp_path, groups, files, cores):
    for name, text in {"own": f"{groups}\n", **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    monkeypatch.setattr(processes, "CGROUPS", tmp_path)
    monkeypatch.setattr(processes, "OWN_CGROUP", tmp_path / "own")
    assert granted_cores() == cores


def test_cores_are_those_of_the_affinity(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    monkeypatch.setattr(processes, "OWN_CGROUP", tmp_path / "none")
    assert granted_cores() == 2

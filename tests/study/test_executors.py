"""Jobs in real processes: errors, divergence, a killed worker, a killed parent."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from io import StringIO

import pytest
from rich.console import Console

from normlab.errors import InputError
from normlab.study.compare import make_job
from normlab.study.executors import Job, run_jobs, threads_of_each
from normlab.study.plan import Trial
from normlab.study.record import Record
from normlab.study.store import RunStore


def quiet() -> Console:
    return Console(file=StringIO(), width=120)


def trial_job(**settings) -> Job:
    return make_job(Trial(**{"norm": "batch", "batch_size": 50, "lr": 0.1, "images": 500, **settings}), None)


def broken_job() -> Job:
    # A call with a missing argument: raises in the worker.
    return Job("broken", "a broken job", 1.0, partial(int, "no number"), {"norm": "broken"})


def killer_job() -> Job:
    return Job("killer", "a job that is killed", 1.0, partial(_kill_this_process), {"norm": "killer"})


def _kill_this_process(tell) -> Record:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def test_results_are_kept_and_a_failure_is_a_record(tmp_path):
    store, console = RunStore(tmp_path / "runs.jsonl"), quiet()
    jobs = [trial_job(), broken_job(), trial_job(norm="none", batch_size=2, lr=9.0)]
    run_jobs(jobs, store, 2, console)
    records = {record.key: record for record in store.read()}
    assert set(records) == {job.key for job in jobs}
    assert records[jobs[0].key].status == "finished"
    assert records[jobs[0].key].machine["threads"] >= 1
    assert records["broken"].status == "failed"
    assert "Error" in records["broken"].error
    assert 'File "normlab/study/executors.py", line' in records["broken"].traceback
    assert 'File "/' not in records["broken"].traceback  # a folder of this machine
    assert "job.run(" in records["broken"].traceback
    assert records[jobs[2].key].status == "diverged"
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "failed: " in shown
    assert "diverged at step" in shown


def test_the_number_of_workers_does_not_change_the_results(tmp_path):
    jobs = [trial_job(seed=seed) for seed in (0, 1)]
    losses = []
    for workers in (1, 2):
        store = RunStore(tmp_path / f"{workers}.jsonl")
        run_jobs(jobs, store, workers, quiet())
        found = {r.key: r.epochs[0]["valid"]["loss"] for r in store.read()}
        losses.append([found[job.key] for job in jobs])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_workers_below_one_are_refused(tmp_path):
    with pytest.raises(InputError, match="workers=0"):
        run_jobs([trial_job()], RunStore(tmp_path / "runs.jsonl"), 0, quiet())


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_worker_that_is_killed_ends_the_study_with_a_word(tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    with pytest.raises(InputError, match="A worker process was killed"):
        run_jobs([killer_job()], store, 1, quiet())
    assert store.read() == []


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
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads_of_each(workers) == threads

"""The store of results: what survives a process that is killed, and what a damaged file does."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from normlab.errors import InputError
from normlab.study.record import Record
from normlab.study.store import RunStore


def record(key: str, **fields) -> Record:
    return Record(key, {"norm": "batch"}, "finished", **fields)


def test_records_come_back_in_order(tmp_path):
    store = RunStore(tmp_path / "new" / "runs.jsonl")
    for key in "abc":
        store.append(record(key))
    assert [r.key for r in RunStore(store.path).read()] == ["a", "b", "c"]


def test_a_file_that_is_not_there_is_empty(tmp_path):
    assert RunStore(tmp_path / "none.jsonl").read() == []


def test_numbers_that_are_not_finite_become_null(tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    store.append(record("a", curve={"loss": [1.0, float("nan"), float("inf")]}, epochs=({"loss": float("-inf")},)))
    line = store.path.read_text()
    assert "NaN" not in line
    assert "Infinity" not in line
    assert store.read()[0].curve["loss"] == [1.0, None, None]
    assert store.read()[0].epochs == [{"loss": None}]


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_torn_last_line_is_dropped_and_the_next_record_is_whole(tmp_path, cut):
    store = RunStore(tmp_path / "runs.jsonl")
    store.append(record("a"))
    store.append(record("b"))
    whole = store.path.read_bytes()
    store.path.write_bytes(whole[:-cut])
    assert [r.key for r in store.read()] == ["a"]
    store.append(record("c"))
    assert [r.key for r in store.read()] == ["a", "c"]
    assert all(json.loads(line) for line in store.path.read_text().splitlines())


def test_a_damaged_line_is_reported_by_number_and_nothing_is_changed(tmp_path):
    path = tmp_path / "runs.jsonl"
    RunStore(path).append(record("a"))
    before = path.read_bytes() + b"{broken\n"
    path.write_bytes(before)
    with pytest.raises(InputError, match=r"line 2"):
        RunStore(path).read()
    assert path.read_bytes() == before


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"not": "a record"}\n')
    with pytest.raises(InputError, match="no settings or status"):
        RunStore(path).read()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        RunStore(tmp_path / "file" / "runs.jsonl").append(record("a"))


APPEND = """
import sys, time
from normlab.study.record import Record
from normlab.study.store import RunStore
who, number, path, start = sys.argv[1], int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
time.sleep(max(0.0, start - time.time()))
for i in range(number):
    RunStore(path).append(Record(f"{who}-{i}", {}, "finished", more={"pad": "x" * 6000}))
"""


def test_processes_that_append_at_once_keep_every_record(tmp_path):
    """Eight processes, started at one time: each of their records is there, in the order of its process."""
    path, number, start = tmp_path / "runs.jsonl", 60, time.time() + 1
    run = [sys.executable, "-c", APPEND]
    processes = [subprocess.Popen([*run, str(who), str(number), str(path), str(start)]) for who in range(8)]
    assert [process.wait() for process in processes] == [0] * 8
    keys = [r.key for r in RunStore(path).read()]
    for who in range(8):
        assert [key for key in keys if key.startswith(f"{who}-")] == [f"{who}-{i}" for i in range(number)]
    assert len(keys) == 8 * number


def test_a_process_killed_while_it_holds_the_lock_keeps_nobody_waiting(tmp_path):
    path = tmp_path / "runs.jsonl"
    script = "import sys, time; from filelock import FileLock; FileLock(sys.argv[1]).acquire(); print(); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-uc", script, f"{path}.lock"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.wait()
    RunStore(path).append(record("a"))
    assert [r.key for r in RunStore(path).read()] == ["a"]


def test_killed_while_writing_keeps_every_record_that_was_reported(tmp_path):
    """A process appends and reports each record; after SIGKILL every reported one is there, and the file goes on."""
    path = tmp_path / "runs.jsonl"
    script = textwrap.dedent(
        """
        import sys
        from normlab.study.record import Record
        from normlab.study.store import RunStore
        store = RunStore(sys.argv[1])
        for i in range(100_000):
            store.append(Record(str(i), {}, "finished", more={"pad": "x" * 3000}))
            print(i, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(20):
        process.stdout.readline()
    os.kill(process.pid, signal.SIGKILL)
    reported = 20 + len(process.stdout.read().split())
    process.wait()
    store = RunStore(path)
    keys = [r.key for r in store.read()]
    assert len(keys) >= reported >= 20
    assert keys == [str(i) for i in range(len(keys))]
    store.append(record("after"))
    assert store.read()[-1].key == "after"

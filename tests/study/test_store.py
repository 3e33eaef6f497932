"""The store of results: what survives a process that is killed, and what a damaged file does."""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from datetime import datetime

import pytest

from normlab.errors import InputError
from normlab.study.lines import seal
from normlab.study.record import Record, Start
from normlab.study.store import RunStore, driver, lock_folder
from study.hostile import GOOD


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
    losses = [1.0, float("nan"), float("inf"), 1e200]
    store.append(record("a", curve={"step": [1, 2, 3, 4], "loss": losses}, epochs=[{"seconds": float("-inf")}]))
    line = store.path.read_text()
    assert "NaN" not in line
    assert "Infinity" not in line
    assert store.read()[0].curve["loss"] == [1.0, None, None, None]
    assert store.read()[0].epochs == [{"seconds": None}]


@pytest.mark.parametrize("cut", range(2, len(seal(record("b").to_json()))))
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


@pytest.mark.parametrize("checksum", [True, False])
def test_a_last_line_that_lacks_only_its_end_counts(tmp_path, checksum):
    store = RunStore(tmp_path / "runs.jsonl")
    line = seal(record("a").to_json()) if checksum else json.dumps(record("a").to_json()).encode() + b"\n"
    store.path.write_bytes(line[:-1])
    assert [r.key for r in store.read()] == ["a"]
    store.append(record("b"))
    assert [r.key for r in store.read()] == ["a", "b"]
    assert store.path.read_bytes().startswith(line)


@pytest.mark.parametrize("place", ["first", "last"])
def test_every_flipped_bit_is_seen(tmp_path, place):
    """Of a record's line or a start's, its format, checksum and end among them."""
    path = tmp_path / "runs.jsonl"
    other = seal(record("other").to_json())
    for values in (record("a", seconds=1.5).to_json(), {"key": "a", "host": "here", "process": 5, "started": "now"}):
        line = seal(values)
        around = (b"", other) if place == "first" else (other, b"")
        assert len(read(path, line.join(around))) == 2
        for bit in range(0, 8 * len(line), 1 if place == "last" else 9):
            flipped = bytearray(line)
            flipped[bit // 8] ^= 1 << bit % 8
            with pytest.raises(InputError, match=r"runs.jsonl, line \d,.* it was not changed"):
                read(path, bytes(flipped).join(around))


def read(path, content: bytes):
    path.write_bytes(content)
    return RunStore(path).heads()


def test_lines_with_checksum_and_without_stand_together(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps(record("old").to_json()) + "\n")
    RunStore(path).append(record("new"))
    assert [r.key for r in RunStore(path).read()] == ["old", "new"]


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
from normlab.study.lines import seal
from normlab.study.store import LOCK_WAIT, RunStore, driver, lock_folder
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
        from normlab.study.lines import seal
        from normlab.study.store import LOCK_WAIT, RunStore, driver, lock_folder
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


def test_heads_are_records_without_what_is_long(tmp_path):
    path = tmp_path / "runs.jsonl"
    whole = Record.from_json(GOOD)
    RunStore(path).append(whole)
    (head,) = RunStore(path).heads()
    assert isinstance(head, Record)
    assert (head.key, head.settings, head.status, head.versions) == (
        whole.key,
        whole.settings,
        whole.status,
        whole.versions,
    )
    assert (head.epochs, head.more) == ([], {})
    assert RunStore(path).read() == [whole]


def test_outcomes_are_records_without_their_lines_and_can_be_completed(tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    older, whole, other = (Record.from_json(GOOD | {"seconds": seconds}) for seconds in (1.0, 2.0, 3.0))
    store.start(whole.key)
    for one in (older, whole, replace(other, key='a "\u2713')):
        store.append(one)
    outcomes = store.outcomes()
    assert [one.seconds for one in outcomes] == [1.0, 2.0, 3.0]
    assert [one.result for one in outcomes] == [0.75] * 3
    assert all((one.curve, one.more) == ({"step": [], "loss": []}, {}) for one in outcomes)
    assert store.complete(outcomes[1:2]) == [whole]
    assert store.complete(outcomes) == store.read()
    assert store.complete([]) == []


def test_lines_without_checksum_are_read_whole(tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    store.path.write_text(json.dumps(GOOD) + "\n")
    assert store.outcomes() == store.complete(store.outcomes()) == [Record.from_json(GOOD)]


def test_settings_may_have_the_names_of_what_is_cut(tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    settings = {"task": "own", "epochs": [1], "curve": {"a": 1}}
    whole = Record("a", settings, "finished", epochs=[{"valid": {"accuracy": 1.0}}], more={"own": {"curve": {}}})
    store.append(whole)
    for (one,) in (store.heads(), store.outcomes()):
        assert one.settings == settings
    assert store.outcomes()[0].result == 1.0


def test_starts_stand_beside_records(tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    store.start("a", "machine 2")
    store.append(record("a"))
    start, ended = store.heads()
    assert isinstance(start, Start)
    assert (start.key, start.host, start.process, start.where) == ("a", socket.gethostname(), os.getpid(), "machine 2")
    assert datetime.fromisoformat(start.started).tzinfo is not None
    assert ended == record("a")
    assert store.read() == [record("a")]


HOLD = """
import sys, time
from normlab.study.store import lock_folder
with lock_folder(sys.argv[1]):
    print(flush=True)
    time.sleep(60)
"""


def test_a_second_study_in_a_folder_is_refused_until_the_first_is_gone(tmp_path):
    folder = tmp_path / "new"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        who = driver(folder)
        assert who is not None
        assert (who.host, who.process) == (socket.gethostname(), process.pid)
        words = rf"in use: process {process.pid} on {who.host} runs a study there since 20\d\d-.*Wait"
        with pytest.raises(InputError, match=words), lock_folder(folder):
            pass
        assert driver(folder) == who
        process.kill()
        process.wait()
    assert driver(folder) is None
    with lock_folder(folder):
        me = driver(folder)
        assert me is not None
        assert me.process == os.getpid()
        with pytest.raises(InputError, match="in use"), lock_folder(folder):
            pass
    assert driver(folder) is None


def test_the_lock_of_a_folder_goes_with_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        raise ZeroDivisionError
    with lock_folder(tmp_path):
        pass


def test_nobody_runs_a_study_in_a_folder_that_is_not_there(tmp_path):
    assert driver(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


def test_a_folder_that_is_a_file_cannot_be_locked(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"), lock_folder(tmp_path / "file"):
        pass


FULL = """
import resource, sys
from normlab.errors import InputError
from normlab.study.record import Record
from normlab.study.store import RunStore
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    RunStore(sys.argv[1]).append(Record("c", {}, "finished", more={"pad": "x" * 100_000}))
except InputError as error:
    print(error)
"""


def test_a_full_disk_is_told_and_loses_nothing(tmp_path):
    """A limit on the size of files, in the middle of a line, stands for the disk."""
    store = RunStore(tmp_path / "runs.jsonl")
    store.append(record("a"))
    store.append(record("b"))
    limit = store.path.stat().st_size + 50_000
    run = [sys.executable, "-c", FULL, str(store.path), str(limit)]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    assert "runs.jsonl cannot be written: File too large. Choose another folder." in told
    assert [r.key for r in store.read()] == ["a", "b"]
    store.append(record("d"))
    assert [r.key for r in store.read()] == ["a", "b", "d"]

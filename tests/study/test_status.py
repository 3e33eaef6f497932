"""How far a study is: the state of each planned run."""

import io
import subprocess
import sys
from types import SimpleNamespace

from rich.console import Console

from normlab.study import lines
from normlab.study.lines import seal
from normlab.study.plan import Trial, grid
from normlab.study.record import Record
from normlab.study.status import RunState, status
from normlab.study.store import RunStore, driver, lock_folder
from records import record

TRIALS = grid(["batch", "running"], [2], [0.1], [0, 1, 2], Trial(images=100))


def of(trial: Trial, ended: str = "finished", **fields) -> Record:
    return Record(trial.key, trial.to_dict(), ended, machine={"cpu": "Imaginary", "threads": 1}, **fields)  # pyright: ignore[reportArgumentType]


def shown(found) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(found)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_nothing_is_there_yet_and_nothing_is_made(tmp_path):
    found = status(tmp_path / "none", TRIALS)
    assert found.counts == {"waiting": 6}
    assert not found.done
    assert "0 of 6 runs have ended; nothing runs now. Run the study again to go on." in shown(found)
    assert not (tmp_path / "none").exists()


def test_each_state_is_told(tmp_path):
    store = RunStore(tmp_path / "runs.jsonl")
    finished, diverged, failed, running, again = TRIALS[:5]
    with lock_folder(tmp_path):
        for trial in (finished, diverged, failed, failed, again):
            store.start(trial.key)
        store.append(of(finished, finished_at="2026-03-01T10:11:12+00:00"))
        store.append(of(diverged, "diverged", diverged_at_step=3))
        store.append(of(failed, "failed", error="ValueError: [/red] no\nmore"))
        store.append(of(failed, "failed", error="ValueError: [/red] again"))
        store.append(of(again, "failed", error="MemoryError"))
        for trial in (again, running):
            store.start(trial.key, "machine 2")
        store.append(of(Trial(seed=99)))
        found = status(tmp_path, TRIALS)
        me = driver(tmp_path)
    assert me is not None
    place = f"machine 2, process {me.process} on {me.host}"
    assert [run.state for run in found.runs] == ["finished", "diverged", "failed", "running", "running", "waiting"]
    assert found.counts == {"finished": 1, "diverged": 1, "failed": 1, "running": 2, "waiting": 1}
    assert found.runs[0] == RunState(finished, "finished", 0, "Imaginary", "2026-03-01T10:11:12+00:00")
    assert found.runs[2] == RunState(failed, "failed", 2, "Imaginary", "", "ValueError: [/red] again")
    assert (found.runs[3].where, found.runs[3].failures) == (place, 0)
    assert (found.runs[4].where, found.runs[4].failures) == (place, 1)
    assert (found.driver, found.others, found.done) == (me, 1, False)
    text = shown(found)
    assert f"2 of 6 runs have ended; process {me.process} on {me.host} runs the study since" in text
    assert "ValueError: [/red] again" in text
    assert "2 times" in text
    assert "1 more runs in the folder are not of this plan" in text
    gone = status(tmp_path, TRIALS)
    assert [run.state for run in gone.runs[3:5]] == ["interrupted"] * 2
    assert gone.driver is None


def test_a_run_whose_driver_was_killed_is_interrupted_also_while_another_one_runs(tmp_path):
    script = (
        "import sys, time; from normlab.study.store import RunStore, lock_folder\n"
        "with lock_folder(sys.argv[1]):\n"
        "    RunStore(sys.argv[1] + '/runs.jsonl').start(sys.argv[2]); print(flush=True); time.sleep(60)"
    )
    run = [sys.executable, "-c", script, str(tmp_path), TRIALS[0].key]
    with subprocess.Popen(run, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert status(tmp_path, TRIALS).counts == {"running": 1, "waiting": 5}
        process.kill()
    assert status(tmp_path, TRIALS).counts == {"interrupted": 1, "waiting": 5}
    with lock_folder(tmp_path):
        assert status(tmp_path, TRIALS).counts == {"interrupted": 1, "waiting": 5}


def test_a_record_that_does_not_count_is_of_a_run_that_waits(tmp_path):
    RunStore(tmp_path / "runs.jsonl").append(of(TRIALS[0], made_by={"code": "old"}))
    found = status(tmp_path, TRIALS, usable=lambda one: one.made_by == {"code": "new"})
    assert found.counts == {"waiting": 6}


def test_all_have_ended(tmp_path):
    for trial in TRIALS:
        RunStore(tmp_path / "runs.jsonl").append(of(trial))
    assert status(tmp_path, TRIALS).done
    assert shown(status(tmp_path, TRIALS)).startswith("6 of 6 runs have ended.\n")


def test_epochs_and_activations_are_not_parsed(tmp_path, monkeypatch):
    """They are most of a line. `benchmarks/big_study.py` has the seconds of 10,000 runs."""
    path = tmp_path / "runs.jsonl"
    activations = {"step": list(range(10)), "mean": {f"layer {i}": [0.125] * 10 for i in range(6)}}
    values = record(0.9).to_json() | {"activations": activations}
    path.write_bytes(b"".join(seal(values | {"key": one.key, "settings": one.to_dict()}) for one in TRIALS))
    parsed, decode = [], lines.DECODER.decode
    decoder = SimpleNamespace(decode=lambda text: parsed.append(len(text)) or decode(text))
    monkeypatch.setattr(lines, "DECODER", decoder)
    assert len(RunStore(path).heads()) == len(parsed) == len(TRIALS)
    assert sum(parsed) < path.stat().st_size / 3
    parsed.clear()
    assert status(tmp_path, TRIALS).done
    assert len(parsed) == len(TRIALS)
    assert sum(parsed) < path.stat().st_size / 3

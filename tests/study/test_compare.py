"""Comparisons in a folder: what is written, what is taken from an earlier run, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from normlab.errors import InputError
from normlab.study.compare import compare
from normlab.study.executors import HereExecutor
from normlab.study.plan import Trial, grid
from normlab.study.processes import threads_of_each
from normlab.study.record import Start
from normlab.study.store import RunStore, lock_folder

BASE = Trial(images=600)


def run(trials, folder, workers=None, **options):
    """In this process, by default, which needs no other to start; with the threads of one of two."""
    console = Console(file=StringIO(), width=140)
    executor = workers or HereExecutor(threads_of_each(2))
    records = compare(trials, folder, console=console, workers=executor, **options)
    return records, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_a_comparison_writes_its_runs_a_picture_and_a_page(tmp_path):
    trials = grid(["batch", "running"], [20, 50], [0.1], [0], BASE)
    records, shown = run(trials, tmp_path, workers=2, command="normlab compare")
    assert {record.key for record in records} == {trial.key for trial in trials}
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "report.html").read_text()
    assert "normlab compare" in page
    for name in ("runs.jsonl", "comparison.png", "report.html"):
        assert str(tmp_path / name) in shown
    assert not list(tmp_path.glob("*.part"))

    again, shown = run([*trials, *grid(["group"], [20], [0.1], [0], BASE)], tmp_path)
    assert "4 runs are in" in shown
    assert len(again) == 5
    assert len(RunStore(tmp_path / "runs.jsonl").read()) == 5


def test_runs_of_other_versions_are_made_again(tmp_path):
    trials = grid(["batch"], [50], [0.1], [0], BASE)
    records, _ = run(trials, tmp_path)
    store = RunStore(tmp_path / "runs.jsonl")
    store.path.unlink()
    store.append(replace(records[0], made_by={**records[0].made_by, "torch": "1.0"}))
    _, shown = run(trials, tmp_path)
    assert "1 more were made by other torch; these runs are made again." in shown
    assert len(store.read()) == 2
    store.path.unlink()
    store.append(replace(records[0], made_by={}, versions={**records[0].versions, "torch": "1.0"}))
    run(trials, tmp_path)
    assert len(store.read()) == 2


def test_a_folder_where_a_study_runs_is_in_use(tmp_path):
    trials = grid(["batch"], [50], [0.1], [0], BASE)
    with lock_folder(tmp_path), pytest.raises(InputError, match=r"is in use: process .* Wait for its end"):
        run(trials, tmp_path)


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        (Trial(norm="grup"), "norm='grup' is unknown. Did you mean 'group'"),
        (Trial(data="mnst"), "Did you mean 'mnist'"),
        (Trial(model="convnt"), "Did you mean 'convnet'"),
        (Trial(batch_size=50_001), "batch_size=50001"),
        (Trial(images=60_000), "images=60000"),
        (Trial(batch_size=20, images=10), "batch_size=20"),
    ],
)
def test_what_cannot_run_is_said_before_anything_runs(tmp_path, trial, said):
    with pytest.raises(InputError, match=said):
        run([Trial(images=100), trial], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_said_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        run([Trial(images=100)], tmp_path / "file" / "out")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_keeps_what_is_done_and_shows_the_partial_table(tmp_path):
    command = [sys.executable, "-m", "normlab.cli", "compare", "--norms", "batch", "group", "--batch-sizes", "2", "512"]
    options = ["--lrs", "0.01", "--epochs", "5", "--out", str(tmp_path / "out"), "--workers", "2"]
    environment = {**os.environ, "COLUMNS": "120"}
    process = subprocess.Popen(
        [*command, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        # The tests may run where Ctrl-C is ignored, in the background of a shell: a child would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    done = RunStore(tmp_path / "out" / "runs.jsonl")
    trial = Trial(norm="batch", batch_size=512, lr=0.01, epochs=5)
    earlier, _ = run([Trial(images=512, batch_size=512)], tmp_path / "small")
    done.append(replace(earlier[0], key=trial.key, settings=trial.to_dict()))
    deadline = time.monotonic() + 60
    while sum(isinstance(one, Start) for one in done.heads()) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "interrupted" in err
    assert "Traceback" not in err
    assert "batch 512" in out
    assert f"{earlier[0].epochs[0]['valid']['accuracy']:.4f}" in out
    assert len(done.read()) == 1

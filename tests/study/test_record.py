"""The record of a run: its lines are those of before, and every line of the studies can be read."""

import json
import re
from pathlib import Path

import pytest

from normlab.errors import InputError
from normlab.study import jobs, trial
from normlab.study.lines import LineStore
from normlab.study.plan import Trial
from normlab.study.record import Record
from normlab.study.store import RunStore

STUDIES = Path(__file__).parents[2] / "studies"
OF_RUNS = sorted(STUDIES.rglob("runs.jsonl"))
PLACE = {
    "versions": {"python": "3.11.2", "normlab": "0.1.0"},
    "machine": {"cpu": "Imaginary 9000, 2 cores", "threads": 1},
    "finished_at": "2026-03-01T10:11:12+00:00",
}
FIGURES = {"epoch": 1, "train": {"loss": 0.5, "accuracy": 0.75}, "valid": {"loss": 0.25, "accuracy": 1.0}}
SETTINGS = (
    '{"key": "fc5f0e7ff0a7", "settings": {"norm": "batch", "batch_size": 2, "lr": 0.4, "seed": 1, '
    '"schedule": "constant", "clip": null, "epochs": 1, "data": "mnist", "model": "convnet", "images": 4}, '
)
PLACED = (
    '"steps": 2, "seconds": 1.5, "parameters": 62274, "versions": {"python": "3.11.2", "normlab": "0.1.0"}, '
    '"machine": {"cpu": "Imaginary 9000, 2 cores", "threads": 1}, "finished_at": "2026-03-01T10:11:12+00:00", '
)
FINISHED = (
    f'{SETTINGS}"status": "finished", "diverged_at_step": null, "error": null, {PLACED}"epochs": [{{"epoch": 1, '
    '"train": {"loss": 0.5, "accuracy": 0.75}, "valid": {"loss": 0.25, "accuracy": 1.0}, "seconds": 0.5}], '
    '"curve": {"step": [1, 2], "loss": [0.75, 0.25]}}'
)
DIVERGED = (
    f'{SETTINGS}"status": "diverged", "diverged_at_step": 2, "error": null, {PLACED}"epochs": [], '
    '"curve": {"step": [1, 2], "loss": [0.75, null]}}'
)
FAILED = (
    '{"key": "k", "settings": {"norm": "batch"}, "status": "failed", "error": "ValueError: no", '
    '"traceback": "where it was", "diverged_at_step": null, "epochs": [], "curve": {"step": [], "loss": []}}'
)


def made(monkeypatch, epochs, losses, step) -> Record:
    monkeypatch.setattr(trial, "environment", lambda: PLACE)
    plan = Trial("batch", 2, 0.4, 1, images=4)
    figures = {"epochs": epochs, "losses": losses, "diverged_at_step": step}
    return trial.make_record(plan.key, settings=plan.to_dict(), seconds=1.5, parameters=62274, **figures)


def line_of(record, tmp_path) -> str:
    """The line of a record, without its format and checksum."""
    store = RunStore(tmp_path / "runs.jsonl")
    store.append(record)
    text = store.path.read_text()
    assert re.fullmatch(r'\{"format": 2, .*, "checksum": "[0-9a-f]{8}"\}\n', text)
    return "{" + text.removeprefix('{"format": 2, ').partition(', "checksum"')[0] + "}"


def test_the_line_of_a_run_that_finished(monkeypatch, tmp_path):
    record = made(monkeypatch, [{**FIGURES, "seconds": 0.5}], [0.75, 0.25], None)
    assert line_of(record, tmp_path) == FINISHED


def test_the_line_of_a_run_that_diverged(monkeypatch, tmp_path):
    assert line_of(made(monkeypatch, [], [0.75, float("nan")], 2), tmp_path) == DIVERGED


def test_the_line_of_a_run_that_failed(monkeypatch, tmp_path):
    def fail(tell):
        raise ValueError("no")

    monkeypatch.setattr(jobs, "_traceback", lambda error: "where it was")
    record = jobs.attempt("k", {"norm": "batch"}, lambda: fail(None))
    assert line_of(record, tmp_path) == FAILED


@pytest.mark.parametrize("line", [FINISHED, DIVERGED, FAILED])
def test_a_line_comes_back_as_it_was(line):
    assert json.dumps(Record.from_json(json.loads(line)).to_json()) == line


def test_what_a_study_adds_comes_last_and_comes_back(tmp_path):
    record = Record("a", {}, "finished", more={"before": 0.5, "after": None})
    assert line_of(record, tmp_path).endswith('"before": 0.5, "after": null}')
    assert RunStore(tmp_path / "runs.jsonl").read() == [record]


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: str(path.relative_to(STUDIES)))
def test_every_line_of_a_study_is_read_and_none_of_it_is_lost(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    records = RunStore(path).read()
    assert len(records) == len(lines) > 0
    for record, line in zip(records, lines, strict=True):
        again = record.to_json()
        assert {name: again[name] for name in line} == line
        assert all(again[name] in (None, [], {"step": [], "loss": []}) for name in again.keys() - line.keys())


def test_the_keys_of_trials_are_those_of_before():
    for record in RunStore(STUDIES / "compare" / "runs.jsonl").read():
        assert Trial.from_dict(record.settings).key == record.key
        assert Trial.from_dict(record.settings).to_dict() == record.settings


def test_lines_that_are_no_runs_have_a_store_too():
    path = STUDIES / "monai" / "results.jsonl"
    assert {line["status"] for line in LineStore(path).read(dict)} == {"ok"}
    with pytest.raises(InputError, match=r"results.jsonl, line 1, is not a record of a run \(no key\)"):
        RunStore(path).read()


@pytest.mark.parametrize("line", ['{"key": "a", "settings": {}}', '{"key": "a", "status": "failed"}'])
def test_other_lines_are_refused(tmp_path, line):
    (tmp_path / "runs.jsonl").write_text(f"{line}\n")
    with pytest.raises(InputError, match="line 1, is not a record of a run"):
        RunStore(tmp_path / "runs.jsonl").read()


def test_figures_by_epoch_and_at_the_end():
    epochs = [{**FIGURES, "epoch": number} for number in (1, 2)] + [{"epoch": 3, "train": {}, "valid": None}]
    record = Record("a", {}, "finished", epochs=epochs)
    assert record.by_epoch("accuracy") == [1.0, 1.0, None]
    assert record.final("accuracy") is None
    assert Record("a", {}, "finished", epochs=epochs[:2]).final("loss") == 0.25
    assert Record("a", {}, "diverged", epochs=epochs[:2]).final("loss") is None
    assert Record("a", {}, "finished").final("loss") is None

"""Logs: every figure of the history in every place, and the same after a crash."""

import csv
import json
import math
import sys

import pytest
import torch
from torch import nn

from learners import classifier, of_known_losses
from normlab.errors import InputError
from normlab.training import (
    Callback,
    Checkpoint,
    LogCSV,
    LogJSON,
    LogTensorBoard,
    LogWandb,
    Metrics,
    Recorder,
    accuracy,
)
from normlab.training.history import flat


class Run:
    """What Weights & Biases and trackio give."""

    def __init__(self):
        self.rows = []

    def log(self, figures, step=None):
        self.rows.append((step, figures))


def read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_csv_has_a_row_an_epoch_and_every_so_many_steps(tmp_path):
    recorder, log = Recorder(), LogCSV(tmp_path / "new" / "log.csv", every=2)
    history = classifier(Metrics(accuracy=accuracy), recorder, log, n=20).fit(2)
    rows = read(tmp_path / "new" / "log.csv")
    assert list(rows[0]) == ["epoch", "train.loss", "train.accuracy", "valid.loss", "valid.accuracy", "seconds"]
    assert [{name: float(figure) for name, figure in row.items()} for row in rows] == [flat(row) for row in history]
    steps = read(tmp_path / "new" / "log.steps.csv")
    assert [(row["step"], row["epoch"]) for row in steps] == [
        ("2", "1"),
        ("4", "1"),
        ("6", "2"),
        ("8", "2"),
        ("10", "2"),
    ]
    assert [float(row["loss"]) for row in steps] == recorder.losses[1::2]
    assert {row["lr"] for row in steps} == {"0.5"}


def test_without_every_there_are_no_steps(tmp_path):
    classifier(Metrics(), LogCSV(tmp_path / "log.csv")).fit(1)
    assert [path.name for path in tmp_path.iterdir()] == ["log.csv"]


def test_json_has_a_line_an_epoch_and_every_so_many_steps(tmp_path):
    log = LogJSON(tmp_path / "log.jsonl", every=3)
    history = classifier(Metrics(), log, n=20).fit(2)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 10]
    assert [line for line in lines if "train" in line] == [{"step": 5, **history[0]}, {"step": 10, **history[1]}]
    assert list(lines[0]) == ["step", "epoch", "loss", "lr"]


def test_json_has_no_nan(tmp_path):
    of_known_losses([math.nan], Metrics(), LogJSON(tmp_path / "log.jsonl", every=1), batches=1).fit(1)
    first, second = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines())
    assert first["loss"] is None
    assert second["valid"] == {"loss": None}


def test_a_run_is_given_all_figures():
    run = Run()
    history = classifier(Metrics(), LogWandb(run, every=2), n=20).fit(1)
    assert [step for step, _ in run.rows] == [2, 4, 5]
    assert set(run.rows[0][1]) == {"loss", "lr"}
    assert run.rows[-1][1] == {
        "epoch": 1,
        "train/loss": history[0]["train"]["loss"],
        "valid/loss": history[0]["valid"]["loss"],
        "seconds": history[0]["seconds"],
    }


def test_each_group_has_its_rate(tmp_path):
    model = nn.Linear(5, 3)
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.25}]
    run = Run()
    classifier(Metrics(), LogWandb(run, every=1), model=model, optimizer=torch.optim.SGD(groups)).fit(1)
    assert {name: run.rows[0][1][name] for name in ("lr/0", "lr/1")} == {"lr/0": 0.5, "lr/1": 0.25}


class Ends(Callback):
    def after_step(self) -> None:
        if self.learner.step == 8:
            raise KeyboardInterrupt


def test_after_a_crash_the_files_are_those_of_an_undisturbed_fit(tmp_path):
    def logs(name):
        folder = tmp_path / name
        return [Metrics(), LogCSV(folder / "log.csv", every=1), LogJSON(folder / "log.jsonl", every=1)]

    def texts(name):
        steps = (tmp_path / name / "log.steps.csv").read_text()
        rows = [{**row, "seconds": 0} for row in read(tmp_path / name / "log.csv")]
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        return steps, rows, [{**line, "seconds": 0} for line in lines]

    classifier(*logs("whole"), n=20).fit(2)
    checkpoint = Checkpoint(tmp_path / "a.ckpt", batches=2)
    with pytest.raises(KeyboardInterrupt):
        classifier(*logs("again"), checkpoint, Ends(), n=20).fit(2)
    assert texts("again") != texts("whole")
    learner = classifier(*logs("again"), checkpoint, n=20)
    assert checkpoint.resume(learner)
    learner.fit(2)
    assert texts("again") == texts("whole")


def test_another_fit_begins_the_files_anew(tmp_path):
    learner = classifier(Metrics(), LogCSV(tmp_path / "log.csv", every=1), LogJSON(tmp_path / "log.jsonl"), n=20)
    learner.fit(3)
    learner.fit(1)
    assert len(read(tmp_path / "log.csv")) == 1
    assert len(read(tmp_path / "log.steps.csv")) == 5
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_tensorboard_has_all_figures_and_hides_what_a_crash_left(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    checkpoint, recorder = Checkpoint(tmp_path / "a.ckpt", batches=3), Recorder()
    with pytest.raises(KeyboardInterrupt):
        classifier(Metrics(), LogTensorBoard(tmp_path / "tb", every=1), checkpoint, Ends(), recorder, n=20).fit(2)
    learner = classifier(Metrics(), LogTensorBoard(tmp_path / "tb", every=1), checkpoint, recorder, n=20)
    assert checkpoint.resume(learner)
    history = learner.fit(2)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "lr", "epoch", "train/loss", "valid/loss", "seconds"}
    losses = events.Scalars("loss")
    assert [one.step for one in losses] == list(range(1, 11))
    assert [one.value for one in losses] == pytest.approx(recorder.losses)
    assert [one.value for one in events.Scalars("valid/loss")] == pytest.approx([r["valid"]["loss"] for r in history])


def test_without_tensorboard_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match=r"LogTensorBoard needs tensorboard, which is not installed"):
        LogTensorBoard(tmp_path)


def test_a_history_without_rows_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"LogCSV: the history is empty. Put Metrics\(\) among the callbacks"):
        classifier(LogCSV(tmp_path / "log.csv")).fit(1)


def test_where_it_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    for log in (LogCSV(tmp_path / "file" / "log.csv"), LogJSON(tmp_path / "file" / "log.jsonl")):
        with pytest.raises(InputError, match=r"log.* cannot be written: .* Choose another folder"):
            classifier(Metrics(), log).fit(1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LogCSV(3), "path=3 is not usable. Accepted: a path"),
        (lambda: LogJSON("a", every=0), "every=0 is not usable. Accepted: a whole number from 1, or None"),
        (lambda: LogWandb("run"), r"run='run' is not usable. Accepted: a run with log.* Write wandb.init"),
        (lambda: LogWandb(Run), "run=.* is not usable"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()

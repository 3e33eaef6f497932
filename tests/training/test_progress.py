"""What a fit prints: plain lines in a log, a bar that goes away on a terminal."""

import io
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from normlab.errors import InputError
from normlab.training import Callback, Learner, Metrics, ScheduleParameter, ShowProgress, accuracy, progress
from normlab.training.schedules import constant

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Fails(Callback):
    def after_loss(self) -> None:
        raise ZeroDivisionError


def learner(console: Console, *callbacks: Callback, metrics: bool = True, valid: bool = True, sized: bool = True):
    torch.manual_seed(0)
    model = nn.Linear(2, 2)
    batch = torch.ones(2, 2), torch.tensor([0, 1])
    train = [batch] * 3
    return Learner(
        model,
        train if sized else Unsized(train),
        [batch] * 2 if valid else None,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[ShowProgress(console), *([Metrics(accuracy=accuracy)] if metrics else []), *callbacks],
    )


class Unsized:
    def __init__(self, batches: list):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


@pytest.fixture
def clock(monkeypatch):
    """A clock that says later by `clock.step` seconds each time it is asked."""
    clock = SimpleNamespace(now=0.0, step=0.0)

    def monotonic() -> float:
        clock.now += clock.step
        return clock.now

    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=monotonic))
    return clock


def test_a_line_an_epoch_in_a_log():
    log = io.StringIO()
    history = learner(Console(file=log)).fit(2)
    lines = log.getvalue().splitlines()
    assert len(lines) == 2
    for line, row in zip(lines, history, strict=True):
        parts = "  ".join(
            f"{part}: loss {row[part]['loss']:.4f}, accuracy {row[part]['accuracy']:.4f}" for part in ("train", "valid")
        )
        assert line == f"epoch {row['epoch']}  {parts}  ({row['seconds']:.1f} s)"
    assert "\x1b" not in log.getvalue()


def test_a_long_line_stays_one_line():
    log = io.StringIO()
    learner(Console(file=log, width=40)).fit(1)
    assert log.getvalue().count("\n") == 1


def test_without_validation_only_the_training_figures():
    log = io.StringIO()
    learner(Console(file=log), valid=False).fit(1)
    assert re.fullmatch(r"epoch 1  train: loss \d\.\d{4}, accuracy \d\.\d{4}  \(0\.\d s\)\n", log.getvalue())


def test_without_metrics_nothing_is_said():
    log = io.StringIO()
    learner(Console(file=log), metrics=False).fit(1)
    assert log.getvalue() == ""


@pytest.mark.parametrize(("sized", "total"), [(True, " of 3"), (False, "")])
def test_a_line_every_half_minute_in_a_log(clock, sized, total):
    log = io.StringIO()
    clock.step = 15.0
    learner(Console(file=log), metrics=False, sized=sized).fit(2)
    lines = [re.sub(r"\d\.\d{4}", "…", line) for line in log.getvalue().splitlines()]
    assert lines == [
        f"epoch 1/2 train: batch 2{total}, loss …",
        "epoch 1/2 valid: batch 1 of 2, loss …",
        f"epoch 2/2 train: batch 1{total}, loss …",
        f"epoch 2/2 train: batch 3{total}, loss …",
        "epoch 2/2 valid: batch 2 of 2, loss …",
    ]


@pytest.mark.parametrize(("sized", "total"), [(True, "3"), (False, "?")])
def test_a_bar_on_a_terminal(clock, sized, total):
    screen = io.StringIO()
    clock.step = 1.0
    console = Console(file=screen, force_terminal=True, width=100, _environ={})
    learner(console, BarAtOnce(), sized=sized).fit(1)
    text = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert re.search(rf"epoch 1/1 train .*3/{total}", text)
    assert re.search(r"epoch 1/1 valid .*2/2", text)
    assert text.count(HIDE_CURSOR) == text.count(SHOW_CURSOR) == 1
    assert re.search(r"epoch 1  train: loss \d\.\d{4}, accuracy \d\.\d{4}  valid: loss", text)
    last_bar = text.rindex("epoch 1/1")
    assert text.index(SHOW_CURSOR) > last_bar
    assert "\x1b[2K" in text[last_bar:]  # the bar is wiped away


class BarAtOnce(Callback):
    """Draws the bar after each batch, rather than ten times a second."""

    order = 20

    def begin_fit(self) -> None:
        self.shown = next(c for c in self.learner.callbacks if isinstance(c, ShowProgress))

    def after_batch(self) -> None:
        self.shown._bar.refresh()


def test_a_failure_leaves_the_terminal_in_order():
    screen = io.StringIO()
    with pytest.raises(ZeroDivisionError):
        learner(Console(file=screen, force_terminal=True), Fails()).fit(1)
    assert screen.getvalue().count(HIDE_CURSOR) == screen.getvalue().count(SHOW_CURSOR) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_before_the_first_batch_is_told_as_it_is(terminal):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with pytest.raises(InputError, match="name='warmth' is unknown"):
        learner(console, ScheduleParameter("warmth", constant(1.0))).fit(1)


def test_a_second_fit_is_shown_like_the_first():
    log = io.StringIO()
    trained = learner(Console(file=log))
    trained.fit(1)
    trained.fit(1)
    assert [line[:7] for line in log.getvalue().splitlines()] == ["epoch 1", "epoch 1"]


def test_importing_the_room_leaves_random_numbers_as_they_were():
    """A training that diagnoses or prints a report in between draws what it would have drawn without."""
    code = (
        "import random; random.seed(0); state = random.getstate(); import normlab, torch;"
        "report = normlab.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(2)), 'running').report;"
        "str(report), str(normlab.diagnose(torch.nn.BatchNorm2d(2), 2 * [torch.randn(2, 2, 3, 3)]));"
        "assert random.getstate() == state"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

"""What is seen of a running study: on a terminal of 80 columns, and in a log."""

import re
from io import StringIO

import pytest
from rich.console import Console

from normlab.study import display
from normlab.study.display import Lines, View, outcome, plain, show
from normlab.study.executors import Job
from normlab.study.record import Record

LABEL = "running   batch 512  lr 0.4   seed 0"


def job(key: str, label: str = LABEL, cost: float = 1.0) -> Job:
    return Job(key, label, cost, lambda tell: Record(key, {}, "finished"), {})


def finished(key: str) -> Record:
    return Record(key, {}, "finished", epochs=[{"valid": {"accuracy": 0.5}}], seconds=3.0)


def seen(view: View) -> list[str]:
    with view.console.capture() as captured:
        view.console.print(view)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", captured.get()).splitlines()


def terminal(height: int = 24) -> Console:
    return Console(file=StringIO(), width=80, height=height, force_terminal=True)


def text(console: Console) -> str:
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_view_says_what_runs_where_and_how_far_it_is():
    jobs = [job(key) for key in "abc"]
    view = View(jobs, terminal())
    view.begin(jobs[0], "process 1234")
    view.begin(jobs[1], "a-machine-with-a-very-long-name.example.org")
    view.tell(jobs[0], 0.5)
    first, second, last = seen(view)
    assert first.startswith(LABEL)
    assert "process 1234" in first
    assert first.endswith("50%")
    assert second.endswith("0%")
    assert len(first) == len(second) == 80
    assert re.match(r"0 of 3 runs, 17%, 0:00, about 0:00 left", last)
    view.end(jobs[0], finished("a"))
    view.end(jobs[1], Record("b", {}, "diverged", diverged_at_step=7))
    (line,) = seen(view)
    assert line.startswith("2 of 3 runs (1 diverged), 50%")
    assert f"{LABEL}  0.5000  (3 s)" in text(view.console)


def test_more_runs_than_the_terminal_has_lines():
    jobs = [job(str(number)) for number in range(50)]
    view = View(jobs, terminal(height=10))
    for one in jobs:
        view.begin(one, "here")
    lines = seen(view)
    assert len(lines) < 10
    assert "and 44 more" in lines[-2]


def test_a_run_that_is_lost_is_said_and_leaves_the_view():
    one = job("a")
    view = View([one], terminal())
    view.lose(one, "its machine is gone")  # before it said that it began
    view.begin(one, "here")
    view.tell(one, 0.5)
    view.lose(one, "its machine is gone")
    assert text(view.console).count("is made again: its machine is gone") == 2
    assert len(seen(view)) == 1
    assert view.share == 0


@pytest.mark.parametrize("console", [terminal(), Console(file=StringIO(), width=80)], ids=["terminal", "log"])
def test_what_others_wrote_is_shown_as_it_is_and_commands_nothing(console):
    one = job("a", label="norm [red]x[/red] [/y]\x1b[2J")
    with show([one], console) as shown:
        shown.begin(one, "[/here]")
        shown.tell(one, 0.1)
        shown.end(one, Record("a", {}, "failed", error="[/__w/pytorch/gloo.cc:5] Read\nerror \x1b]0;title\x07"))
    assert "norm [red]x[/red] [/y] [2J" in text(console)
    assert "failed: [/__w/pytorch/gloo.cc:5] Read error  ]0;title" in text(console)
    assert "\x1b[2J" not in text(console)
    assert "\x1b]0" not in text(console)


def test_a_log_has_a_line_now_and_then(monkeypatch):
    monkeypatch.setattr(display, "LINE_SECONDS", 0.0)
    jobs = [job("a", cost=3.0), job("b")]
    lines = Lines(jobs, Console(file=StringIO(), width=200))
    lines.tell(jobs[0], 0.5)
    assert text(lines.console).startswith("0 of 2 runs, 38%, 0:00")


def test_outcomes_in_words():
    assert outcome(finished("a")) == "0.5000  (3 s)"
    assert outcome(Record("a", {}, "finished")) == "no accuracy"
    assert outcome(Record("a", {}, "failed")) == "failed: unknown"
    assert plain("a\tb\nc") == "a b c"

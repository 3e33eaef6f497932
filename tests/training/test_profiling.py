"""The profiler: which batches it sees, and what it writes."""

import json

import pytest

from learners import classifier
from normlab.errors import InputError
from normlab.training import Profile


def test_it_writes_a_trace_of_so_many_batches(tmp_path):
    path = tmp_path / "new" / "trace.json"
    profiler = Profile(path, skip=2, batches=3)
    classifier(profiler, n=40).fit(1)
    events = json.loads(path.read_text())["traceEvents"]
    steps = {event["name"] for event in events if str(event.get("name", "")).startswith("ProfilerStep")}
    assert steps == {f"ProfilerStep#{number}" for number in (2, 3, 4)}
    table = profiler.table(5)
    assert "aten::" in table


def test_a_shorter_epoch_gives_what_there_was(tmp_path):
    profiler = Profile(skip=1, batches=100)
    classifier(profiler, n=20).fit(2)
    assert "aten::linear" in profiler.table(100)


def test_nothing_profiled_is_said():
    profiler = Profile(skip=50)
    classifier(profiler, n=8).fit(1)
    with pytest.raises(InputError, match=r"nothing was profiled. Fit 60 training batches or more"):
        profiler.table()


def test_each_fit_profiles_anew_and_after_a_failure_too():
    profiler = Profile(skip=1, batches=2)
    learner = classifier(profiler, n=40)
    learner.loss_func = lambda output, targets: 1 / 0
    with pytest.raises(ZeroDivisionError):
        learner.fit(1)
    learner.loss_func = lambda output, targets: output.sum()
    learner.fit(1)
    assert "aten::sum" in profiler.table(100)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": 3}, "path=3 is not usable. Accepted: a path"),
        ({"skip": 0}, "skip=0 is not usable. Accepted: a whole number from 1"),
        ({"batches": 1.5}, "batches=1.5 is not usable"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        Profile(**options)

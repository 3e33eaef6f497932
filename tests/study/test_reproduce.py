"""The recorded runs: what the rows run, and what a verdict says."""

from io import StringIO

import pytest
import torch
from rich.console import Console

from normlab.errors import InputError
from normlab.study import reproduce as module
from normlab.study.record import Record
from normlab.study.reproduce import AS_RECORDED, ROWS, make_job, reproduce, run_row, verdict
from normlab.study.store import RunStore

BY_ID = {row.id: row for row in ROWS}


def run(accuracy: float | None) -> Record:
    status = "diverged" if accuracy is None else "finished"
    return Record("R1-0", {}, status, diverged_at_step=5, epochs=[{"valid": {"accuracy": accuracy}}])


@pytest.mark.parametrize(
    ("row", "finals", "said"),
    [
        ("R3", [0.97, 0.98, 0.99], AS_RECORDED),
        ("R3", [0.97, 0.98, 0.9699], "as recorded on 2 of 3"),
        ("R3", [0.97, 0.98, None], "as recorded on 2 of 3"),
        ("R3", [0.97, 0.98], "2 of 3 seeds run"),
        ("R1", [0.95, 0.94, None], AS_RECORDED),
        ("R1", [0.95, 0.93, None], "as recorded on 1 of 3"),
        ("R9", [0.2, None, 0.49], AS_RECORDED),
        ("R9", [0.2, None, 0.97], "as recorded on 2 of 3"),
        ("R6", [None, 0.98, 0.98], AS_RECORDED),
        ("R6", [0.97, 0.98, 0.98], "as recorded on 0 of 3"),
    ],
)
def test_a_verdict_counts_the_seeds_that_behave(row, finals, said):
    assert verdict(BY_ID[row], [run(final) for final in finals], 3) == said


def test_the_rows_are_those_of_the_lesson():
    assert [row.id for row in ROWS] == [
        "R1",
        "R2",
        "R3",
        "R4",
        "R5",
        "R6",
        "R7",
        "R8a",
        "R8b",
        "R9",
        "R10",
        "R11",
        "R12",
    ]
    assert BY_ID["R12"].text == "running batch norm, bs 32, lr 1→0.2, 1 epoch"
    assert BY_ID["R1"].text == "no norm, bs 512, lr 0.4, 2 epochs"


@pytest.fixture
def few_images(monkeypatch):
    """The same data, less of it: 1,024 and 512 images."""
    train, valid = module._datasets()
    few = module.lesson.Dataset(*train[:1024]), module.lesson.Dataset(*valid[:512])
    monkeypatch.setattr(module, "_datasets", lambda: few)


@pytest.mark.parametrize("id", [row.id for row in ROWS])
def test_every_row_runs_in_the_lesson_vocabulary(id, few_images):
    record = run_row(BY_ID[id], 0)
    row = BY_ID[id]
    assert record.parameters == {"R1": 62_090, "R2": 62_090, "R6": 62_090 + 10, "R7": 62_274 + 184}.get(id, 62_274)
    if record.status == "finished":
        assert record.steps == row.epochs * 1024 / row.bs
        assert len(record.epochs) == row.epochs
    else:
        assert record.diverged_at_step <= record.steps


def test_the_schedule_of_a_row_reaches_the_optimizer(few_images, monkeypatch):
    rates = []
    monkeypatch.setattr(
        module.lesson.Recorder,
        "after_fit",
        lambda self: rates.extend(self.lrs[0]),
        raising=False,
    )
    run_row(BY_ID["R12"], 0)
    assert rates[0] == 1.0
    assert rates[-1] == pytest.approx(1.0 - 0.8 * 31 / 32)
    torch.testing.assert_close(torch.tensor(rates).diff(), torch.full((31,), -0.8 / 32))


def test_what_is_kept_is_shown_and_not_run_again(tmp_path, few_images):
    store = RunStore(tmp_path / "runs.jsonl")
    store.append(run_row(BY_ID["R7"], 0))
    store.append(run_row(BY_ID["R1"], 0))
    before = store.path.read_bytes()
    console = Console(file=StringIO(), width=200)
    assert reproduce(tmp_path, rows=["R7"], seeds=[0], workers=1, console=console)
    assert not reproduce(tmp_path, rows=["R7", "R1"], seeds=[0], workers=1, console=console)
    assert store.path.read_bytes() == before
    table = (tmp_path / "table.md").read_text()
    assert "| R7 | instance norm, bs 512, lr 0.1, 3 epochs |" in table
    assert AS_RECORDED in table
    assert "as recorded on 0 of 1" in table
    assert "R7" in console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_an_unknown_row_is_named(tmp_path):
    with pytest.raises(InputError, match=r"rows='R13' is unknown\. Did you mean"):
        reproduce(tmp_path, rows=["R13"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, r"seeds=\[\] is not usable. Accepted: one whole number"),
        ({"seeds": [0.5]}, r"seeds=\[0.5\] is not usable"),
        ({"workers": 0}, "workers=0 is not usable. Accepted: a whole number from 1"),
    ],
)
def test_no_seeds_and_no_workers_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        reproduce(tmp_path, rows=["R7"], **options)


def test_running_rows_cost_most_so_that_they_start_first():
    assert make_job(BY_ID["R11"], 0).cost > make_job(BY_ID["R9"], 0).cost > make_job(BY_ID["R1"], 0).cost

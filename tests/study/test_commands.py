"""`normlab study …`, as its user meets it."""

import sys
from pathlib import Path

import pytest

from normlab import cli
from normlab.study.plan import Plan
from normlab.study.store import RunStore

PLAN = 'norms = ["batch", "group"]\nbatch_sizes = [10]\nlrs = [0.1, 0.2]\nseeds = [0]\nimages = 2500\n'


@pytest.fixture
def normlab(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder: its exit status, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["normlab", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        return int(end.value.code or 0), out, err

    return run


def test_a_study_from_its_file_to_the_plan_that_confirms_it(normlab):
    Path("plan.toml").write_text(PLAN)
    status, out, _ = normlab("study", "run", "plan.toml", "--out", "mine", "--workers", "1")
    assert status == 0
    assert "group" in out
    assert len(RunStore("mine/runs.jsonl").read()) == 4
    page = Path("mine/report.html").read_bytes()
    Path("mine/report.html").unlink()

    status, again, _ = normlab("study", "report", "mine")
    assert status == 0
    assert "mine/report.html" in again
    assert abs(len(Path("mine/report.html").read_bytes()) - len(page)) < 100  # but for the command

    status, out, _ = normlab("study", "confirm", "mine", "--seeds", "1", "2")
    assert (status, out.strip()) == (0, "4 runs: confirm.toml")
    plan = Plan.read("confirm.toml")
    assert [one["norm"] for one in plan.settings] == ["batch", "group"]
    assert plan.images == 2500


def test_options_and_a_file_say_the_same(normlab):
    """And not both at once."""
    Path("plan.toml").write_text(PLAN)
    options = ["--norms", "batch", "group", "--batch-sizes", "10", "--lrs", "0.1", "0.2", "--images", "2500"]
    status, _, err = normlab("study", "run", *options, "--out", "mine", "--workers", "1")
    assert (status, err) == (0, "")
    assert Plan.read("mine/plan.toml").trials() == Plan.read("plan.toml").trials()
    status, _, err = normlab("study", "run", "plan.toml", "--lrs", "0.1")
    assert status == 2
    assert "plan='a file and options' is not usable. Accepted: one of them. Write the options into plan.toml." in err


@pytest.mark.parametrize("command", ["report", "confirm"])
def test_a_folder_without_a_study_is_said(normlab, command):
    status, _, err = normlab("study", command, "nowhere")
    assert status == 2
    assert "nowhere/plan.toml cannot be read: No such file or directory" in err

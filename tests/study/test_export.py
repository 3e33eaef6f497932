"""A study for other programs and for papers, and several stores made one."""

import csv
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from normlab.errors import InputError
from normlab.study.export import export, latex_table, merge, rows
from normlab.study.record import Record
from normlab.study.store import RunStore, lock_folder
from records import record, study

HOSTILE = r"50%_of {all} & $x^2$ #1 ~ \input{/etc/passwd} <b>"


def of_csv(path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_has_a_line_for_each_run(tmp_path):
    records = study()
    table = of_csv(export(records, tmp_path / "new" / "runs.csv"))
    assert len(table) == len(records) == 24
    for row, one in zip(table, records, strict=True):
        assert (row["key"], row["norm"], row["seed"]) == (one.key, one.settings["norm"], str(one.settings["seed"]))
        assert row["status"] == one.status
        assert (row["value"] or None) == (None if one.result is None else str(one.result))
        assert row["metric"] == "accuracy"
        assert row["metrics"] == "accuracy"
    assert {row["diverged_at_step"] for row in table} == {"", "41", "42", "43"}
    assert table[0]["threads"] == "2"


def test_what_a_run_lacks_is_empty_and_of_equal_keys_the_last_counts(tmp_path):
    failed = Record("a", {"norm": "batch"}, "failed", error='ValueError: "no",\nnever')
    ended = record(0.5, metrics=["dice"])
    again = replace(ended, epochs=[{"epoch": 1, "train": None, "valid": {"dice": 0.75, "loss": 0.5}}])
    table = of_csv(export([failed, ended, again], tmp_path / "runs.csv"))
    assert [row["valid_dice"] for row in table] == ["", "0.75"]
    assert [row["value"] for row in table] == ["", "0.75"]
    assert table[0]["error"] == 'ValueError: "no",\nnever'


def test_parquet_has_the_same_rows(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    records = [*study(), Record("a", {"norm": "batch"}, "failed", error="no")]
    assert parquet.read_table(export(records, tmp_path / "runs.parquet")).to_pylist() == rows(records)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'normlab\[export\]'"):
        export(study(), tmp_path / "runs.parquet")


def test_other_suffixes_and_nothing_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"'\.cvs' is unknown. Did you mean '\.csv'"):
        export(study(), tmp_path / "runs.cvs")
    with pytest.raises(InputError, match="one record or more"):
        export([], tmp_path / "runs.csv")
    assert not list(tmp_path.iterdir())


def body(table: str) -> list[list[str]]:
    """The cells of the lines between the rules."""
    lines = table.partition("\\toprule\n")[2].partition("\\bottomrule")[0].splitlines()
    return [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in lines if line != r"\midrule"]


def test_the_table_for_a_paper():
    table = latex_table(study())
    head, *lines = body(table)
    assert head == ["norm", "learning rate", "batch 2", "batch 32"]
    assert [line[:2] for line in lines] == [["batch", "0.1"], ["batch", "1"], ["running", "0.1"], ["running", "1"]]
    assert all(len(line) == 4 for line in lines)
    assert lines[3][2] == "3 of 3 diverged"
    for column in (2, 3):
        assert [line[column].startswith(r"\textbf{0.97") for line in lines] == [False, False, True, False]
    assert re.fullmatch(r"0\.96\d+ \[0\.9\d+, 0\.9\d+\]\$\^\\dagger\$", lines[0][3])
    assert r"\begin{tabular}{llrr}" in table
    assert "seeds 0, 1, 2" in table


def test_columns_of_different_data_are_apart():
    records = [
        record(0.9 + 0.01 * i, norm=norm, seed=i, data=d) for norm in ("a", "b") for i in (0, 1) for d in ("x", "y")
    ]
    head, *lines = body(latex_table(records))
    assert head == ["norm", "data x, batch 2", "data y, batch 2"]
    assert len(lines) == 2


def hostile() -> list[Record]:
    return [record(0.9 + 0.01 * seed, norm=norm, seed=seed) for norm in (HOSTILE, "batch_[norm]") for seed in range(4)]


def test_signs_that_mean_something_are_escaped():
    line = body(latex_table(hostile()))[1:]
    assert line[0][0] == (
        r"50\%\_of \{all\} \& \$x\textasciicircum{}2\$ \#1 \textasciitilde{} "
        r"\textbackslash{}input\{/etc/passwd\} \textless{}b\textgreater{}"
    )
    assert all(len(one) == 2 for one in line)


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no LaTeX here")
@pytest.mark.parametrize("make", [study, hostile])
def test_the_table_compiles(tmp_path, make):
    document = (
        rf"\documentclass{{article}}\usepackage{{booktabs}}\begin{{document}}{latex_table(make())}\end{{document}}"
    )
    (tmp_path / "paper.tex").write_text(document)
    run = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-draftmode", "paper.tex"]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


# --- merge ----------------------------------------------------------------------------------------------------------


def stored(folder, *records):
    for one in records:
        RunStore(folder / "runs.jsonl").append(one)
    return folder


def test_stores_of_several_machines_become_one_and_equal_runs_come_once(tmp_path):
    runs = study()
    first, second = stored(tmp_path / "first", *runs[:14]), stored(tmp_path / "second", *runs[10:])
    elsewhere = replace(runs[3], seconds=99.0, machine={"cpu": "another", "threads": 8}, finished_at="later")
    third = stored(tmp_path / "third", elsewhere)
    merged = merge([first, second, third], tmp_path / "all")
    assert merged == RunStore(tmp_path / "all" / "runs.jsonl").read() == runs
    assert merge([first, third], tmp_path / "all") == runs
    assert len(RunStore(first / "runs.jsonl").read()) == 14
    assert not (tmp_path / "all" / "plan.toml").exists()


def test_a_plan_that_the_folders_share_comes_along(tmp_path):
    first, second = stored(tmp_path / "first", *study()[:2]), stored(tmp_path / "second", *study()[2:])
    (first / "plan.toml").write_text("seeds = [0]\n")
    merge([first, second], tmp_path / "all")
    assert (tmp_path / "all" / "plan.toml").read_text() == "seeds = [0]\n"
    (second / "plan.toml").write_text("seeds = [1]\n")
    merge([first, second], tmp_path / "other")
    assert not (tmp_path / "other" / "plan.toml").exists()


def test_a_failed_run_gives_way_and_what_out_holds_stays(tmp_path):
    ended, other = study()[:2]
    failed = Record(ended.key, ended.settings, "failed", error="no")
    out = stored(tmp_path / "out", other, failed)
    first, second = stored(tmp_path / "first", failed, ended), stored(tmp_path / "second", failed)
    assert merge([second, first], out) == [other, ended]
    assert merge([second], out) == [other, ended]


def test_conflicts_are_named_and_nothing_is_written(tmp_path):
    runs = [replace(one, made_by={"code": "one", "threads": "1"}) for one in study()[:8]]
    worse = {"epoch": 1, "train": {}, "valid": {"accuracy": 0.25}}
    others = [replace(one, epochs=[worse], made_by={"code": "two", "threads": "1"}) for one in runs]
    first, second = stored(tmp_path / "first", *runs), stored(tmp_path / "second", *others)
    with pytest.raises(InputError) as caught:
        merge([first, second], tmp_path / "all")
    text = str(caught.value)
    assert "8 runs ended otherwise in another folder" in text
    line = f"run {runs[0].key}: {runs[0].result:.4f} in {first}, 0.2500 in {second} (they differ in code)"
    assert line in text
    assert "and 3 more" in text
    assert not (tmp_path / "all" / "runs.jsonl").exists()


def test_a_folder_without_runs_and_one_in_use_are_refused(tmp_path):
    first = stored(tmp_path / "first", *study()[:1])
    with pytest.raises(InputError, match=r"a folder with runs\.jsonl"):
        merge([first, tmp_path / "none"], tmp_path / "all")
    with lock_folder(tmp_path / "all"), pytest.raises(InputError, match="in use"):
        merge([first], tmp_path / "all")

import io
import re

import pytest
from rich.console import Console

from normlab.errors import InputError
from normlab.study.table import terminal_table
from records import record, study


def text_of(table, width=160):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    console.print(table)
    return console.file.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_rows_are_norms_and_rates_and_columns_batch_sizes():
    table = terminal_table(study())
    assert [str(column.header) for column in table.columns] == ["norm", "learning rate", "batch 2", "batch 32"]
    rows = [line.split("│")[1:-1] for line in plain(text_of(table)).splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["batch", "0.1", "0.1110 ±0.0010, does not train", "0.9610 ±0.0010"],
        ["batch", "1", "0.1110 ±0.0010, does not train", "0.9410 ±0.0010"],
        ["running", "0.1", "0.9710 ±0.0010", "0.9710 ±0.0010"],
        ["running", "1", "3 of 3 diverged", "0.9510 ±0.0010"],
    ]


def test_the_best_of_each_batch_size_stands_out():
    text = text_of(terminal_table(study()))
    bold_green = re.findall(r"\x1b\[1;32m([^\x1b]*)", text)
    assert [cell.strip() for cell in bold_green] == ["0.9710 ±0.0010"] * 2


def test_nothing_stands_out_where_nothing_trains():
    assert "\x1b[1;32m" not in text_of(terminal_table([record(0.1)]))


def test_one_seed_has_no_deviation_and_one_divergence_its_step():
    text = plain(text_of(terminal_table([record(0.96), record(status="diverged", step=41, batch_size=1)])))
    assert "0.9600" in text
    assert "±" not in text
    assert "diverged at step 41" in text
    assert "learning rate 0.4" in " ".join(text.split()), "a setting that does not vary is in the caption"


def test_other_settings_that_vary_have_a_column():
    text = plain(text_of(terminal_table([record(0.96), record(0.97, clip=1.0)])))
    assert re.search(r"norm +┃ clip ", text)
    assert re.search(r"running │ none │ +0.9600", text)
    assert re.search(r"running │ 1 +│ +0.9700", text)


def test_names_are_not_read_as_markup():
    assert "[bold]x[/bold]" in plain(text_of(terminal_table([record(0.9, norm="[bold]x[/bold]")])))


def test_terminal_has_nothing_to_report():
    with pytest.raises(InputError, match="nothing to report"):
        terminal_table([])


def test_names_are_whole_in_80_columns():
    names = "running", "running_lesson", "evonorm_s0", "evonorm_b0"
    records = [record(0.9, norm=name, batch_size=size) for name in names for size in (1, 2, 4, 8, 16, 32, 64, 128)]
    text = plain(text_of(terminal_table(records), width=80))
    assert "…" not in text
    column = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert column == "".join(sorted(names))

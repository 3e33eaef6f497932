import io
import re

import pytest
from rich.console import Console

from normlab.errors import InputError
from normlab.study.summary import summarize
from normlab.study.table import terminal_table
from normlab.study.verdicts import conclusions
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
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in plain(text_of(table)).splitlines() if "│" in line
    ]
    assert rows == [
        ["batch", "0.1", "0.1110 ±0.0010", "0.9610 ±0.0010"],
        ["", "", "0.1085 to 0.1135", "0.9585 to 0.9635"],
        ["", "", "does not train", "not told apart"],
        ["", "", "not told apart", ""],
        ["batch", "1", "0.1110 ±0.0010", "0.9410 ±0.0010"],
        ["", "", "0.1085 to 0.1135", "0.9385 to 0.9435"],
        ["", "", "does not train", ""],
        ["running", "0.1", "0.9710 ±0.0010", "0.9710 ±0.0010"],
        ["", "", "0.9685 to 0.9735", "0.9685 to 0.9735"],
        ["", "", "best mean", "best mean"],
        ["running", "1", "3 of 3 diverged", "0.9510 ±0.0010"],
        ["", "", "", "0.9485 to 0.9535"],
    ]


def test_the_best_of_each_batch_size_stands_out():
    text = text_of(terminal_table(study()))
    bold_green = re.findall(r"\x1b\[1;32m([^\x1b]*)", text)
    assert [cell.strip() for cell in bold_green] == ["0.9710 ±0.0010"] * 2 + ["0.9685 to 0.9735"] * 2 + [
        "best mean"
    ] * 2


def test_a_norm_that_is_worse_says_so_in_red():
    runs = [record(0.9 + 0.01 * (norm == "group"), norm=norm, seed=s) for norm in ("group", "batch") for s in range(6)]
    text = text_of(terminal_table(runs))
    assert "worse" in [cell.strip() for cell in re.findall(r"\x1b\[31m([^\x1b]*)", text)]


def test_tiny_losses_can_be_told_apart():
    """Their intervals and differences too."""
    runs = [
        record(1 - loss / 3, norm=norm, seed=seed, metrics=["loss"], lower=True)
        for norm, losses in (("group", 1e-6), ("batch", 4e-6))
        for seed, loss in enumerate(losses * (1 + 0.1 * place) for place in range(6))
    ]
    text = plain(text_of(terminal_table(runs)))
    assert "1.25e-06 ±1.871e-07" in text
    assert "0.0000" not in text
    (line,) = conclusions(summarize(runs))
    assert line.startswith("batch 2: group has the best loss, 1.25e-06 (")
    assert "Worse: batch by 3.75e-06." in line


def test_one_norm_has_no_verdict():
    text = plain(text_of(terminal_table([record(0.9, lr=lr, seed=seed) for lr in (0.1, 0.4) for seed in range(3)])))
    assert "best" not in text
    assert "sign-flip" not in text


def test_the_caption_says_what_interval_and_verdict_are():
    def caption(records):
        return " ".join(plain(text_of(terminal_table(records))).split())

    assert "Mean ± sample standard deviation. Interval of the mean in 95 of 100 studies: Student's" in caption(study())
    assert "Each norm is judged at its best setting. These runs chose it" in caption(study())
    one_rate = [run for run in study() if run.settings["lr"] == 0.1]
    assert "sign-flip test paired by seed, corrected after Holm" in caption(one_rate)
    assert "chose" not in caption(one_rate), "there was one setting"
    assert caption([record(0.9)]).endswith("seed 0.")


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


def test_names_do_not_command_the_terminal():
    """Neither in the table nor in what is said of it."""
    evil = "\x1b[2Jx\r\n\x07"
    runs = [record(0.9 + 0.01 * seed, norm=norm, seed=seed) for norm in (evil, "batch") for seed in range(3)]
    text = plain(text_of(terminal_table(runs)))
    assert "�[2Jx���" in text
    lines = conclusions(summarize(runs))
    assert "�[2Jx���" in lines[0]
    for said in (text, *lines):
        assert not {"\x1b", "\r", "\x07"} & set(said)


def test_terminal_has_nothing_to_report():
    with pytest.raises(InputError, match="nothing to report"):
        terminal_table([])


def test_six_norms_at_three_batch_sizes_fit_80_columns():
    """Each figure, interval and verdict is in one piece."""
    norms = "none", "batch", "group", "layer", "running_lesson", "evonorm_s0"
    runs = [
        record(0.9 + 0.01 * place + 0.001 * (seed * (place + 3) % 7), norm=norm, batch_size=size, seed=seed)
        for place, norm in enumerate(norms)
        for size in (2, 32, 512)
        for seed in range(10)
    ]
    runs += [record(None, "diverged", step=9, norm="none", batch_size=2, seed=seed) for seed in range(2)]
    lines = plain(text_of(terminal_table(runs), width=80)).splitlines()
    assert max(map(len, lines)) <= 80
    cells = [cell.strip() for line in lines if "│" in line for cell in line.split("│")[1:-1]]
    assert sum(bool(re.fullmatch(r"0\.\d{4} ±0\.\d{4}", cell)) for cell in cells) == 18
    assert sum(bool(re.fullmatch(r"0\.\d{4} to 0\.\d{4}", cell)) for cell in cells) == 18
    assert cells.count("best mean") == 3
    assert cells.count("worse") + cells.count("not told apart") == 15
    assert cells.count("2 of 10 diverged") == 1


def test_names_are_whole_in_80_columns():
    names = "running", "running_lesson", "evonorm_s0", "evonorm_b0"
    records = [record(0.9, norm=name, batch_size=size) for name in names for size in (1, 2, 4, 8, 16, 32, 64, 128)]
    text = plain(text_of(terminal_table(records), width=80))
    assert "…" not in text
    column = "".join(line.split("│")[1].strip() for line in text.splitlines() if line.startswith("│"))
    assert column == "".join(sorted(names))

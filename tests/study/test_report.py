import io
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from normlab.errors import InputError
from normlab.study.plan import Trial, grid
from normlab.study.report import COLOURS, terminal_table, write_html, write_png

EVIL = "</script><script>document.title='broken'</script>"


def record(accuracy=None, status="finished", step=None, error=None, points=100, **settings):
    trial = Trial(**settings)
    loss = None if accuracy is None else 3 * (1 - accuracy)
    last = loss or 1.0
    figures = {"loss": loss, "accuracy": accuracy}
    return {
        "key": trial.key,
        "settings": vars(trial).copy(),
        "status": status,
        "diverged_at_step": step,
        "error": error,
        "epochs": [{"epoch": 1, "train": figures, "valid": figures}],
        "curve": {
            "step": list(range(10, 10 * points + 1, 10)),
            "loss": [last + 2 * math.exp(-i / 9) for i in range(points - 1)] + [None if status == "diverged" else last],
        },
        "steps": 10 * points,
        "seconds": 12.5,
        "parameters": 2916,
        "versions": {"normlab": "0.1.0", "torch": "2.13.0", "python": "3.11.2", "numpy": "2.4.6"},
        "machine": {"cpu": "Imaginary 9000", "threads": 2},
        "finished_at": "2026-03-01T10:11:12+00:00",
    }


def study():
    """Two norms, batch sizes and rates, three seeds: batch norm does not train at batch 2, running diverges at lr 1."""
    runs = []
    for trial in grid(["batch", "running"], [2, 32], [0.1, 1.0], [0, 1, 2], Trial()):
        settings = vars(trial).copy()
        if trial.norm == "running" and trial.lr == 1.0 and trial.batch_size == 2:
            runs.append(record(status="diverged", step=41 + trial.seed, **settings))
        elif trial.norm == "batch" and trial.batch_size == 2:
            runs.append(record(0.11 + 0.001 * trial.seed, **settings))
        else:
            bonus = 0.01 if trial.norm == "running" else 0.0
            runs.append(record(0.96 + bonus - 0.02 * (trial.lr == 1.0) + 0.001 * trial.seed, **settings))
    return runs


def text_of(table, width=160):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system="standard")
    console.print(table)
    return console.file.getvalue()


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


class TestTerminal:
    def test_rows_are_norms_and_rates_and_columns_batch_sizes(self):
        table = terminal_table(study())
        assert [str(column.header) for column in table.columns] == ["norm", "learning rate", "batch 2", "batch 32"]
        rows = [line.split("│")[1:-1] for line in plain(text_of(table)).splitlines() if line.startswith("│")]
        assert [[cell.strip() for cell in row] for row in rows] == [
            ["batch", "0.1", "0.1110 ±.0010, does not train", "0.9610 ±.0010"],
            ["batch", "1", "0.1110 ±.0010, does not train", "0.9410 ±.0010"],
            ["running", "0.1", "0.9710 ±.0010", "0.9710 ±.0010"],
            ["running", "1", "3 of 3 diverged", "0.9510 ±.0010"],
        ]

    def test_the_best_of_each_batch_size_stands_out(self):
        text = text_of(terminal_table(study()))
        bold_green = re.findall(r"\x1b\[1;32m([^\x1b]*)", text)
        assert [cell.strip() for cell in bold_green] == ["0.9710 ±.0010"] * 2

    def test_nothing_stands_out_where_nothing_trains(self):
        assert "\x1b[1;32m" not in text_of(terminal_table([record(0.1)]))

    def test_one_seed_has_no_deviation_and_one_divergence_its_step(self):
        text = plain(text_of(terminal_table([record(0.96), record(status="diverged", step=41, batch_size=1)])))
        assert "0.9600" in text
        assert "±" not in text
        assert "diverged at step 41" in text
        assert "learning rate 0.4" in " ".join(text.split()), "a setting that does not vary is in the caption"

    def test_other_settings_that_vary_have_a_column(self):
        text = plain(text_of(terminal_table([record(0.96), record(0.97, clip=1.0)])))
        assert re.search(r"norm +┃ clip ", text)
        assert re.search(r"running │ none │ +0.9600", text)
        assert re.search(r"running │ 1 +│ +0.9700", text)

    def test_names_are_not_read_as_markup(self):
        assert "[bold]x[/bold]" in plain(text_of(terminal_table([record(0.9, norm="[bold]x[/bold]")])))


class TestPng:
    def pixels(self, records, path):
        """How many pixels of the picture have a colour."""
        write_png(records, path)
        pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
        colours, counts = np.unique(pixels @ [65536, 256, 1], return_counts=True)
        return Counter({f"#{colour:06X}": count for colour, count in zip(colours, counts, strict=True)})

    def test_each_norm_has_its_colour_and_divergence_its_strip(self, tmp_path):
        drawn = self.pixels(study(), tmp_path / "all.png")
        assert min(drawn[COLOURS["running"]], drawn[COLOURS["batch"]]) > 500
        assert drawn[COLOURS["group"]] == 0
        fine = self.pixels([record(0.96), record(0.97, batch_size=32)], tmp_path / "fine.png")
        lost = self.pixels([record(0.96), record(status="diverged", step=3, batch_size=32)], tmp_path / "lost.png")
        assert lost["#EEEEEE"] > 1000 > fine["#EEEEEE"]

    @pytest.mark.parametrize(
        "runs",
        [
            [record(1.0)],
            [record(0.0)],
            [record(status="diverged", step=0, points=1)],
            [record(status="failed", error="no", points=1)],
            [record(0.9, norm=r"$\frac"), record(float("nan"), norm="_x")],
        ],
        ids=["perfect", "all wrong", "diverged at once", "failed", "odd names"],
    )
    def test_extreme_results_can_be_drawn(self, runs, tmp_path):
        write_png(runs, tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


class Page(HTMLParser):
    """The tags, addresses, visible text and data of a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.links, self.text, self.data, self.inside = [], [], [], None, None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = dict(attrs).get("id")
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        if self.inside == "data" and data.strip():
            self.data = json.loads(data)
        elif data.strip():
            self.text.append(data.strip())


@pytest.fixture
def page_of(tmp_path):
    def write(records, title="Study", command="normlab compare"):
        write_html(records, tmp_path / "study.html", title, command)
        return Page(tmp_path / "study.html")

    return write


class TestHtml:
    def test_nothing_is_fetched(self, page_of, tmp_path):
        page = page_of(study())
        assert page.links == ["data:,"]
        addresses = set(re.findall(r"\w+://[^\"' <)]+", (tmp_path / "study.html").read_text(encoding="utf-8")))
        assert addresses == {"http://www.w3.org/2000/svg"}, "the name of the SVG elements, never fetched"

    def test_hostile_text_stays_text(self, page_of):
        tags = page_of(study()).tags
        evil = [record(0.9, norm=EVIL), record(status="failed", error=EVIL, seed=1, norm=EVIL)]
        for run in evil:
            run["versions"]["torch"] = run["machine"]["cpu"] = EVIL
        page = page_of(evil, EVIL, EVIL)
        assert page.tags.count("script") == tags.count("script") == 2
        assert page.data["groups"][0]["settings"]["norm"] == EVIL
        assert page.text.count(EVIL) >= 3

    def test_states_hardware_versions_seeds_and_command(self, page_of):
        text = "\n".join(page_of(study(), command="normlab compare --seeds 0 1 2").text)
        assert "normlab compare --seeds 0 1 2" in text
        assert "Imaginary 9000, threads 2; normlab 0.1.0, torch 2.13.0, python 3.11.2, numpy 2.4.6" in text
        assert "Seeds 0, 1, 2." in text
        assert "Runs: 21 finished, 3 diverged." in text

    def test_data_hold_every_run_and_no_mean_of_a_divergence(self, page_of):
        data = page_of(study()).data
        assert len(data["runs"]) == 24
        lost = [group for group in data["groups"] if group["diverged_at"]]
        assert [(group["accuracy"], group["outcome"]) for group in lost] == [(None, "3 of 3 diverged")]
        run = next(run for run in data["runs"] if run["status"] == "diverged")
        assert (run["accuracy"], run["loss"], run["diverged_at"], run["curve"][-1]) == (None, None, 41, None)
        assert data["groups"][run["group"]]["settings"]["norm"] == "running"
        assert len(data["steps"][run["curve_steps"]]) == len(run["curve"]) == 100

    def test_results_can_be_read_without_script(self, page_of):
        text = page_of(study()).text
        assert text.count("3 of 3 diverged") == 1
        assert text.count("0.9710 ±.0010") == 2

    def test_axes_reach_around_what_is_drawn(self, page_of):
        data = page_of([record(0.98), record(0.1, norm="batch")]).data
        assert data["error_ticks"][0] < 0.02
        assert 0.9 <= data["error_ticks"][-1] <= 1
        assert data["loss_ticks"][0] < 0.06
        assert data["loss_ticks"][-1] >= 3 * 0.9 + 2

    def test_numbers_that_are_not_finite_are_null(self, page_of):
        run = record(0.9)
        run["curve"]["loss"][3] = run["seconds"] = float("nan")
        assert page_of([run]).data["runs"][0]["curve"][3] is None

    def test_two_thousand_runs_stay_small(self, page_of, tmp_path):
        norms = ["batch", "running", "group", "layer", "none"]
        trials = grid(norms, [1, 2, 8, 32, 512], [0.1, 0.2, 0.4, 1.0], list(range(20)), Trial())
        runs = [record(0.9 + 0.0004321 * trial.seed, **vars(trial)) for trial in trials]
        start = time.perf_counter()
        assert len(page_of(runs).data["runs"]) == 2000
        assert time.perf_counter() - start < 5
        assert (tmp_path / "study.html").stat().st_size < 3e6


@pytest.mark.parametrize("write", [write_png, lambda records, path: write_html(records, path, "t", "c")])
class TestFiles:
    def test_nothing_to_report(self, write, tmp_path):
        with pytest.raises(InputError, match="nothing to report"):
            write([], tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, write, tmp_path):
        (tmp_path / "file").write_text("kept")
        with pytest.raises(InputError, match=r"file/a cannot be written: .*Choose another folder"):
            write([record(0.9)], tmp_path / "file" / "a")
        assert (tmp_path / "file").read_text() == "kept"

    def test_a_failed_write_leaves_nothing_behind(self, write, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(InputError, match="cannot be written"):
            write([record(0.9)], tmp_path / "a")
        assert [entry.name for entry in tmp_path.iterdir()] == ["a"]

    def test_replaces_and_makes_folders(self, write, tmp_path):
        path = tmp_path / "new" / "a"
        write([record(0.9)], path)
        first = path.read_bytes()
        write([record(0.8), record(0.7, norm="batch")], path)
        assert path.read_bytes() != first
        assert [entry.name for entry in path.parent.iterdir()] == ["a"]


def test_terminal_has_nothing_to_report():
    with pytest.raises(InputError, match="nothing to report"):
        terminal_table([])


@pytest.fixture(scope="module")
def browser():
    program = os.environ.get("NORMLAB_CHROMIUM") or shutil.which("chromium")
    if not program:
        missing = "no browser: install chromium or name one in NORMLAB_CHROMIUM"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page of some records; at the end no error was logged and nothing but the page was asked for."""
    troubles, requests, pages = [], [], []

    def visit(records):
        path = tmp_path / "study.html"
        write_html(records, path, "Study", "normlab compare")
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    yield visit
    for page in pages:
        page.close()
    assert troubles == []
    assert {url for url in requests if not url.startswith("data:")} == {(tmp_path / "study.html").as_uri()}


def column(page, table, place):
    return page.locator(f"#{table} tbody tr td:nth-child({place})").all_inner_texts()


@pytest.mark.browser
class TestBrowser:
    def test_shows_every_result(self, visit):
        page = visit(study())
        heat = page.locator("#heat tbody tr").all_inner_texts()
        assert [row.split()[0] for row in heat] == ["batch", "running"]
        assert page.locator("#heat .leader").all_inner_texts() == ["0.9710 ±.0010\nlearning rate 0.1"] * 2
        assert "does not train" in heat[0]
        assert page.locator("#runs tbody tr").count() == 24
        assert page.locator("#curves .curve").count() == 24
        assert page.locator("#curves .cross").count() == 3
        assert page.get_by_text("diverged at step 41", exact=True).is_visible()

    def test_filters_hide_and_show_again(self, visit):
        page = visit(study())
        orange, blue = page.locator("#accuracy .line").all()
        assert COLOURS["batch"] in orange.get_attribute("style")
        assert COLOURS["running"] in blue.get_attribute("style")
        page.get_by_label("batch", exact=True).uncheck()
        assert [
            COLOURS["running"] in line.get_attribute("style") for line in page.locator("#accuracy .line").all()
        ] == [True]
        assert set(column(page, "results", 1)) == {"running"}
        assert page.locator("#curves .curve").count() == 12
        page.locator("[data-filter=batch_size]").get_by_label("32", exact=True).uncheck()
        assert set(column(page, "runs", 2)) == {"2"}
        page.locator("[data-filter=lr]").get_by_label("0.1", exact=True).uncheck()
        assert column(page, "results", 4) == ["3 of 3 diverged"]
        page.locator("[data-filter=lr]").get_by_label("1", exact=True).uncheck()
        assert page.locator("#empty").is_visible()
        page.get_by_role("button", name="show all").click()
        assert page.locator("#curves .curve").count() == 24
        assert not page.locator("#empty").is_visible()

    def test_sorting(self, visit):
        page = visit(study())
        head = page.locator("#runs th", has_text="accuracy")
        place = page.locator("#runs th").all_inner_texts().index("accuracy") + 1
        for direction in ("ascending", "descending"):
            head.get_by_role("button").click()
            assert head.get_attribute("aria-sort") == direction
            shown = column(page, "runs", place)
            assert shown[-3:] == ["–"] * 3, "a run without accuracy is last either way"
            known = [float(text) for text in shown[:-3]]
            assert known == sorted(known, reverse=direction == "descending")
            assert len(set(known)) > 10
        page.locator("#runs th", has_text="batch size").get_by_role("button").click()
        assert column(page, "runs", 2) == ["2"] * 12 + ["32"] * 12, "as numbers, not as words"
        assert head.get_attribute("aria-sort") is None

    def test_pointing_tells_the_settings_and_values(self, visit):
        page = visit(study())
        tip = page.locator("#tip")
        assert not tip.is_visible()
        page.locator("#accuracy .mark[aria-label*='running'][aria-label*='size 32'][aria-label*='0.9710']").hover()
        assert tip.is_visible()
        assert tip.inner_text().splitlines()[:2] == ["running · batch size 32 · learning rate 0.1", "0.9710 ±.0010"]
        curve = page.locator("#curves .mark[aria-label*='running · batch size 32 · learning rate 1 · seed 2'] .curve")
        curve.scroll_into_view_if_needed()
        middle = curve.evaluate("""path => {
            const point = path.getPointAtLength(path.getTotalLength() / 2).matrixTransform(path.getScreenCTM());
            return [point.x, point.y];
        }""")
        page.mouse.move(*middle)
        assert re.search(r"seed \d\nfinished, accuracy 0\.\d{4}\nstep [2-8]\d0: training loss \d", tip.inner_text())
        page.mouse.move(2, 2)
        assert not tip.is_visible()

    def test_keyboard_alone(self, visit):
        page = visit(study())
        page.locator("[data-filter=lr] input").last.focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert page.locator("#tip").inner_text().startswith("batch · batch size 2 · ")
        assert page.locator("#tip").is_visible()
        page.keyboard.press("ArrowRight")
        assert page.locator("#tip").inner_text().startswith("batch · batch size 32 · ")
        page.keyboard.press("Escape")
        assert not page.locator("#tip").is_visible()

    def test_hostile_text_does_nothing(self, visit):
        page = visit([record(0.9, norm=EVIL), record(status="failed", error=EVIL, norm=EVIL, seed=1)])
        assert page.title() == "Study"
        assert page.locator("#results tbody td").first.inner_text() == EVIL

    @pytest.mark.parametrize(
        "run", [record(0.97), record(status="diverged", step=0, points=1), record(status="failed")]
    )
    def test_one_run(self, visit, run):
        page = visit([run])
        assert page.locator("#results tbody tr").count() == 1
        assert page.locator("#heat td.mark").count() == 1

    def test_many_runs_are_shown_on_demand(self, visit):
        page = visit([record(0.9, seed=seed, points=3) for seed in range(300)])
        assert page.locator("#runs tbody tr").count() == 200
        page.get_by_role("button", name="show all 300").click()
        assert page.locator("#runs tbody tr").count() == 300

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from importlib.util import find_spec

import pytest

from normlab.study.charts import COLOURS
from normlab.study.plan import Trial, grid
from normlab.study.report import write_html
from records import record, study

EVIL = "</script><script>document.title='broken'</script>"


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
            run.versions["torch"] = run.machine["cpu"] = EVIL
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
        assert text.count("0.9710 ±0.0010") == 2

    def test_numbers_that_are_not_finite_are_null(self, page_of):
        run = replace(record(0.9), seconds=float("nan"))
        run.curve["loss"][3] = float("nan")
        assert page_of([run]).data["runs"][0]["curve"][3] is None

    def test_two_thousand_runs_stay_small(self, page_of, tmp_path):
        norms = ["batch", "running", "group", "layer", "none"]
        trials = grid(norms, [1, 2, 8, 32, 512], [0.1, 0.2, 0.4, 1.0], list(range(20)), Trial())
        runs = [record(0.9 + 0.0004321 * trial.seed, **vars(trial)) for trial in trials]
        assert len(page_of(runs).data["runs"]) == 2000
        assert (tmp_path / "study.html").stat().st_size < 3e6


@pytest.fixture(scope="module")
def browser():
    program = os.environ.get("NORMLAB_CHROMIUM") or shutil.which("chromium")
    missing = None if program else "no browser: install chromium or name one in NORMLAB_CHROMIUM"
    if find_spec("playwright") is None:
        missing = "no playwright: install normlab[dev]"
    if missing:
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
        assert page.locator("#heat .leader").all_inner_texts() == ["0.9710 ±0.0010\nlearning rate 0.1"] * 2
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
        assert tip.inner_text().splitlines()[:2] == ["running · batch size 32 · learning rate 0.1", "0.9710 ±0.0010"]
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

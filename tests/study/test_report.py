import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import tyro

from normlab.cli import Command, Train
from normlab.colours import COLOURS
from normlab.study.plan import Trial, grid
from normlab.study.report import command_of, write_html
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


def many():
    """Five hundred runs, with activations of twelve layers."""
    trials = grid(
        ["batch", "running", "group", "layer", "none"], [1, 2, 8, 32, 512], [0.1, 0.2, 0.4, 1.0], range(5), Trial()
    )
    runs = [record(0.9 + 0.0004321 * trial.seed, **vars(trial)) for trial in trials]
    layers = {f"{place} Sequential": [1.0 + trial / 7 for trial in range(10)] for place in range(12)}
    for run in runs:
        run.more["activations"] = {"step": list(range(10)), "mean": layers, "deviation": layers}
    return runs


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
            run.versions["torch"] = run.machine["cpu"] = run.machine["threads"] = EVIL
        page = page_of(evil, EVIL, EVIL)
        assert page.tags.count("script") == tags.count("script") == 2
        assert page.data["filters"][0]["values"][0]["value"] == EVIL
        assert page.text.count(EVIL) >= 3
        assert page.data["runs"][0]["threads"] is None, "it stands in a command"

    def test_half_a_character_ends_no_report(self, page_of):
        text = page_of([record(0.9, norm="a\ud800b")], title="c\ud800d").text
        assert "a\N{REPLACEMENT CHARACTER}b" in text
        assert "c?d" in text

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
        assert [(group["value"], group["outcome"]) for group in lost] == [(None, "3 of 3 diverged")]
        run = next(run for run in data["runs"] if run["status"] == "diverged")
        assert (run["value"], run["loss"], run["diverged_at"], run["curve"][-1]) == (None, None, 41, None)
        norms = data["filters"][0]["values"]
        assert norms[data["groups"][run["group"]]["places"]["norm"]]["value"] == "running"
        assert len(data["steps"][run["steps_at"]]) == len(run["curve"]) == 100

    def test_results_can_be_read_without_script(self, page_of):
        text = page_of(study()).text
        assert text.count("3 of 3 diverged") == 1
        assert text.count("0.9710 ±0.0010") == 2

    @pytest.mark.parametrize(
        ("seeds", "frames", "said"),
        [
            (6, {"batch": "", "running": "told"}, "worse (p 0.031)"),
            (3, {"batch": "alike", "running": "alike"}, "not told apart (needs 6 seeds or more)"),
            (1, {"batch": "alike", "running": "alike"}, "not told apart (needs 6 seeds or more)"),
        ],
    )
    def test_there_is_no_ranking_without_its_uncertainty(self, page_of, seeds, frames, said):
        means = {"batch": 0.9, "running": 0.95}
        page = page_of([record(means[n] + 0.001 * seed, norm=n, seed=seed) for n in means for seed in range(seeds)])
        norms = page.data["filters"][0]["values"]
        groups = {norms[group["places"]["norm"]]["value"]: group for group in page.data["groups"]}
        assert {norm: group["frame"] for norm, group in groups.items()} == frames
        assert groups["batch"]["verdict"] == said
        assert (groups["batch"]["interval"] is None) == (seeds == 1)
        assert said in page.text, "without script too"
        assert [text for text in page.text if text.startswith("batch 2: running has the best accuracy")]

    def test_numbers_that_are_not_finite_are_null(self, page_of):
        run = replace(record(0.9), seconds=float("nan"))
        run.curve["loss"][3] = float("nan")
        assert page_of([run]).data["runs"][0]["curve"][3] is None

    def test_five_hundred_runs_stay_small(self, page_of, tmp_path):
        assert len(page_of(many()).data["runs"]) == 500
        assert (tmp_path / "study.html").stat().st_size < 2e6

    def test_two_thousand_runs_stay_small(self, page_of, tmp_path):
        norms = ["batch", "running", "group", "layer", "none"]
        trials = grid(norms, [1, 2, 8, 32, 512], [0.1, 0.2, 0.4, 1.0], list(range(20)), Trial())
        runs = [record(0.9 + 0.0004321 * trial.seed, **vars(trial)) for trial in trials]
        page = page_of(runs)
        assert len(page.data["runs"]) == 2000
        drawn = [run["group"] for run in page.data["runs"] if "curve" in run]
        assert len(drawn) == 500, "20 seeds of the best rate of each norm and batch size"
        assert len(set(drawn)) == 25
        assert any("too many runs to draw" in text for text in page.text)
        assert (tmp_path / "study.html").stat().st_size < 3e6


@pytest.mark.parametrize(
    "trial",
    [
        Trial(),
        Trial(norm="group", batch_size=1, lr=1e-5, seed=7, epochs=3, schedule="one-cycle", clip=0.5, images=100),
        Trial(model="my nets.py:make 'unet'", data="a:b", loss="c:d", metrics=("dice", "loss"), lower=True, steps=9),
        Trial(optimizer="adamw", weight_decay=0.01, precision="bfloat16", data="cifar10", model="resnet"),
    ],
)
def test_the_command_of_a_run_says_all_its_settings(trial):
    name, *words = shlex.split(command_of(trial))
    assert name == "normlab"
    command = tyro.cli(Command, args=words)
    assert isinstance(command, Train)
    assert Trial.from_dict(vars(command)) == trial


def test_a_run_that_only_its_own_study_makes_has_no_command(page_of):
    assert command_of(Trial(task="frozen")) == ""
    assert page_of([record(0.9, task="frozen")]).data["groups"][0]["command"] == ""


@pytest.fixture
def visit(browser, tmp_path):
    """Opens the page of some records; at the end no error was logged and nothing but the page was asked for."""
    troubles, requests, pages = [], [], []

    def visit(records, width=1200):
        path = tmp_path / "study.html"
        write_html(records, path, "Study", "normlab compare")
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.set_default_timeout(5000)
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


def own(value, **settings):
    """A run judged by a metric of one's own, of which less is better."""
    run = record(0.5, metrics=("my.measures:depth", "accuracy"), lower=True, **settings)
    run.epochs[0]["valid"]["depth"] = value + run.settings["seed"]
    return run


def kept(run, share):
    layers = {"0 conv": [0.0, share], "1 linear": [0.5, share]}
    run.more["activations"] = {"step": [1, 100], "mean": layers, "deviation": layers}
    return run


def column(page, table, place):
    return page.locator(f"#{table} tbody tr td:nth-child({place})").all_inner_texts()


@pytest.mark.browser
class TestBrowser:
    def test_shows_every_result(self, visit):
        page = visit(study())
        heat = page.locator("#heat tbody tr").all_inner_texts()
        assert [row.split()[0] for row in heat] == ["batch", "running"]
        assert (
            page.locator("#heat tr", has_text="running").locator("td").all_inner_texts()
            == ["0.9710 ±0.0010\nlearning rate 0.1\nbest mean"] * 2
        )
        assert "does not train" in heat[0]
        assert page.locator("#runs tbody tr").count() == 24
        assert page.locator("#curves .curve").count() == 24
        assert page.locator("#curves .cross").count() == 3
        assert page.get_by_text("diverged at step 41", exact=True).is_visible()

    def test_filters_hide_and_show_again(self, visit):
        page = visit(study())
        orange, blue = page.locator("#metric .line").all()
        assert COLOURS["batch"] in orange.get_attribute("style")
        assert COLOURS["running"] in blue.get_attribute("style")
        page.get_by_label("batch", exact=True).uncheck()
        assert [COLOURS["running"] in line.get_attribute("style") for line in page.locator("#metric .line").all()] == [
            True
        ]
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
        page.locator("#metric .mark[aria-label*='running'][aria-label*='size 32'][aria-label*='0.9710']").hover()
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
        tip = page.locator("#tip")
        page.locator("[data-filter=lr] input").last.focus()
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        assert tip.inner_text().startswith("batch · batch size 2 · ")
        assert tip.is_visible()
        for key, start in (
            ("ArrowRight", "batch · batch size 32 · "),
            ("ArrowDown", "running · batch size 32 · "),
            ("ArrowDown", "running · batch size 32 · "),
            ("Home", "batch · batch size 2 · "),
            ("End", "running · batch size 32 · "),
        ):
            page.keyboard.press(key)
            assert tip.inner_text().startswith(start)
        page.keyboard.press("Enter")
        assert page.locator("#about").inner_text().startswith("running · batch size 32 · learning rate 0.1\n0.9710")
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        page.keyboard.press("Escape")
        assert not page.locator("#choice").is_visible()

    def test_rows_by_keyboard(self, visit):
        page = visit(study())
        page.locator("#runs tr.mark").first.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("Space")
        assert page.locator("#about").inner_text().splitlines()[0].endswith("· seed 1")
        assert page.locator("#runs tr.chosen").count() == 1

    def test_choosing_marks_it_everywhere_and_says_the_command(self, visit):
        page = visit(study())
        page.locator("#rates figure", has_text="running").locator("tbody tr").first.locator("td").last.click()
        assert page.locator("#about").inner_text().splitlines()[0] == "running · batch size 32 · learning rate 1"
        commands = page.locator("#again").inner_text().splitlines()
        assert commands[2] == ("OMP_NUM_THREADS=2 normlab train --norm running --batch-size 32 --lr 1.0 --seed 2")
        assert len(commands) == 3
        for place, count in {"#rates": 1, "#metric": 1, "#curves": 3, "#results": 1, "#runs": 3, "#heat": 0}.items():
            assert page.locator(f"{place} .chosen").count() == count, place
        page.locator("#runs tr.chosen").first.click()
        assert page.locator("#curves .chosen").count() == 1
        assert page.locator("#again").inner_text().endswith("--lr 1.0 --seed 0")
        page.reload()
        assert page.locator("#curves .chosen").count() == 1, "the address keeps it"
        page.get_by_role("button", name="close").click()
        assert page.locator(".chosen").count() == 0

    def test_the_address_keeps_filters_and_is_not_trusted(self, visit):
        page = visit(study())
        page.get_by_label("batch", exact=True).uncheck()
        page.reload()
        assert not page.get_by_label("batch", exact=True).is_checked()
        assert set(column(page, "results", 1)) == {"running"}
        for hostile in ("%", "null", "[]", '{"off":7,"key":{}}', '{"off":{"norm":7,"__proto__":["x"]}}'):
            page.evaluate("hash => { location.hash = hash; }", hostile)
            page.reload()
            assert page.locator("#runs tbody tr").count() == 24

    def test_rows_are_searched(self, visit):
        page = visit(study())
        page.get_by_label("Rows of runs with").fill("RUNNING diverged")
        assert column(page, "runs", 5) == [f"diverged at step {step}" for step in (41, 42, 43)]
        assert page.get_by_text("3 of 24").is_visible()
        page.get_by_label("Rows of results with").fill("nothing like it")
        assert page.locator("#results tbody tr").count() == 0

    def test_theme(self, visit):
        page = visit(study())
        colours = "() => { const s = getComputedStyle(document.documentElement); return s.backgroundColor + s.color; }"
        light = page.evaluate(colours)
        page.get_by_label("Colours").select_option("dark")
        dark = page.evaluate(colours)
        assert dark != light
        page.emulate_media(color_scheme="dark")
        page.get_by_label("Colours").select_option("")
        assert page.evaluate(colours) == dark
        page.get_by_label("Colours").select_option("light")
        assert page.evaluate(colours) == light

    @pytest.mark.parametrize("width", [320, 390, 1280])
    def test_no_screen_is_too_narrow(self, visit, width):
        long = record(status="failed", error="x" * 3000, norm="long" * 300, model="m" * 500)
        page = visit([*study(), replace(long, settings={**long.settings, "model": "convnet"})], width=width)
        page.locator("#heat td.mark").first.click()
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        outside = page.evaluate("""() => [...document.querySelectorAll("body *")].filter((node) =>
            !node.closest(".wide, pre, [hidden]") && node.getBoundingClientRect().right > innerWidth + 1)
            .map((node) => node.outerHTML.slice(0, 80))""")
        assert outside == []
        cut = page.evaluate("""() => [...document.querySelectorAll(".wide")].map((node) => [
            node.scrollWidth > node.clientWidth + 1, node.matches(".goes-on"),
            getComputedStyle(node.nextElementSibling).display !== "none"])""")
        assert all(row in ([True, True, True], [False, False, False]) for row in cut)
        assert any(row[0] for row in cut)
        runs = page.locator(".wide", has=page.locator("#runs"))
        runs.evaluate("node => { node.scrollLeft = node.scrollWidth; }")
        page.wait_for_function("node => !node.matches('.goes-on')", arg=runs.element_handle())

    def test_settings_that_vary_are_filters(self, visit):
        runs = [
            record(0.9 + 0.02 * seed, norm=norm, optimizer=optimizer, weight_decay=decay, seed=seed)
            for norm in ("batch", "running")
            for optimizer in ("sgd", "adamw")
            for decay in (0.0, 0.1)
            for seed in (0, 1)
        ]
        page = visit(runs)
        page.locator("[data-filter=optimizer]").get_by_label("sgd").uncheck()
        page.locator("[data-filter=weight_decay]").get_by_label("0.1").uncheck()
        assert page.locator("#runs tbody tr").count() == 4
        page.locator("#results tr.mark").first.click()
        assert "--optimizer adamw --seed" in page.locator("#again").inner_text()

    def test_a_metric_of_ones_own(self, visit):
        page = visit(
            [own(value, norm=norm, seed=seed) for norm, value in (("batch", 40), ("group", 30)) for seed in (0, 1)]
        )
        assert page.get_by_role("heading", name="Depth against batch size").is_visible()
        assert "Less is better." in page.locator("main").inner_text()
        assert page.locator("#heat td.mark").last.inner_text().startswith("30.5")
        assert page.locator("#results th").all_inner_texts()[3] == "depth"

    def test_activations_are_drawn_by_layer(self, visit):
        runs = [kept(record(0.9, norm=norm), share) for norm, share in (("batch", 0.1), ("running", 0.3))]
        page = visit([*runs, record(0.8, norm="group")])
        assert page.locator("#layers figcaption").all_inner_texts() == ["batch size 2: mean", "batch size 2: deviation"]
        assert page.locator("#layers .mark").count() == 4
        page.locator("#layers .mark[aria-label^=running]").first.focus()
        page.keyboard.press("Home")
        assert page.locator("#tip").inner_text().splitlines()[-1] == "1 linear: mean 0.1"
        assert visit([record(0.9)]).get_by_text("kept no figures of their layers").is_visible()

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

    def test_five_hundred_runs_are_drawn_in_a_second(self, visit):
        page = visit(many())
        loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
        times = []
        for _ in range(3):  # the machine may have other work
            page.reload()
            times.append(page.evaluate(loaded))
        assert 0 < min(times) < 1000

    def test_many_runs_are_shown_on_demand(self, visit):
        page = visit([record(0.9, seed=seed, points=3) for seed in range(300)])
        assert page.locator("#runs tbody tr").count() == 200
        page.get_by_role("button", name="show all 300").click()
        assert page.locator("#runs tbody tr").count() == 300

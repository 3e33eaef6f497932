"""Settings that are clearly beaten: the rule, who is stopped when, and how it is marked."""

import itertools
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from beaten_runs import BEATEN, PLAN, make, make_record, outcomes
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from normlab.errors import InputError
from normlab.study import compare as comparison
from normlab.study.compare import run_study
from normlab.study.confirm import confirm
from normlab.study.executors import HereExecutor, ProcessExecutor
from normlab.study.export import export, latex_table, merge, rows
from normlab.study.picture import write_figures, write_png
from normlab.study.plan import Plan, Trial
from normlab.study.record import Record
from normlab.study.report import make_html
from normlab.study.status import status
from normlab.study.stopping import Rounds, beats, counts
from normlab.study.store import RunStore
from normlab.study.summary import best, summarize
from normlab.study.table import terminal_table
from normlab.study.verdicts import compare_groups, conclusions
from records import record

numbers = st.floats(-1e6, 1e6).map(lambda x: round(x, 3))
results = st.dictionaries(st.integers(0, 9), numbers | st.none())


class TestRule:
    def test_it_takes_three_seeds(self):
        assert not beats({0: 0.9, 1: 0.9}, {0: 0.1, 1: 0.1}, 0.0)
        assert beats({0: 0.9, 1: 0.9, 2: 0.9}, {0: 0.1, 1: 0.1, 2: 0.1}, 0.0), "equal differences are clear"
        assert not beats({0: 0.9, 1: 0.9, 2: 0.9}, {1: 0.1, 2: 0.1, 3: 0.1}, 0.0), "two in common"

    def test_a_tie_is_no_win(self):
        first = {0: 0.9, 1: 0.91, 2: 0.92, 3: 0.9}
        assert not beats(first, {0: 0.5, 1: 0.51, 2: 0.52, 3: 0.9}, 0.0)
        assert not beats(first, first, 0.0)
        none: dict[int, float | None] = dict.fromkeys(range(4))
        assert not beats(none, none, 0.0), "both diverge"

    def test_a_run_that_diverged_is_the_worst(self):
        first, none = {0: 0.9, 1: 0.91, 2: 0.92}, dict.fromkeys(range(3))
        assert beats(first, none, 0.0)
        assert not beats(none, first, 0.0)
        assert not beats({**first, 3: None}, {**dict.fromkeys(range(3), 0.1), 3: 0.1}, 0.0)
        loss = {seed: 2 - value for seed, value in first.items()}
        assert beats(loss, none, 3.0, lower=True)

    def test_differences_that_vary_as_much_as_they_are_large_are_not_clear(self):
        assert not beats({0: 0.1, 1: 0.2, 2: 0.6}, {0: 0.0, 1: 0.0, 2: 0.0}, 0.0)

    @given(st.lists(st.floats(0.001, 1.0), min_size=3, max_size=8))
    def test_p_is_that_of_scipy(self, apart):
        equal = max(apart) - min(apart) < 1e-9
        p = 0.0 if equal else stats.ttest_1samp(apart, 0.0, alternative="greater").pvalue
        if abs(p - 0.01) > 1e-6:
            assert beats(dict(enumerate(apart)), dict.fromkeys(range(len(apart)), 0.0), 0.0) == (p < 0.01)

    @given(results, results, st.booleans())
    def test_at_most_one_beats_the_other_and_signs_only_turn_it(self, first, second, lower):
        worst = 1e7 if lower else -1e7
        won = beats(first, second, worst, lower)
        assert not (won and beats(second, first, worst, lower))
        turned = [{seed: None if x is None else -x for seed, x in one.items()} for one in (first, second)]
        assert beats(*turned, -worst, not lower) == won

    @given(st.lists(st.tuples(numbers, numbers, numbers), min_size=3, max_size=6))
    def test_who_beats_the_winner_beats_the_loser(self, seeds):
        """So a setting that is stopped is always beaten by one that goes on."""
        first, second, third = (dict(enumerate(column)) for column in zip(*seeds, strict=True))
        if beats(first, second, -1e7) and beats(second, third, -1e7):
            assert beats(first, third, -1e7)

    @pytest.mark.parametrize("scale", [1e-160, 1e140])
    def test_tiny_and_huge_differences(self, scale):
        first = {seed: scale * x for seed, x in enumerate([5.0, 5.1, 4.9])}
        assert beats(first, dict.fromkeys(range(3), 0.0), 0.0)
        assert not beats({**first, 3: 90 * scale}, dict.fromkeys(range(4), 0.0), 0.0)


def play(trials: list[Trial], known: dict[str, Record], ended: list[Record] = (), rng=None) -> dict[str, Record]:  # pyright: ignore[reportArgumentType]
    """The records of a study whose runs end in any order; those of `ended` are there already."""
    rng = rng or random.Random(0)
    rounds = Rounds(trials, ended)
    found = {one.key: one for one in (*ended, *rounds.first.stopped)}
    running = list(rounds.first.ready)
    while running:
        key = running.pop(rng.randrange(len(running)))
        assert key not in found, "made once"
        found[key] = known[key]
        step = rounds.end(known[key])
        running += step.ready
        found |= {one.key: one for one in step.stopped}
    assert found.keys() == {trial.key for trial in trials}, "each run is made or stopped"
    return found


def made_up(
    draw_from: random.Random, lower: bool = False, failing: bool = True
) -> tuple[list[Trial], dict[str, Record]]:
    """A study of three settings of two norms with seeds in any order, and all its results."""
    seeds = draw_from.sample(range(20), 6)
    metric: dict = {"metrics": ("loss",), "lower": True} if lower else {}
    plan = Plan(norms=["batch", "group"], batch_sizes=[2, 4], lrs=[0.1, 0.2, 0.3], seeds=seeds, **metric)
    sure = draw_from.choice([0.001, 0.05])
    chances = {"diverged": draw_from.choice([0.0, 0.3]), "failed": 0.2 * failing}
    known = {}
    for trial in plan.trials():
        status = next((name for name, chance in chances.items() if draw_from.random() < chance), "finished")
        value = round(0.5 + trial.lr + draw_from.gauss(0, sure), 3)
        epochs = [{"epoch": 1, "valid": {trial.metrics[0]: value}}] if status == "finished" else []
        known[trial.key] = Record(trial.key, trial.to_dict(), status, epochs=epochs)  # pyright: ignore[reportArgumentType]
    return plan.trials(), known


def statuses(records: dict[str, Record], trials: list[Trial]) -> list[tuple[str, str | None]]:
    return [(records[trial.key].status, records[trial.key].error) for trial in trials]


class TestRounds:
    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**9), st.booleans())
    def test_the_order_in_which_runs_end_changes_nothing(self, number, lower):
        trials, known = made_up(random.Random(number), lower)
        one, other = (play(trials, known, rng=random.Random(seed)) for seed in (1, 2))
        assert statuses(one, trials) == statuses(other, trials)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**9), st.floats(0, 1))
    def test_a_study_that_was_killed_goes_on_the_same(self, number, share):
        trials, known = made_up(random.Random(number), failing=False)
        whole = play(trials, known)
        rng = random.Random(number)
        rounds = Rounds(trials, [])
        running, ended = list(rounds.first.ready), []
        for _ in range(int(share * sum(one.status != "stopped" for one in whole.values()))):
            ended.append(known[running.pop(rng.randrange(len(running)))])
            running += rounds.end(ended[-1]).ready
        assert statuses(play(trials, known, ended), trials) == statuses(whole, trials)

    @settings(max_examples=60, deadline=None)
    @given(st.integers(0, 10**9))
    def test_each_norm_keeps_a_setting_with_all_seeds_and_it_is_the_leader(self, number):
        trials, known = made_up(random.Random(number))
        found = play(trials, known)
        groups = summarize(found.values())
        whole = {(one.settings["norm"], one.settings["batch_size"]) for one in groups if not one.stopped}
        assert len(whole) == 4
        assert not any(verdict.group.stopped for verdict in compare_groups(groups))

    def test_with_failed_runs_that_are_made_by_turns_someone_is_left(self):
        """Three settings, each of which would beat the next over other seeds."""
        wins = {0.1: {0, 1, 2, 3, 4, 5}, 0.2: {3, 4, 5, 6, 7, 8}, 0.3: {6, 7, 8, 0, 1, 2}}
        values = {(0.1, 0): 0.9, (0.3, 0): 0.5, (0.1, 3): 0.5, (0.2, 3): 0.9, (0.2, 6): 0.5, (0.3, 6): 0.9}
        trials = Plan(norms=["batch"], batch_sizes=[2], lrs=list(wins), seeds=list(range(12))).trials()
        known = {}
        for trial in trials:
            value = values.get((trial.lr, trial.seed // 3 * 3), 0.7)
            there = trial.seed in wins[trial.lr] or trial.seed > 8
            epochs = [{"epoch": 1, "valid": {"accuracy": value}}]
            known[trial.key] = Record(trial.key, trial.to_dict(), "finished" if there else "failed", epochs=epochs)
        found = play(trials, known)
        last = {one.settings["lr"] for one in found.values() if one.settings["seed"] == 11 and one.status == "finished"}
        assert last

    def test_a_failed_run_neither_beats_nor_is_beaten(self):
        trials = Plan(norms=["batch"], batch_sizes=[2], lrs=[0.1, 0.2], seeds=[0, 1, 2, 3, 4]).trials()
        known = {one.key: record(one.lr, **vars(one)) for one in trials}
        failed = next(one for one in trials if one.lr == 0.1 and one.seed == 1)
        known[failed.key] = Record(failed.key, failed.to_dict(), "failed", error="no")
        found = play(trials, known)
        stopped = [(one.settings["seed"], one.error) for one in found.values() if one.status == "stopped"]
        assert stopped == [(4, "beaten by lr 0.2 at 3 seeds")]

    def test_what_differs_in_a_shared_setting_or_norm_is_not_compared(self):
        trials = Plan(norms=["batch", "group"], batch_sizes=[2, 4], lrs=[0.1], seeds=list(range(6))).trials()
        known = {one.key: record(0.9 if one.norm == "batch" else 0.1, **vars(one)) for one in trials}
        assert all(one.status == "finished" for one in play(trials, known).values())

    def test_a_norm_does_not_wait_for_another(self):
        rounds = Rounds(PLAN.trials(), [])
        assert len(rounds.first.ready) == 6
        own = [trial for trial in PLAN.trials() if trial.norm == "batch" and trial.seed == 0]
        steps = [rounds.end(make_record(trial)) for trial in own]
        assert [len(step.ready) for step in steps] == [0, 0, 3]

    def test_seeds_of_a_setting_itself_are_in_the_order_of_the_plan(self):
        chosen = [{"norm": "batch", "lr": 0.1, "seeds": [5, 3]}, {"norm": "batch", "lr": 0.2, "seeds": [4, 3, 9]}]
        trials = Plan(settings=chosen).trials()
        rounds, seeds = Rounds(trials, []), {trial.key: trial.seed for trial in trials}
        order = []
        ready = rounds.first.ready
        while ready:
            order.append([seeds[key] for key in ready])
            ready = [one for key in ready for one in rounds.end(record_of(key, trials)).ready]
        assert order == [[5], [3, 3], [4], [9]]

    def test_a_run_that_is_there_already_stays_though_its_setting_is_beaten(self):
        trials = PLAN.trials()
        known = {trial.key: make_record(trial) for trial in trials}
        late = next(trial for trial in trials if (trial.norm, trial.lr, trial.seed) == ("batch", 0.01, 4))
        found = play(trials, known, [known[late.key]])
        mine = [found[one.key].status for one in trials if (one.norm, one.lr) == ("batch", 0.01)]
        assert mine == ["finished"] * 3 + ["stopped", "finished", "stopped"]


def record_of(key: str, trials: list[Trial]) -> Record:
    return record(0.9, **vars(next(trial for trial in trials if trial.key == key)))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, tuple[str, str | None]]:
    folder = tmp_path_factory.mktemp("here")
    make(folder, HereExecutor(1))
    return outcomes(folder)


class TestExecutors:
    def test_in_this_process(self, undisturbed):
        stopped = {
            (trial.norm, trial.lr, trial.seed) for trial in PLAN.trials() if undisturbed[trial.key][0] == "stopped"
        }
        assert stopped == {(*setting, seed) for setting in BEATEN for seed in (3, 4, 5)}
        assert {why for state, why in undisturbed.values() if state == "stopped"} == {"beaten by lr 0.1 at 3 seeds"}

    def test_in_two_processes(self, undisturbed, tmp_path):
        make(tmp_path, ProcessExecutor(2, threads=1))
        assert outcomes(tmp_path) == undisturbed
        assert len(RunStore(tmp_path / "runs.jsonl").read()) == len(PLAN.trials())

    @pytest.mark.skipif(sys.platform == "win32", reason="signals")
    def test_killed_and_gone_on_with(self, undisturbed, tmp_path):
        store = RunStore(tmp_path / "runs.jsonl")
        for ended in (4, 12):
            driver = subprocess.Popen([sys.executable, str(Path(__file__).with_name("beaten_runs.py")), str(tmp_path)])
            deadline = time.monotonic() + 120
            while len(store.read()) < ended and driver.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            driver.send_signal(signal.SIGKILL)
            driver.wait(30)
        assert len(outcomes(tmp_path)) < len(PLAN.trials())
        make(tmp_path, HereExecutor(1))
        assert outcomes(tmp_path) == undisturbed
        keys = [one.key for one in store.read() if one.status != "stopped"]
        assert len(keys) == len(set(keys)), "no run was made twice"


@pytest.fixture
def quick_runs(monkeypatch):
    """Runs whose results are known, in place of training."""
    made = []

    def run(trial, *_):
        made.append(trial.key)
        return make_record(trial)

    monkeypatch.setattr(comparison, "run_trial", run)
    return made


def study(plan: Plan, folder: Path) -> tuple[list[Record], str]:
    console = Console(file=StringIO(), width=200)
    found = run_study(plan, folder, workers=HereExecutor(1), console=console)
    return found, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


class TestStudy:
    def test_nothing_changes_where_it_is_not_asked_for(self, quick_runs, tmp_path):
        found, shown = study(replace(PLAN, stop_beaten=False), tmp_path)
        assert len(found) == 36
        assert "stop" not in shown
        for name in ("runs.jsonl", "plan.toml"):
            assert "stop" not in (tmp_path / name).read_text()
        assert "stopped" not in (tmp_path / "report.html").read_text()

    def test_it_is_no_part_of_a_key_and_in_the_file(self, tmp_path):
        assert [one.key for one in PLAN.trials()] == [one.key for one in replace(PLAN, stop_beaten=False).trials()]
        file = tmp_path / "plan.toml"
        file.write_text(PLAN.to_toml())
        assert "stop_beaten = true" in file.read_text()
        assert Plan.read(file) == PLAN
        file.write_text("stop_beaten = 'yes'")
        with pytest.raises(InputError, match="stop_beaten='yes'"):
            Plan.read(file)

    def test_it_goes_on_the_same_and_then_without_it(self, quick_runs, tmp_path):
        found, shown = study(PLAN, tmp_path)
        assert len(quick_runs) == 27
        assert [one.status for one in found].count("stopped") == 9
        assert "27 of 36" not in shown
        lines = (tmp_path / "runs.jsonl").read_text()

        again, shown = study(PLAN, tmp_path)
        assert "27 runs are in" in shown
        assert "9 runs are not made: other settings clearly beat theirs." in shown
        assert again == found
        assert (tmp_path / "runs.jsonl").read_text() == lines, "nothing is written twice"

        *kept, _ = [line for line in lines.splitlines(True) if '"status": "stopped"' in line]
        others = [line for line in lines.splitlines(True) if '"status": "stopped"' not in line]
        (tmp_path / "runs.jsonl").write_text("".join(others + kept))  # killed before the last one was said
        assert study(PLAN, tmp_path)[0] == found
        assert sum('"stopped"' in line for line in (tmp_path / "runs.jsonl").read_text().splitlines()) == 9
        assert len(quick_runs) == 27

        more, _ = study(replace(PLAN, seeds=list(range(4))), tmp_path)
        assert len(quick_runs) == 27
        assert [one.status for one in more].count("stopped") == 3

        whole, _ = study(replace(PLAN, stop_beaten=False), tmp_path)
        assert len(quick_runs) == 36
        assert all(one.status != "stopped" for one in whole)
        assert not any(group.stopped for group in summarize(RunStore(tmp_path / "runs.jsonl").read()))

    def test_a_plan_that_stops_no_more_wants_the_runs(self, quick_runs, tmp_path):
        study(PLAN, tmp_path)
        for plan, states in ((PLAN, {"stopped": 9}), (replace(PLAN, stop_beaten=False), {"waiting": 9})):
            found = status(tmp_path, plan.trials(), lambda one, plan=plan: counts(plan, one)).counts
            assert {state: n for state, n in found.items() if state in ("stopped", "waiting")} == states

    def test_runs_of_other_code_stop_nothing(self, quick_runs, monkeypatch, tmp_path):
        study(PLAN, tmp_path)
        monkeypatch.setattr(comparison, "fingerprint", lambda *_: {"code": "other"})
        _, shown = study(PLAN, tmp_path)
        assert "27 more were made by other" in shown
        assert len(quick_runs) == 54


@pytest.fixture(scope="module")
def stopped() -> list[Record]:
    """The records of a study, in which three settings were stopped."""
    trials = PLAN.trials()
    known = {}
    for trial in trials:
        one = make_record(trial)
        whole = record(0.5, **vars(trial))
        known[trial.key] = replace(whole, status=one.status, epochs=one.epochs, diverged_at_step=one.diverged_at_step)
    return list(play(trials, known).values())


def told(part) -> str:
    console = Console(file=StringIO(), width=250)
    console.print(part)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


class TestMarked:
    def test_in_words(self, stopped):
        groups = {(one.settings["norm"], one.settings["lr"]): one for one in summarize(stopped)}
        assert groups["batch", 0.01].outcome.startswith("0.5497 ±0.0025, stopped after 3 of 6 seeds, beaten by lr 0.1")
        assert groups["batch", 1.0].outcome == (
            "3 of 3 diverged, stopped after 3 of 6 seeds, beaten by lr 0.1 at 3 seeds"
        )
        assert groups["batch", 0.1].outcome == "0.9005 ±0.0024"
        assert sorted(groups["batch", 0.01].by_seed) == [0, 1, 2]

    def test_in_conclusions_and_verdicts(self, stopped):
        groups = summarize(stopped)
        first, second = compare_groups(groups)
        assert {first.seeds, second.seeds} == {6}
        assert {(one.group.settings["norm"], one.tried, one.stopped) for one in (first, second)} == {
            ("batch", 3, 2), ("group", 3, 1),
        }  # fmt: skip
        (line,) = conclusions(groups)
        assert "Settings that were stopped, clearly beaten: batch 2 of 3, group 1 of 3." in line
        alone = conclusions([group for group in groups if group.settings["norm"] == "batch"])
        assert alone[0].endswith("at its best setting. 2 of 3 settings were stopped, clearly beaten.")

    def test_a_stopped_setting_is_never_the_best_however_good_its_seeds(self):
        runs = [record(0.8, lr=0.1, seed=seed) for seed in range(6)]
        runs += [record(0.99, lr=0.2, seed=seed) for seed in range(3)]
        runs += [record(status="stopped", error="beaten by lr 0.1 at 3 seeds", lr=0.2, seed=seed) for seed in (3, 4, 5)]
        groups = summarize(runs)
        leader = best(groups)
        assert leader is not None
        assert leader.settings["lr"] == 0.1
        assert compare_groups(groups)[0].group.settings["lr"] == 0.1
        chosen = confirm(Plan(norms=["running"], lrs=[0.1, 0.2], batch_sizes=[2], seeds=list(range(6))), runs, [7], 1)
        assert [one["lr"] for one in chosen.settings] == [0.1]

    def test_in_the_table(self, stopped):
        shown = told(terminal_table(stopped))
        assert shown.count("stopped after 3 of 6 seeds") == 3
        assert shown.count("beaten by lr 0.1 at 3 seeds") == 3
        assert "A setting was stopped once another one of its norm clearly beat it." in " ".join(shown.split())

    def test_in_the_status(self, stopped, tmp_path):
        store = RunStore(tmp_path / "runs.jsonl")
        for one in stopped:
            store.append(one)
        found = status(tmp_path, PLAN.trials())
        assert found.counts == {"finished": 24, "diverged": 3, "stopped": 9}
        assert found.done
        shown = told(found)
        assert "27 of 36 runs have ended, 9 are not made." in shown
        assert "batch batch 2 lr 0.01" in shown
        assert "beaten by lr 0.1 at 3 seeds" in shown

    def test_in_exports(self, stopped, tmp_path):
        table = rows(stopped)
        assert [row["error"] for row in table if row["status"] == "stopped"] == ["beaten by lr 0.1 at 3 seeds"] * 9
        assert all(row["value"] is None for row in table if row["status"] == "stopped")
        assert (tmp_path / "runs.csv") == export(stopped, tmp_path / "runs.csv")
        assert (tmp_path / "runs.csv").read_text().count("stopped") == 9
        latex = latex_table(stopped)
        assert latex.count("stopped after 3 of 6 seeds") == 3
        assert "clearly beat it" in latex
        assert latex.count(r"\textbf") == 1

    def test_in_pictures(self, stopped, tmp_path, monkeypatch):
        from matplotlib.axes import Axes
        from matplotlib.figure import Figure

        texts, captions = [], []
        text, caption = Axes.text, Figure.supxlabel
        monkeypatch.setattr(Axes, "text", lambda self, *a, **k: texts.append(a[2]) or text(self, *a, **k))
        monkeypatch.setattr(Figure, "supxlabel", lambda self, t, **k: captions.append(t) or caption(self, t, **k))
        write_png(stopped, tmp_path / "one.png")
        write_figures(stopped, tmp_path, ["svg"])
        assert "Settings that were stopped, clearly beaten: batch 2 of 3" in " ".join(captions[0].split())
        assert sum("stopped, 3 of 6 seeds" in one for one in texts) == 3

    def test_a_line_of_stopped_settings_alone_says_so(self, tmp_path, monkeypatch):
        from matplotlib.axes import Axes

        notes, annotate = [], Axes.annotate
        monkeypatch.setattr(Axes, "annotate", lambda self, *a, **k: notes.append(a[0]) or annotate(self, *a, **k))
        runs = [record(0.8, optimizer="sgd", seed=seed) for seed in range(4)]
        runs += [record(0.5, optimizer="adamw", seed=seed) for seed in range(3)]
        runs.append(record(status="stopped", error="beaten by optimizer sgd at 3 seeds", optimizer="adamw", seed=3))
        write_png(runs, tmp_path / "one.png")
        assert notes == ["3 of 4 seeds"]

    def test_merged_without_a_plan(self, stopped, tmp_path):
        """A stopped run gives way to one that was made."""
        one, other, out = (tmp_path / name for name in ("one", "other", "out"))
        for record_ in stopped:
            RunStore(one / "runs.jsonl").append(record_)
        late = next(trial for trial in PLAN.trials() if (trial.norm, trial.lr, trial.seed) == ("batch", 0.01, 4))
        RunStore(other / "runs.jsonl").append(make_record(late))
        for folders in itertools.permutations([one, other]):
            found = {record.key: record.status for record in merge(folders, out / folders[0].name)}
            assert len(found) == 36
            assert list(found.values()).count("stopped") == 8
            assert found[late.key] == "finished"

    def test_in_the_page(self, stopped):
        page = make_html(summarize(stopped), "Study", "")
        assert "Runs: 24 finished, 3 diverged, 9 stopped." in page
        assert page.count("stopped: beaten by lr 0.1 at 3 seeds") == 9, "each run in its table"
        assert "unknown processor" not in page

    def test_only_stopped_runs_are_nothing_to_report(self, stopped):
        with pytest.raises(InputError, match="nothing to report"):
            summarize(one for one in stopped if one.status == "stopped")


class TestBrowser:
    def test_maps_and_tables_mark_it(self, stopped, browser, tmp_path):
        (tmp_path / "page.html").write_text(make_html(summarize(stopped), "Study", ""))
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "page.html").as_uri())
        assert page.locator("#rates small", has_text="stopped, 3 of 6 seeds").count() == 3
        assert page.locator("#heat", has_text="stopped").count() == 0, "the best rates have all seeds"
        assert page.locator("#results tr", has_text="stopped after 3 of 6 seeds").count() == 3
        assert page.locator("#runs tr", has_text="stopped: beaten by lr 0.1 at 3 seeds").count() == 9
        for rate in ("0.1", "1"):
            page.locator(f"#filters [data-filter=lr] label:text-is('{rate}') input").uncheck()
        assert page.locator("#heat small", has_text="stopped after 3 of 6 seeds").count() == 2
        assert not errors
        page.close()


def test_the_command_line(quick_runs, monkeypatch, capsys, tmp_path):
    from normlab import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def normlab(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["normlab", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return int(end.value.code or 0), capsys.readouterr().out

    options = ["--norms", "batch", "group", "--batch-sizes", "2", "--lrs", "0.01", "0.1", "1.0"]
    run = ["study", "run", *options, "--seeds", *map(str, range(6)), "--executor", "here", "--out", "mine"]
    code, out = normlab(*run, "--stop-beaten")
    assert (code, len(quick_runs)) == (0, 27)
    assert out.count("stopped: beaten by lr 0.1 at 3 seeds") == 9
    assert Plan.read("mine/plan.toml") == PLAN
    code, out = normlab("study", "status", "mine")
    assert (code, "27 of 36 runs have ended, 9 are not made." in out) == (0, True)
    for words in (["report", "mine"], ["export", "mine", "runs.csv"], ["merge", "mine", "--out", "all"]):
        assert normlab("study", *words)[0] == 0
    assert Path("runs.csv").read_text().count("beaten by lr 0.1") == 9
    assert "9 stopped" in Path("mine/report.html").read_text()
    assert normlab("study", "status", "all")[0] == 0

    assert normlab(*run)[0] == 0
    assert len(quick_runs) == 36
    assert "stopped" not in Path("mine/report.html").read_text()
    code, out = normlab("study", "status", "mine")
    assert "36 of 36 runs have ended." in out


def test_the_page_of_a_study_that_runs(stopped, tmp_path):
    from normlab.study.watch import Server

    (tmp_path / "plan.toml").write_text(PLAN.to_toml())
    for one in stopped:
        RunStore(tmp_path / "runs.jsonl").append(one)
    with Server(tmp_path, 0) as server:
        assert b"Runs: 24 finished, 3 diverged, 9 stopped." in server.page()[1]
        (tmp_path / "plan.toml").write_text(replace(PLAN, stop_beaten=False).to_toml())
        page = server.page()[1]
    assert b"Runs: 24 finished, 3 diverged, 9 waiting." in page
    assert b"stopped" not in page


def test_the_rule_is_that_of_the_documentation():
    """0.01 at three seeds asks for a mean difference of four deviations."""
    for share, won in ((4.1, True), (3.9, False)):
        apart = [share - 1, share, share + 1]
        assert beats(dict(enumerate(apart)), dict.fromkeys(range(3), 0.0), 0.0) == won
    assert math.isclose(stats.t.ppf(0.99, 2) / math.sqrt(3), 4.02, abs_tol=0.01)

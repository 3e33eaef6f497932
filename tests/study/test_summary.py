import math
from dataclasses import replace

import pytest

from normlab.study.summary import Spread, best, conditions_of, latest, summarize, varying
from records import record


def test_runs_that_differ_only_in_their_seed_are_one_group():
    groups = summarize([record(0.96, seed=1), record(0.98, seed=0), record(0.9, seed=0, lr=0.1)])
    assert [(group.settings["lr"], len(group.records)) for group in groups] == [(0.1, 1), (0.4, 2)]
    assert [run.settings["seed"] for run in groups[1].records] == [0, 1]
    assert "seed" not in groups[0].settings


def test_mean_and_sample_deviation():
    (group,) = summarize([record(value, seed=seed) for seed, value in enumerate((0.90, 0.94, 0.95))])
    assert group.value is not None
    assert group.value.mean == pytest.approx(0.93)
    assert group.value.std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.02**2) / 2))
    assert group.loss is not None
    assert group.loss.mean == pytest.approx(3 * 0.07)
    assert group.outcome == "0.9300 ±0.0265"


def test_a_later_record_with_the_same_key_replaces_an_earlier_one():
    runs = [record(status="failed", error="killed"), record(0.9, seed=1), record(0.97)]
    assert [run.status for run in latest(runs)] == ["finished", "finished"]
    (group,) = summarize(runs)
    assert group.value is not None
    assert group.value.mean == pytest.approx(0.935)
    assert group.errors == []


@pytest.mark.parametrize("accuracy", [None, math.nan, 0.5])
def test_a_diverged_run_is_in_no_mean(accuracy):
    (group,) = summarize([record(0.96), replace(record(accuracy, "diverged", step=41, seed=1), seconds=99.0)])
    assert group.value == Spread(0.96, None)
    assert group.loss == Spread(pytest.approx(3 * 0.04), None)
    assert group.seconds_per_step == pytest.approx(0.0125)
    assert group.diverged_at == [41]
    assert group.outcome == "0.9600, 1 of 2 diverged"


def test_a_loss_that_is_missing_leaves_the_accuracy():
    run = record(0.96)
    run.epochs[-1]["valid"]["loss"] = None
    (group,) = summarize([run])
    assert group.value == Spread(0.96, None)
    assert group.loss is None


@pytest.mark.parametrize(
    ("runs", "outcome"),
    [
        ([record(0.9612)], "0.9612"),
        ([record(1.0), record(1.0, seed=1)], "1.0000 ±0.0000"),
        ([record(None, "diverged", step=41)], "diverged at step 41"),
        ([record(None, "diverged", step=0)], "diverged at step 0"),
        ([record(None, "diverged")], "diverged"),
        ([record(None, "diverged", step=s, seed=s) for s in range(3)], "3 of 3 diverged"),
        ([record(None, "failed", error="no memory")], "failed"),
        ([record(None, "failed"), record(None, "diverged", step=4, seed=1)], "1 of 2 diverged, 1 of 2 failed"),
        ([record(0.1135)], "0.1135, does not train"),
        ([record(None)], "no accuracy"),
    ],
)
def test_outcome_in_words(runs, outcome):
    (group,) = summarize(runs)
    assert group.outcome == outcome


@pytest.mark.parametrize(
    ("spread", "text"),
    [
        (Spread(0.9612, 0.00004), "0.9612 ±0.0000"),
        (Spread(0.0, 0.0), "0.0000 ±0.0000"),
        (Spread(3.24e-6, 1.5e-7), "3.24e-06 ±1.5e-07"),
        (Spread(-2.5e140, 1e139), "-2.5e+140 ±1e+139"),
        (Spread(51234.5678, None), "51234.5678"),
    ],
)
def test_tiny_and_huge_values_can_be_read(spread, text):
    assert str(spread) == text


def test_less_than_half_right_is_marked_as_not_training():
    little, learnt, nothing = summarize(
        [record(0.499, batch_size=1), record(0.5, batch_size=2), record(None, "diverged", batch_size=3)]
    )
    assert (little.trains, learnt.trains, nothing.trains) == (False, True, False)


def test_a_failed_run_keeps_its_error():
    (group,) = summarize([record(None, "failed", error="out of memory"), record(None, "failed", seed=1)])
    assert group.errors == ["out of memory", "unknown"]


def test_best_prefers_what_trains_on_every_seed():
    steady = [record(0.95, seed=seed, lr=0.1) for seed in range(3)]
    shaky = [record(0.98, lr=0.4), *(record(None, "diverged", step=9, seed=seed, lr=0.4) for seed in (1, 2))]
    chance = [record(0.1, seed=seed, lr=1.0) for seed in range(3)]
    winner = best(summarize(steady + shaky + chance))
    assert winner is not None
    assert winner.settings["lr"] == 0.1
    winner = best(summarize(shaky + chance))
    assert winner is not None
    assert winner.settings["lr"] == 0.4, "one good run of three beats three at chance"
    assert best([]) is None


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("sign", [-1, 1])
def test_divergence_ranks_lower_whatever_the_sign_of_the_metric(lower, sign):
    """A log-likelihood may be below 0, and so may a loss."""

    def run(value, status="finished", **settings):
        one = record(value, status, metrics=["mine:score"], lower=lower, **settings)
        one.epochs[-1]["valid"]["score"] = value
        return one

    steady = [run(sign * 5.0, seed=seed, lr=0.1) for seed in range(3)]
    shaky = [run(sign * 5.0, lr=0.2), *(run(None, "diverged", seed=seed, lr=0.2) for seed in (1, 2))]
    lost = [run(None, "diverged", seed=seed, lr=0.3) for seed in range(3)]
    ranked = sorted(summarize(shaky + lost + steady), key=lambda group: -group.score)
    assert [group.settings["lr"] for group in ranked] == [0.1, 0.2, 0.3]


def test_a_run_that_failed_does_not_make_its_setting_worse():
    groups = summarize([record(0.9), record(None, "failed", error="killed", seed=1), record(0.89, lr=0.1)])
    winner = best(groups)
    assert winner is not None
    assert winner.settings["lr"] == 0.4


def test_varying_names_the_settings_that_differ():
    groups = summarize([record(0.9), record(0.9, clip=1.0), record(0.9, batch_size=4, seed=5)])
    assert varying(groups) == ["batch_size", "clip"]


def test_groups_are_in_order_of_their_settings_as_numbers():
    groups = summarize([record(0.9, batch_size=size, clip=clip) for size in (512, 2, 32) for clip in (1.0, None)])
    assert [(group.settings["batch_size"], group.settings["clip"]) for group in groups] == [
        (2, None), (2, 1.0), (32, None), (32, 1.0), (512, None), (512, 1.0),
    ]  # fmt: skip


def test_settings_unknown_to_this_version_do_not_split_a_group():
    run = record(0.9, seed=1)
    run.settings["later"] = 3
    assert len(summarize([record(0.9), run])) == 1


def test_a_task_is_told_where_there_is_one():
    assert "task" not in conditions_of(summarize([record(0.9)]))
    assert "task segment" in conditions_of(summarize([record(0.9, task="segment")]))
    assert varying(summarize([record(0.9), record(0.9, task="segment")])) == ["task"]


def test_final_is_of_the_last_epoch_and_only_of_a_finished_run():
    run = record(0.9)
    run.epochs.append({"epoch": 2, "valid": {"loss": 0.2, "accuracy": 0.95}})
    assert run.final("accuracy") == 0.95
    assert replace(run, status="diverged").final("accuracy") is None
    assert replace(run, epochs=[]).final("accuracy") is None

"""Intervals, paired tests and verdicts: against scipy's, and against simulations whose truth is known."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from normlab.errors import InputError
from normlab.study.statistics import fewest_seeds, holm, improvement, interval, paired_test, seeds_to_tell
from normlab.study.summary import summarize
from normlab.study.verdicts import compare_groups, conclusions, interval_of, method_of, outcomes_of
from records import record


def runs(norm, values, **settings):
    """A run a value, by seed; None is one that diverged."""
    return [
        record(value, "finished" if value is not None else "diverged", points=1, norm=norm, seed=seed, **settings)
        for seed, value in enumerate(values)
    ]


def study(**norms):
    return summarize([one for norm, values in norms.items() for one in runs(norm, values)])


def by_seed(values):
    return dict(enumerate(values))


# Intervals


def test_two_or_three_values_have_students_interval():
    for values in ([0.1, 0.4], [0.2, 0.25, 0.9]):
        expected = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        assert interval(values) == pytest.approx(expected)


def test_the_studentised_bootstrap_over_all_resamples_is_that_of_its_definition():
    """Every one of the 4⁴ resamples, in a plain loop."""
    x = np.array([0.2, 0.5, 0.55, 0.9])
    error = stats.sem(x)
    moved = sorted(
        (np.mean(one) - x.mean()) / max(np.sqrt(np.var(one) / 3), 1e-9 * error)
        for one in itertools.product(x, repeat=4)
    )
    low, high = (moved[math.ceil(round(q * 256, 9)) - 1] for q in (0.025, 0.975))
    assert interval(list(x)) == pytest.approx((x.mean() - high * error, x.mean() - low * error))


@pytest.mark.parametrize(
    "values",
    [
        [0.5, 0.5, 0.5, 0.9],
        [0.9, 0.9, 0.9, 0.9, 0.8, 0.8],
        [2.3, 0.1, 0.1, 0.1 + 1e-9, 0.1, 0.1 - 1e-9],
        [0.97, 0.971, 0.969, 0.972, 0.968, 0.11],
        [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [1e6, 1e6 + 1, 1e6 + 1, 1e6 + 1],
    ],
)
def test_ends_stay_near_where_values_are_alike_but_for_one(values):
    """Resamples of alike values have no error, which would send an end of the bootstrap to infinity."""
    low, high = interval(values) or (0, 0)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    for away in (np.mean(values) - low, high - np.mean(values)):
        assert 0.499 * half <= away <= 2.001 * half


def test_intervals_keep_their_shape():
    """Under shift and scale, and in any order; equal values have none; one value has no interval."""
    x = [0.91, 0.93, 0.92, 0.95, 0.92, 0.90]
    low, high = interval(x) or (0, 0)
    assert low < np.mean(x) < high
    assert interval(x[::-1]) == pytest.approx((low, high))
    assert interval([2 - 3 * v for v in x]) == pytest.approx((2 - 3 * high, 2 - 3 * low))
    assert interval([v * 1e140 for v in x]) == pytest.approx((low * 1e140, high * 1e140))
    assert interval([0.5] * 6) == (0.5, 0.5)
    assert interval([0.5]) is interval([]) is None
    with pytest.raises(InputError, match="finite"):
        interval([0.5, math.nan])


def test_more_values_than_can_be_resampled_in_all_ways_draw_the_same_resamples_each_time():
    x = list(np.random.default_rng(0).normal(size=40))
    assert interval(x) == interval(x)
    assert interval(x) == pytest.approx(stats.t.interval(0.95, 39, np.mean(x), stats.sem(x)), abs=0.05)


@pytest.mark.parametrize(
    ("draw", "truth", "n"),
    [
        (lambda rng, n: rng.normal(size=n), 0.0, 3),
        (lambda rng, n: rng.normal(size=n), 0.0, 6),
        (lambda rng, n: rng.uniform(size=n), 0.5, 6),
        (lambda rng, n: rng.beta(5, 2, size=n), 5 / 7, 6),
    ],
)
def test_intervals_cover_the_truth_in_95_of_100_studies(draw, truth, n):
    """Within chance for 1,500 studies; benchmarks/intervals.py has more of them, and other distributions."""
    rng = np.random.default_rng(0)
    found = np.array([interval(list(draw(rng, n))) for _ in range(1500)])
    covered = np.mean((found[:, 0] <= truth) & (truth <= found[:, 1]))
    assert 0.95 - 3 * 0.0056 < covered < 0.95 + 3 * 0.0056


# Tests


@pytest.mark.parametrize("n", [2, 5, 6, 9])
def test_the_paired_test_takes_every_choice_of_signs(n):
    numbers = np.random.default_rng(n)
    a, b = numbers.normal(size=(2, n)).round(1)
    d = a - b
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((1, -1), repeat=n)]
    expected = np.mean([one >= abs(d.sum()) - 1e-9 for one in sums])
    of_scipy = stats.permutation_test(
        (a, b), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=1 << n, vectorized=False
    )
    assert expected == pytest.approx(of_scipy.pvalue)
    assert paired_test(by_seed(a), by_seed(b), 0.0) == pytest.approx(expected)
    assert paired_test(by_seed(b), by_seed(a), 0.0) == pytest.approx(expected)


def test_five_seeds_cannot_tell_and_six_can():
    better, worse = [0.9] * 6, [0.8] * 6
    assert paired_test(by_seed(better[:5]), by_seed(worse[:5]), 0.0) == 2 / 2**5 > 0.05
    assert paired_test(by_seed(better), by_seed(worse), 0.0) == 2 / 2**6 < 0.05


def test_more_seeds_than_have_all_signs_taken_have_nearly_the_same_p():
    a = np.random.default_rng(0).normal(0.4, 1, size=20)
    _, expected = stats.ttest_1samp(a, 0)
    assert paired_test(by_seed(a), by_seed(0 * a), 0.0) == pytest.approx(expected, abs=0.02)


def test_pairs_are_by_seed_and_only_seeds_of_both_count():
    assert paired_test({0: 0.1, 1: 0.2, 7: 0.9}, {1: 0.1, 0: 0.3, 8: 0.0}, 0.0) == 1.0
    assert paired_test({0: 0.1}, {1: 0.2}, 0.0) is None
    assert paired_test({0: 0.1, 1: 0.3}, {0: 0.1, 1: 0.3}, 0.0) == 1.0


def test_a_run_that_did_not_finish_counts_as_the_worst():
    finished, diverged = by_seed([0.6, 0.7, 0.65, 0.7, 0.6, 0.62]), by_seed([None] * 6)
    assert paired_test(finished, diverged, 0.0) == 2 / 64
    assert paired_test(diverged, diverged, 0.0) == 1.0


def test_ties_and_rounding_do_not_change_p():
    """0.1 + 0.2 − 0.3 is not 0 in binary; alike pairs change nothing."""
    three = paired_test(by_seed([0.1, 0.2, -0.3]), by_seed([0.0] * 3), 0.0)
    assert three == 1.0
    tenths = by_seed([0.3, 0.1, 0.2, 0.4, 0.6, 0.7])
    wholes = {seed: round(10 * value) for seed, value in tenths.items()}
    zeros = by_seed([0.0] * 6)
    assert paired_test(tenths, zeros, 0.0) == paired_test(wholes, zeros, 0.0) == 2 / 64
    p = paired_test(by_seed([3, 1, 2, -1]), by_seed([0] * 4), 0.0)
    assert paired_test(by_seed([3, 1, 2, -1, 5, 5]), by_seed([0, 0, 0, 0, 5, 5]), 0.0) == p


def test_the_seeds_that_would_tell_do():
    """In 80 of 100 studies, as a t-test by the book; fewer differences than three ask for none."""
    apart = [0.1, 0.9, 0.5]  # mean 0.5, deviation 0.4
    n = seeds_to_tell(apart)
    assert n is not None
    shift = 0.5 / 0.4 * math.sqrt(n)
    bound = stats.t.ppf(0.975, n - 1)
    assert 1 - stats.nct.cdf(bound, n - 1, shift) == pytest.approx(0.8, abs=0.06)
    assert n < (seeds_to_tell(apart, tests=10) or 0)
    assert seeds_to_tell([0.5] * 3) == fewest_seeds(1), "no noise: as few as can tell at all"
    assert seeds_to_tell([0.1, 0.9]) is seeds_to_tell([-1.0, 0.0, 1.0]) is seeds_to_tell([1.0, -1.0, 1e-6]) is None


def test_holms_correction():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    values = list(np.random.default_rng(0).uniform(size=20))
    for one, corrected in zip(values, holm(values), strict=True):
        assert one <= corrected <= min(1.0, 20 * one)


def test_improvement_is_the_share_of_pairs_that_win():
    a, b = [0.1, 0.5, 0.5], [0.5, 0.2]
    expected = stats.mannwhitneyu(a, b).statistic / 6
    assert improvement(by_seed(a), by_seed(b)) == pytest.approx(expected)
    assert improvement(by_seed(a), by_seed(b), lower=True) == pytest.approx(1 - expected)
    assert improvement(by_seed([0.1]), by_seed([None])) == 1.0
    assert improvement(by_seed([0.1]), by_seed([None]), lower=True) == 1.0


@pytest.mark.parametrize("tests", [1, 2, 3, 10, 15, 45])
def test_the_fewest_seeds_are_the_fewest(tests):
    n = fewest_seeds(tests)
    assert 2 / 2**n * tests <= 0.05 < 2 / 2 ** (n - 1) * tests


# Verdicts


def test_a_clear_difference_is_told_and_a_small_one_is_not():
    numbers = np.random.default_rng(0)
    shared = numbers.normal(scale=0.02, size=8)
    best, far = (mean + shared + numbers.normal(scale=0.002, size=8) for mean in (0.95, 0.90))
    near = best + np.array([-1, 1, -2, 2, -1, 1, 2, -3]) * 1e-3
    found = {one.group.settings["norm"]: one for one in compare_groups(study(running=best, group=near, batch=far))}
    assert found["running"].words == "best mean"
    assert not found["group"].worse
    assert found["group"].words.startswith("not told apart (p ")
    assert found["batch"].worse
    assert found["batch"].p == pytest.approx(2 / 2**8)
    assert found["batch"].p_corrected == pytest.approx(3 * 2 / 2**8)
    assert found["batch"].difference == pytest.approx(np.mean(best - far))
    (line,) = conclusions(study(running=best, group=near, batch=far))
    assert f"Worse: batch by {np.mean(best - far):.4f}. Not told apart from it, with" in line
    assert f": group {100 * found['group'].improvement:.0f} %." in line


def test_too_few_seeds_say_how_many_could_tell():
    groups = study(running=[0.9, 0.91, 0.92], group=[0.8, 0.81, 0.82], batch=[0.1, 0.1, 0.1])
    assert [one.words for one in compare_groups(groups)] == [
        "best mean",
        *["not told apart (needs 7 seeds or more)"] * 2,
    ]
    assert conclusions(groups) == [
        "batch 2: running has the best accuracy, 0.9100 (0.8852 to 0.9348). Not told apart from it, with the share of "
        "pairs of runs that it wins: group 100 %, batch 100 %. 3 seeds; 7 or more could tell."
    ]


def test_one_seed_ranks_nothing():
    assert conclusions(study(running=[0.9], group=[0.8])) == [
        "batch 2: running has the best accuracy of one seed, 0.9000. That ranks nothing."
    ]


def test_the_settings_that_train_are_counted():
    """Of each norm at each batch size, if several were tried; one that always diverges does not train."""
    groups = summarize(
        runs("running", [0.9, 0.91, 0.92], lr=0.1)
        + runs("running", [0.8, 0.81, 0.82], lr=1.0)
        + runs("batch", [0.7, 0.71, 0.72], lr=0.1)
        + runs("batch", [None] * 3, lr=1.0)
        + runs("none", [0.1, 0.1, 0.1], lr=0.1)
    )
    found = {one.group.settings["norm"]: (one.training, one.tried) for one in compare_groups(groups)}
    assert found == {"running": (2, 2), "batch": (1, 2), "none": (0, 1)}
    (line,) = conclusions(groups)
    assert line.endswith("Settings that train: running 2 of 2, batch 1 of 2, none 0 of 1.")


def test_a_norm_alone_has_no_rank():
    (one,) = compare_groups(study(running=[0.9, 0.92, 0.91]))
    assert one.rivals == 0
    assert one.words == "no rival"
    assert conclusions(study(running=[0.9, 0.92, 0.91])) == [
        "batch 2: running alone, accuracy 0.9100 (0.8852 to 0.9348) at its best setting."
    ]
    assert method_of(study(running=[0.9], batch=[0.8])) == ""


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((2, 3), "Student's, over seeds."),
        ((4, 6), "studentised bootstrap over seeds."),
        ((3, 4), "studentised bootstrap over seeds; Student's below 4 seeds."),
        ((1, 4), "studentised bootstrap over seeds."),
    ],
)
def test_the_interval_that_is_named_is_the_one_that_was_made(counts, said):
    groups = study(**{f"norm_{place}": [0.9 + 0.01 * n for n in range(count)] for place, count in enumerate(counts)})
    assert method_of(groups).partition(" Verdict")[0] == f"Interval of the mean in 95 of 100 studies: {said}"


def test_only_runs_that_finished_are_in_an_interval():
    assert "Student's, over seeds." in method_of(study(running=[0.9, 0.91, 0.92, None, None]))
    assert "Interval" not in method_of(study(running=[0.9, None], batch=[0.8, None]))


@pytest.mark.parametrize("name", ["a, b", "a 50 %", 'a", "b', "a by 0.1, c", "a. Worse: b"])
def test_names_in_a_list_cannot_be_taken_for_several(name):
    values = {"running": [0.9, 0.91, 0.92, 0.9, 0.91, 0.93], name: [0.1] * 6}
    (line,) = conclusions(study(**values))
    assert f"Worse: {json.dumps(name)} by 0.8117." in line
    assert json.dumps(name) in conclusions(study(**{name: [0.9, 0.8], "running": [0.9, 0.7]}))[0]


def test_a_norm_whose_runs_all_diverge_is_worse():
    groups = study(running=[0.9, 0.91, 0.92, 0.9, 0.91, 0.93], none=[None] * 6)
    best, other = compare_groups(groups)
    assert best.group.settings["norm"] == "running"
    assert other.worse
    assert other.difference is None
    assert other.improvement == 1.0


def losses(norm, values):
    """The losses of runs, of which less is better."""
    return runs(norm, [None if v is None else 1 - v / 3 for v in values], metrics=["loss"], lower=True)


@pytest.mark.parametrize("level", [0.01, 1.0, 100.0])
def test_divergence_is_worse_than_any_loss(level):
    """Also than the largest loss that was seen, and where all are alike."""
    for finished in (np.linspace(1, 2, 6), np.ones(6)):
        groups = summarize(losses("running", list(level * finished)) + losses("none", [None] * 6))
        best, other = compare_groups(groups)
        assert (best.group.settings["norm"], other.word) == ("running", "worse")
        assert other.p == 2 / 64


def test_two_norms_that_always_diverge_are_not_told_apart():
    first, other = compare_groups(study(running=[None] * 6, none=[None] * 6))
    assert first.word == "not compared"
    assert other.word == "not told apart"
    assert other.p == 1.0


def test_a_failed_run_is_no_outcome_of_the_norm():
    """An error on six seeds is not six divergences, and the words say how many seeds are left."""
    good = runs("running", [0.9, 0.91, 0.92, 0.9, 0.91, 0.93, 0.92])
    failed = [record(status="failed", error="no space left", norm="batch", seed=seed) for seed in range(6)]
    groups = summarize(good + failed + [record(0.8, norm="batch", seed=6)])
    batch = next(one for one in groups if one.settings["norm"] == "batch")
    assert outcomes_of(batch) == {6: 0.8}
    other = next(one for one in compare_groups(groups) if one.group is batch)
    assert (other.seeds, other.p) == (1, 1.0)
    assert other.words == "not told apart (needs 6 seeds or more, 1 in common)"


def test_a_metric_that_is_no_number_is_the_worst_outcome():
    (group,) = study(running=[0.9, math.nan, math.inf])
    assert outcomes_of(group) == {0: 0.9, 1: None, 2: None}
    assert interval_of(group) is None


def test_no_seed_in_common_is_no_comparison():
    other = runs("group", [0.8] * 6)
    moved = [record(0.9, norm="running", seed=seed + 10) for seed in range(6)]
    best, second = compare_groups(summarize(other + moved))
    assert best.words == "best mean"
    assert second.words == "not compared (no seed in common)"
    assert second.p is second.p_corrected is second.difference is None
    failed = [record(status="failed", norm="batch", seed=seed) for seed in range(10, 16)]
    (line,) = conclusions(summarize(other + moved + failed))
    assert line.endswith("No seed in common with it: group, batch.")


def test_the_shared_seeds_may_be_against_the_best_mean():
    """The best mean comes of seeds that the other norm did not have."""
    shared = [0.8, 0.81, 0.8, 0.82, 0.8, 0.81]
    first = runs("running", [*shared, *[0.99] * 30])
    second = runs("group", [value + 0.01 for value in shared])
    best, other = compare_groups(summarize(first + second))
    assert best.group.settings["norm"] == "running"
    assert other.words == "better (p 0.031, 6 in common)"
    assert not other.worse
    assert other.difference == pytest.approx(-0.01)
    assert "Better on the seeds in common: group." in conclusions(summarize(first + second))[0]


def test_norms_are_compared_on_the_same_data_only():
    """And with the same network, metric and length of training; each has its best rate and optimizer."""
    groups = summarize(
        runs("batch", [0.9] * 6, data="mnist")
        + runs("running", [0.5] * 6, data="cifar10")
        + runs("batch", [0.4] * 6, data="cifar10")
        + runs("batch", [0.45] * 6, data="cifar10", lr=0.1, optimizer="adamw")
    )
    found = [(one.group.settings["data"], one.group.settings["norm"], one.word) for one in compare_groups(groups)]
    assert found == [
        ("cifar10", "running", "best mean"),
        ("cifar10", "batch", "worse"),
        ("mnist", "batch", "no rival"),
    ]
    assert [line.partition(":")[0] for line in conclusions(groups)] == ["data cifar10, batch 2", "data mnist, batch 2"]
    assert "batch by 0.0500" in conclusions(groups)[0]


def test_where_less_is_better():
    groups = summarize(
        losses("batch", [0.3, 0.31, 0.32, 0.3, 0.33, 0.31]) + losses("group", [0.5, 0.51, 0.5, 0.52, 0.5, None])
    )
    best, other = compare_groups(groups)
    assert best.group.settings["norm"] == "batch"
    assert other.worse
    assert other.difference == pytest.approx(
        np.mean([0.5, 0.51, 0.5, 0.52, 0.5]) - np.mean([0.3, 0.31, 0.32, 0.3, 0.33])
    )


def test_the_interval_is_of_the_runs_that_the_mean_is_of():
    """Also where a store has two runs of one setting and seed, under keys of its own."""
    twice = [replace(record(value, seed=seed), key=f"{seed}{value}") for seed in (0, 1) for value in (0.1, 0.9)]
    (group,) = summarize(twice)
    low, high = interval_of(group) or (0, 0)
    assert group.value is not None
    assert low < group.value.mean < high


def test_intervals_of_shares_stay_within_them():
    (group,) = study(batch=[0.99, 0.6])
    assert interval_of(group) == (0.0, 1.0)


def test_alike_norms_are_told_apart_in_at_most_5_of_100_studies():
    """Five norms of which none is better, and ten seeds; the best is chosen by the same runs."""
    numbers = np.random.default_rng(0)
    wrong, studies = 0, 300
    for _ in range(studies):
        values = 0.9 + 0.02 * numbers.normal(size=(5, 10)) + 0.02 * numbers.normal(size=10)
        groups = study(**dict(zip(("batch", "group", "layer", "running", "none"), values.tolist(), strict=True)))
        wrong += any(one.worse for one in compare_groups(groups))
    assert wrong / studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / studies)

"""Intervals, paired tests and verdicts: against scipy's, and against simulations whose truth is known."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from normlab.errors import InputError
from normlab.study.statistics import (
    compare_groups,
    conclusions,
    fewest_seeds,
    holm,
    improvement,
    interval,
    interval_of,
    paired_test,
)
from normlab.study.summary import summarize
from records import record


def runs(norm, values, **settings):
    """A run a value, by seed; None is one that diverged."""
    return [
        record(value, "finished" if value is not None else "diverged", norm=norm, seed=seed, **settings)
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


def test_intervals_keep_their_shape():
    """Under shift and scale, and in any order; equal values have none; one value has no interval."""
    x = [0.91, 0.93, 0.92, 0.95, 0.92, 0.90]
    low, high = interval(x) or (0, 0)
    assert low < np.mean(x) < high
    assert interval(x[::-1]) == pytest.approx((low, high))
    assert interval([2 - 3 * v for v in x]) == pytest.approx((2 - 3 * high, 2 - 3 * low))
    assert interval([0.5] * 6) == (0.5, 0.5)
    assert interval([0.5]) is interval([]) is None
    with pytest.raises(InputError, match="finite"):
        interval([0.5, math.nan])


def test_more_values_than_can_be_resampled_in_all_ways_draw_the_same_resamples_each_time():
    x = list(np.random.default_rng(0).normal(size=40))
    assert interval(x) == interval(x)
    assert interval(x) == pytest.approx(stats.t.interval(0.95, 39, np.mean(x), stats.sem(x)), abs=0.05)


def test_six_values_cover_the_truth_in_95_of_100_studies():
    """Within chance for 1,500 studies; benchmarks/intervals.py has more of them, and other distributions."""
    numbers = np.random.default_rng(0)
    found = [interval(list(numbers.normal(size=6))) for _ in range(1500)]
    covered = np.mean([low <= 0 <= high for low, high in found])
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
    expected = stats.ttest_1samp(a, 0).pvalue
    assert paired_test(by_seed(a), by_seed(0 * a), 0.0) == pytest.approx(expected, abs=0.02)


def test_pairs_are_by_seed_and_only_seeds_of_both_count():
    assert paired_test({0: 0.1, 1: 0.2, 7: 0.9}, {1: 0.1, 0: 0.3, 8: 0.0}, 0.0) == 1.0
    assert paired_test({0: 0.1}, {1: 0.2}, 0.0) is None
    assert paired_test({0: 0.1, 1: 0.3}, {0: 0.1, 1: 0.3}, 0.0) == 1.0


def test_a_run_that_did_not_finish_counts_as_the_worst():
    finished, diverged = by_seed([0.6, 0.7, 0.65, 0.7, 0.6, 0.62]), by_seed([None] * 6)
    assert paired_test(finished, diverged, 0.0) == 2 / 64
    assert paired_test(diverged, diverged, 0.0) == 1.0


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
    assert found["running"].words == "best"
    assert not found["group"].worse
    assert found["group"].words.startswith("not told apart (p ")
    assert found["batch"].worse
    assert found["batch"].p == pytest.approx(2 / 2**8)
    assert found["batch"].p_corrected == pytest.approx(3 * 2 / 2**8)
    assert found["batch"].difference == pytest.approx(np.mean(best - far))
    (line,) = conclusions(study(running=best, group=near, batch=far))
    assert f"Worse: batch by {np.mean(best - far):.4f}. Not told apart from it: group." in line


def test_too_few_seeds_say_how_many_could_tell():
    groups = study(running=[0.9, 0.91, 0.92], group=[0.8, 0.81, 0.82], batch=[0.1, 0.1, 0.1])
    assert [one.words for one in compare_groups(groups)] == ["best", *["not told apart (3 of 7 seeds)"] * 2]
    assert conclusions(groups) == [
        "batch 2: running has the best accuracy, 0.9100 (0.8852 to 0.9348). Not told apart from it: group, batch. "
        "3 seeds; 7 or more could tell."
    ]


def test_one_seed_ranks_nothing():
    assert conclusions(study(running=[0.9], group=[0.8])) == [
        "batch 2: running has the best accuracy of one seed, 0.9000. That ranks nothing."
    ]


def test_a_norm_whose_runs_all_diverge_is_worse():
    groups = study(running=[0.9, 0.91, 0.92, 0.9, 0.91, 0.93], none=[None] * 6)
    best, other = compare_groups(groups)
    assert best.group.settings["norm"] == "running"
    assert other.worse
    assert other.difference is None
    assert other.improvement == 1.0


def test_where_less_is_better():
    values = {"batch": [0.3, 0.31, 0.32, 0.3, 0.33, 0.31], "group": [0.5, 0.51, 0.5, 0.52, 0.5, None]}
    groups = summarize(
        [
            one
            for norm, losses in values.items()
            for one in runs(norm, [None if v is None else 1 - v / 3 for v in losses], metrics=["loss"], lower=True)
        ]
    )
    best, other = compare_groups(groups)
    assert best.group.settings["norm"] == "batch"
    assert other.worse
    assert other.difference == pytest.approx(
        np.mean([0.5, 0.51, 0.5, 0.52, 0.5]) - np.mean([0.3, 0.31, 0.32, 0.3, 0.33])
    )


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

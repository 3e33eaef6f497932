"""How sure a comparison is: intervals of means, exact tests paired by seed, and what they say in words."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import check
from .summary import UP_TO_ONE, Group, best, values_of

LEVEL = 0.95
EXACT_UP_TO = 8  # values whose resamples are all taken, and not drawn
RESAMPLES = 9_999
SIGNS = 16  # seeds whose choices of signs are all taken
FEWEST = 4  # values for which a bootstrap says something

BySeed = Mapping[int, float | None]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval in which the mean of all possible runs lies, in 95 of 100 studies.

    From four values on it is the studentised bootstrap: the mean of each resample, less the mean, over its own standard
    error, has the quantiles q and Q; the interval is (mean − Q·s/√n, mean − q·s/√n). Up to eight values all resamples
    are taken, so that nothing is drawn. With two or three values it is Student's interval.

    In simulations with six values it covers the true mean in 95 % of studies for normal values, and in 93 % for very
    skewed ones. Student's interval covers 88 % of those, the usual percentile bootstrap 86 % and 80 %
    (`python benchmarks/intervals.py`).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 12.

    Args:
        values: one of each run, all finite.

    Returns:
        Lower and upper end; None for fewer than two values.

    Raises:
        InputError: a value is not finite.

    Example:
        >>> low, high = interval([0.91, 0.93, 0.92, 0.95, 0.92, 0.90])
        >>> print(f"{low:.3f} to {high:.3f}")
        0.907 to 0.944
    """
    x = np.asarray(values, dtype=float)
    check(bool(np.isfinite(x).all()), "values", list(values), "finite numbers")
    n = len(x)
    if n < 2:
        return None
    mean, error = x.mean(), x.std(ddof=1) / math.sqrt(n)
    if error == 0:
        return float(mean), float(mean)
    if n < FEWEST:
        from scipy import stats

        low, high = stats.t.interval(LEVEL, n - 1, mean, error)
        return float(low), float(high)
    counts, weights = _resamples(n)
    means = counts @ x / n
    errors = np.sqrt(np.maximum(counts @ x**2 / n - means**2, 0) / (n - 1))
    tiny = 1e-9 * error  # a resample of one value alone has no error
    moved = (means - mean) / np.maximum(errors, tiny)
    low, high = (_quantile(moved, weights, q) for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(mean - high * error), float(mean - low * error)


def interval_of(group: Group) -> tuple[float, float] | None:
    """The interval of the metric of a group, over the runs that finished; within 0 and 1 for metrics that are."""
    found = interval([value for value in group.by_seed.values() if value is not None])
    if found is None or group.metric not in UP_TO_ONE:
        return found
    return max(found[0], 0.0), min(found[1], 1.0)


def paired_test(first: BySeed, second: BySeed, worst: float) -> float | None:
    """The exact p of two settings that were run with the same seeds, from both sides: the sign-flip test.

    If the settings were alike, each difference could as well have the other sign. p is the share of all 2ⁿ choices of
    signs whose sum is as far from 0. So with n seeds it is 2/2ⁿ or more: five seeds cannot reach 0.05.

    Args:
        first: the metric of each run of a setting, by seed; None where the run did not finish.
        second: the same of the other setting.
        worst: what a run that did not finish counts as.

    Returns:
        p; None if the settings have no seed in common.

    Source: Fisher, The Design of Experiments, 1935, section 21.

    Example:
        >>> six = {seed: 0.9 + 0.01 * seed for seed in range(6)}
        >>> paired_test(six, {seed: value - 0.02 for seed, value in six.items()}, worst=0.0)
        0.03125
    """
    pairs = _pairs(first, second, worst)
    if not pairs:
        return None
    apart = np.array([a - b for a, b in pairs])
    sums = np.abs(_signs(len(pairs)) @ apart)
    return float((sums >= abs(apart.sum()) - 1e-12 * np.abs(apart).sum()).mean())


def holm(values: Sequence[float]) -> list[float]:
    """The p-values of several tests, corrected so that one wrong "better" among them all is as rare as in one test.

    The smallest is multiplied by their number m, the next by m − 1, and so on.
    None is below the one before, or above 1.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    corrected, largest = [0.0] * len(values), 0.0
    for place, number in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - place) * values[number]))
        corrected[number] = largest
    return corrected


def improvement(first: BySeed, second: BySeed, lower: bool = False) -> float:
    """The probability that a run of the first setting is better than one of the second, ties by half.

    A run that did not finish is worse than any that did.

    Source: Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical Precipice, 2021.
    """
    worst = math.inf if lower else -math.inf
    sign = -1 if lower else 1
    ours, theirs = ([worst if v is None else v for v in one.values()] for one in (first, second))
    wins = [(sign * a > sign * b) + 0.5 * (a == b) for a, b in itertools.product(ours, theirs)]
    return sum(wins) / len(wins) if wins else math.nan


def fewest_seeds(tests: int) -> int:
    """How many seeds it takes before one of so many tests can say "better" at all: 2/2ⁿ times their number is 0.05.

    Example:
        >>> [fewest_seeds(tests) for tests in (1, 3, 15)]
        [6, 7, 10]
    """
    return math.ceil(math.log2(2 * max(1, tests) / (1 - LEVEL) * (1 - 1e-12)))


@dataclass(frozen=True)
class Verdict:
    """A norm at its best setting beside the best norm of its batch size.

    Attributes:
        group: the norm's best setting.
        against: the best of all at this batch size; the same group for the best norm itself.
        seeds: how many both have in common.
        difference: mean of `against` less that of `group` over these seeds, above 0 where `against` is better; None if
            one of them has no run that finished.
        p: of the paired test; None for the best norm itself, and where there is no seed in common.
        p_corrected: by Holm, over all pairs of norms at this batch size.
        improvement: probability that a run of `against` is better than one of `group`.
        needed: the fewest seeds with which so many norms can be told apart at all.
    """

    group: Group
    against: Group
    seeds: int
    difference: float | None
    p: float | None
    p_corrected: float | None
    improvement: float
    needed: int

    @property
    def worse(self) -> bool:
        """Whether the norm is worse than the best, beyond chance."""
        return self.p_corrected is not None and self.p_corrected < 1 - LEVEL + 1e-12

    @property
    def words(self) -> str:
        """The verdict: `best`, `worse (p 0.03)`, `not told apart (p 0.3)`, or how many seeds could tell."""
        if self.group is self.against:
            return "best"
        if self.p_corrected is None:
            return "not compared: no seed in common"
        if self.worse:
            return f"worse (p {self.p_corrected:.2g})"
        if self.seeds < self.needed:
            return f"not told apart ({self.seeds} of {self.needed} seeds)"
        return f"not told apart (p {self.p_corrected:.2g})"


def compare_groups(groups: Sequence[Group]) -> list[Verdict]:
    """Each norm at its best setting against the best norm of its batch size, by paired tests with Holm's correction.

    The best norm is chosen by the same runs. So the correction is over all pairs of norms of the batch size, and one
    wrong "worse" comes in at most 5 of 100 studies without a difference. That a norm's best setting is chosen by the
    same runs too is not corrected for: `normlab study confirm` tries those settings with other seeds.

    Args:
        groups: see `summary.summarize`.

    Returns:
        One for each norm at each batch size, by batch size and then the best first.
    """
    verdicts = []
    for size in values_of(groups, "batch_size"):
        here = [group for group in groups if group.settings["batch_size"] == size]
        chosen = [best(g for g in here if g.settings["norm"] == norm) for norm in values_of(here, "norm")]
        leaders = sorted((one for one in chosen if one is not None), key=lambda group: -group.score)
        verdicts += _verdicts(leaders)
    return verdicts


def conclusions(groups: Sequence[Group]) -> list[str]:
    """The verdicts in a sentence or two for each batch size, with the interval of the best.

    With one seed there is nothing to conclude, and that is what it says.
    """
    verdicts = compare_groups(groups)
    lines = []
    for size in values_of(groups, "batch_size"):
        first, *others = [one for one in verdicts if one.group.settings["batch_size"] == size]
        lines.append(f"batch {size}: {_conclusion(first, others)}")
    return lines


def _conclusion(first: Verdict, others: list[Verdict]) -> str:
    group = first.group
    name = group.settings["norm"]
    if group.value is None:
        return "no run has finished."
    if len(group.by_seed) == 1:
        return f"{name} has the best {group.metric} of one seed, {group.value.mean:.4f}. That ranks nothing."
    low, high = interval_of(group) or (group.value.mean, group.value.mean)
    parts = [f"{name} has the best {group.metric}, {group.value.mean:.4f} ({low:.4f} to {high:.4f})."]
    worse = [f"{one.group.settings['norm']} by {one.difference or 0:.4f}" for one in others if one.worse]
    alike = [one for one in others if not one.worse]
    if worse:
        parts.append(f"Worse: {', '.join(worse)}.")
    if alike:
        few = "" if first.seeds >= first.needed else f" {first.seeds} seeds; {first.needed} or more could tell."
        parts.append(f"Not told apart from it: {', '.join(one.group.settings['norm'] for one in alike)}.{few}")
    return " ".join(parts)


def _verdicts(leaders: list[Group]) -> list[Verdict]:
    """Of groups that are the best of their norm, the best of all first."""
    worst = _worst(leaders)
    pairs = list(itertools.combinations(range(len(leaders)), 2))
    found = [paired_test(leaders[i].by_seed, leaders[j].by_seed, worst) for i, j in pairs]
    known = [(pair, p) for pair, p in zip(pairs, found, strict=True) if p is not None]
    corrected = dict(zip([pair for pair, _ in known], holm([p for _, p in known]), strict=True))
    first = leaders[0]
    return [
        Verdict(
            group,
            first,
            len(group.by_seed.keys() & first.by_seed.keys()),
            _difference(first, group),
            dict(known).get((0, place)),
            corrected.get((0, place)),
            improvement(first.by_seed, group.by_seed, first.lower),
            fewest_seeds(len(pairs)),
        )
        for place, group in enumerate(leaders)
    ]


def _worst(groups: Sequence[Group]) -> float:
    """What a run that did not finish counts as: 0 where metrics reach from 0 to 1, else the worst that was seen."""
    if groups[0].metric in UP_TO_ONE and not groups[0].lower:
        return 0.0
    seen = [value for group in groups for value in group.by_seed.values() if value is not None]
    return (max(seen) if groups[0].lower else min(seen)) if seen else 0.0


def _pairs(first: BySeed, second: BySeed, worst: float) -> list[tuple[float, float]]:
    seeds = sorted(first.keys() & second.keys())
    values = [(first[seed], second[seed]) for seed in seeds]
    return [(worst if a is None else a, worst if b is None else b) for a, b in values]


def _difference(first: Group, other: Group) -> float | None:
    ours, theirs = first.by_seed, other.by_seed
    both = [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()]
    apart = [a - b for a, b in both if a is not None and b is not None]
    if not apart:
        return None
    return float((-1 if first.lower else 1) * sum(apart) / len(apart))


@functools.lru_cache
def _signs(n: int) -> np.ndarray:
    """Every choice of n signs; of more than 2¹⁶, that many drawn ones, the first all +."""
    if n <= SIGNS:
        return np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    drawn = np.random.default_rng(0).choice((1.0, -1.0), size=(1 << SIGNS, n))
    drawn[0] = 1.0
    return drawn


@functools.lru_cache
def _resamples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample has each value, and its probability: of all up to `EXACT_UP_TO`, else of those drawn."""
    if n > EXACT_UP_TO:
        counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
        return counts.astype(float), np.full(RESAMPLES, 1 / RESAMPLES)
    rows = [np.bincount(one, minlength=n) for one in itertools.combinations_with_replacement(range(n), n)]
    ways = [math.factorial(n) / math.prod(math.factorial(count) for count in row) for row in rows]
    return np.array(rows, dtype=float), np.array(ways) / n**n


def _quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    return float(values[order][min(int((reached < share - 1e-12).sum()), len(values) - 1)])

"""How sure a mean or a difference is: intervals, exact tests paired by seed, and how many seeds would tell."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import check

LEVEL = 0.95
EXACT_UP_TO = 8  # values whose resamples are all taken, and not drawn
RESAMPLES = 9_999
SIGNS = 16  # seeds whose choices of signs are all taken
FEWEST = 4  # values for which a bootstrap says something
WIDEST = 2  # its ends, at most so many times as far from the mean as Student's, and at least one part in as many
POWER = 0.8
MOST = 1_000  # seeds that are ever recommended

BySeed = Mapping[int, float | None]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval in which the mean of all possible runs lies, in 95 of 100 studies.

    From four values on it is the studentised bootstrap: the mean of each resample, less the mean, over its own standard
    error, has the quantiles q and Q; the interval is (mean − Q·s/√n, mean − q·s/√n). Up to eight values all resamples
    are taken, so that nothing is drawn. With two or three values it is Student's interval. Resamples of nearly equal
    values have hardly an error. So no end is more than twice, or less than half, as far from the mean as Student's.

    How often it covers the true mean in 4,000 simulated studies, in percent (`python benchmarks/intervals.py`):

    | values | with 3 | with 6 | with 10 | Student's with 6 | percentile bootstrap with 6 |
    |---|---|---|---|---|---|
    | normal | 94 | 95 | 95 | 95 | 86 |
    | bounded: uniform | 92 | 96 | 97 | 93 | 87 |
    | bounded, a little skewed: beta(5, 2) | 94 | 95 | 95 | 95 | 86 |
    | bounded, skewed: beta(20, 1) | 90 | 94 | 94 | 90 | 78 |
    | very skewed: exponential | 88 | 93 | 94 | 89 | 83 |

    No interval knows of a rare bad run that did not come up. Equal values have an interval without width, which says
    no more than that they are equal.

    No interval for a mean has its level whatever the law of the values is (Bahadur and Savage, 1956).

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
    from scipy.special import stdtrit

    x = np.asarray(values, dtype=float)
    check(bool(np.isfinite(x).all()), "values", list(values), "finite numbers")
    n = len(x)
    if n < 2:
        return None
    mean, deviation = x.mean(), x.std(ddof=1)
    if deviation == 0:
        return float(mean), float(mean)
    student = float(stdtrit(n - 1, (1 + LEVEL) / 2))
    low, high = -student, student
    if n >= FEWEST:
        counts, weights = _resamples(n)
        z = (x - mean) / deviation
        means = counts @ z / n
        errors = np.sqrt(np.maximum(counts @ z**2 / n - means**2, 0) / (n - 1))
        moved = means / np.maximum(errors, 1e-9)  # a resample of one value alone has no error
        low, high = _quantiles(moved, weights, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        low = min(max(low, -WIDEST * student), -student / WIDEST)
        high = max(min(high, WIDEST * student), student / WIDEST)
    error = deviation / math.sqrt(n)
    return float(mean - high * error), float(mean - low * error)


def paired_test(first: BySeed, second: BySeed, worst: float) -> float | None:
    """The exact p of two settings that were run with the same seeds, from both sides: the sign-flip test.

    If the settings were alike, each difference could as well have the other sign. p is the share of all 2ⁿ choices of
    signs whose sum is as far from 0. So with n seeds it is 2/2ⁿ or more: five seeds cannot reach 0.05. From 17 seeds
    on, 65,536 choices are drawn. Only seeds that both have count.

    It asks whether the settings are alike, not whether their means are. If means are equal, but one setting varies
    three times as much and is very skewed, p is below 0.05 in 7 of 100 studies with ten seeds.

    Args:
        first: the metric of each run of a setting, by seed; None where the run diverged.
        second: the same of the other setting.
        worst: what a run that diverged counts as.

    Returns:
        p; None if the settings have no seed in common.

    Source: Fisher, The Design of Experiments, 1935, section 21.

    Example:
        >>> six = {seed: 0.9 + 0.01 * seed for seed in range(6)}
        >>> paired_test(six, {seed: value - 0.02 for seed, value in six.items()}, worst=0.0)
        0.03125
    """
    apart = paired_differences(first, second, worst)
    return _sign_flip(tuple(apart.tolist())) if len(apart) else None


@functools.lru_cache(maxsize=10_000)  # table, picture and page ask for the same
def _sign_flip(differences: tuple[float, ...]) -> float:
    apart = np.array(differences)
    sums = np.abs(_signs(len(apart)) @ apart)
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

    A run that diverged is worse than any that finished.

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


def seeds_to_tell(differences: Sequence[float], tests: int = 1) -> int | None:
    """About how many seeds would tell two settings apart in 80 of 100 studies, if they differ as the runs so far do.

    It is (z₁ + z₂)² s²/d² + z₁²/2, with mean d and deviation s of the differences by seed, the normal quantiles z₁ of
    the level over twice the tests, and z₂ of 0.8; never below `fewest_seeds`.

    Source: Guenther, Sample size formulas for normal theory t tests, 1981.

    Args:
        differences: between two settings, one of each seed.
        tests: how many there are in all, for Holm's correction.

    Returns:
        The number; None if there are fewer than three differences, if their mean is 0, and beyond 1,000.

    Example:
        >>> seeds_to_tell([0.01, -0.01, 0.02, 0.0, 0.02, 0.01])
        18
    """
    from scipy.special import ndtri

    mean = np.mean(differences) if len(differences) >= 3 else 0.0
    if mean == 0:
        return None
    level, power = ndtri(1 - (1 - LEVEL) / 2 / tests), ndtri(POWER)
    seeds = (level + power) ** 2 * (np.std(differences, ddof=1) / mean) ** 2 + level**2 / 2
    return None if seeds > MOST else max(math.ceil(seeds), fewest_seeds(tests))


def paired_differences(first: BySeed, second: BySeed, worst: float) -> np.ndarray:
    """First less second, for each seed that both have."""
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return np.array([(worst if a is None else a) - (worst if b is None else b) for a, b in pairs])


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


def _quantiles(values: np.ndarray, weights: np.ndarray, shares: Sequence[float]) -> list[float]:
    """The least values that so large a share of the weights reaches up to."""
    if weights[0] == 1 / len(weights):  # drawn: all weigh the same, so that no sorting is needed
        places = [math.ceil(share * len(values) - 1e-9) - 1 for share in shares]
        return np.partition(values, places)[places].tolist()
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    places = [min(int((reached < share - 1e-12).sum()), len(values) - 1) for share in shares]
    return values[order][places].tolist()

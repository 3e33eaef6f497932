"""How sure a comparison is: intervals of means, exact tests paired by seed, and what they say in words."""

import functools
import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from ..errors import check
from .plan import Shared
from .summary import UP_TO_ONE, Group, digits, is_number, printable, show, sort_key, title_of, values_of, varying

LEVEL = 0.95
EXACT_UP_TO = 8  # values whose resamples are all taken, and not drawn
RESAMPLES = 9_999
SIGNS = 16  # seeds whose choices of signs are all taken
FEWEST = 4  # values for which a bootstrap says something
WIDEST = 2  # its ends, at most so many times as far from the mean as Student's, and at least one part in as many
POWER = 0.8
PLAIN = re.compile(r"[\w.:/+-]+")  # names that a list can hold as they are
MOST = 1_000  # seeds that are ever recommended

# Settings that must be the same where norms are compared; in the others each norm has its best.
CASE = (*(one.name for one in fields(Shared)), "task", "batch_size")

STOPPED = (
    "A setting was stopped once another one of its norm clearly beat it. It has fewer seeds, and is never the best."
)

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

    No interval for a mean has its level whatever the law of the values is (Bahadur and Savage, 1956): 93 is what six
    very skewed values allow here. Wider limits of the ends, or none, make it 93.0.

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


def interval_of(group: Group) -> tuple[float, float] | None:
    """The interval of the metric of a group, over the runs that finished; within 0 and 1 for metrics that are."""
    found = _known_interval(tuple(record.result for record in group.records if is_number(record.result)))
    if found is None or group.metric not in UP_TO_ONE:
        return found
    return max(found[0], 0.0), min(found[1], 1.0)


_known_interval = functools.lru_cache(maxsize=10_000)(interval)  # table, pictures and page ask for the same


def outcomes_of(group: Group) -> dict[int, float | None]:
    """The metric of each run of a group, by its seed; None where the run diverged, or its metric is no finite number.

    A run that failed is left out: an error, or a machine that went down, says nothing about a norm.
    """
    failed = {record.settings.get("seed", 0) for record in group.records if record.status == "failed"}
    return {seed: value if is_number(value) else None for seed, value in group.by_seed.items() if seed not in failed}


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
    apart = _apart(first, second, worst)
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


@dataclass(frozen=True)
class Verdict:
    """A norm at its best setting beside the best norm of its batch size.

    Attributes:
        group: the norm's best setting.
        against: the best of all at this batch size; the same group for the best norm itself.
        rivals: how many other norms it is compared with.
        seeds: how many both have in common, without those of failed runs.
        difference: mean of `against` less that of `group` over the seeds with which both finished, above 0 where
            `against` is better; None if there is no such seed.
        p: of the paired test; None for the best norm itself, and where there is no seed in common.
        p_corrected: by Holm, over all pairs of norms at this batch size.
        improvement: probability that a run of `against` is better than one of `group`; one half for the same group.
        needed: the fewest seeds with which so many norms can be told apart at all.
        would_tell: about how many seeds would tell these two apart, see `seeds_to_tell`; None if it is not known.
        tried: how many settings of the norm there are at this batch size, with those that were stopped.
        training: how many of them train, see `Group.trains`.
        behind: whether the test's differences are to the advantage of `against`.
        stopped: how many settings of the norm were stopped early, see `stopping`.
    """

    group: Group
    against: Group
    rivals: int
    seeds: int
    difference: float | None
    p: float | None
    p_corrected: float | None
    improvement: float
    needed: int
    would_tell: int | None
    tried: int
    training: int
    behind: bool
    stopped: int = 0

    @property
    def apart(self) -> bool:
        """Whether the two differ beyond chance."""
        return self.p_corrected is not None and self.p_corrected <= 1 - LEVEL + 1e-12

    @property
    def worse(self) -> bool:
        """Whether the norm is worse than the best, beyond chance."""
        return self.apart and self.behind

    @property
    def word(self) -> str:
        """`best mean` (or `best of one seed`, `no rival`), `worse`, `better`, `not told apart` or `not compared`.

        Better is a norm without the best mean that wins on the seeds that both have.
        """
        if self.group is self.against and self.group.value is not None:
            if not self.rivals:
                return "no rival"
            return "best mean" if len(self.group.by_seed) > 1 else "best of one seed"
        if self.p_corrected is None:
            return "not compared"
        return ("worse" if self.behind else "better") if self.apart else "not told apart"

    @property
    def words(self) -> str:
        """The verdict with its reason: `worse (p 0.03)`, `not told apart (needs 7 seeds or more)`."""
        if self.group is self.against:
            return self.word
        if self.p_corrected is None:
            return f"{self.word} (no seed in common)"
        reasons = [f"p {self.p_corrected:.2g}"]
        if not self.apart:
            if self.seeds < self.needed:
                reasons = [f"needs {self.needed} seeds or more"]
            elif self.would_tell is not None and self.would_tell > self.seeds:
                reasons.append(f"about {self.would_tell} seeds would tell")
        if self.seeds < max(len(self.group.by_seed), len(self.against.by_seed)):
            reasons.append(f"{self.seeds} in common")
        return f"{self.word} ({', '.join(reasons)})"


def compare_groups(groups: Sequence[Group]) -> list[Verdict]:
    """Each norm at its best setting against the best norm of its batch size, by paired tests with Holm's correction.

    The best norm is chosen by the same runs. So the correction is over all pairs of norms of the batch size, and one
    wrong "worse" comes in at most 5 of 100 studies of alike norms, at each batch size. That a norm's best setting is
    chosen by the same runs too is not corrected for. Two alike norms, one with five settings and one with a single one,
    are told apart in 8 of 100 studies. `normlab study confirm` tries the best settings with other seeds, which is fair.

    A run that diverged is an outcome, the worst there is: it counts as 0 where a metric reaches from 0 to 1. Elsewhere
    it lies beyond the worst value, as far as that lies from the best. A run that failed is left out with its seed.

    Runs on different data, networks, or by any other setting that a study shares, are compared apart.

    Args:
        groups: see `summary.summarize`.

    Returns:
        One for each norm at each batch size, by batch size and then the best first.
    """
    verdicts = []
    for here in _cases(groups):
        norms: dict[str, list[Group]] = {}
        for group in here:
            norms.setdefault(group.settings["norm"], []).append(group)
        ranked = sorted(norms.values(), key=lambda settings: max(one.rank for one in settings), reverse=True)
        verdicts += _verdicts(ranked)
    return verdicts


def conclusions(groups: Sequence[Group]) -> list[str]:
    """The verdicts in a sentence or two for each batch size, with the interval of the best.

    With one seed there is nothing to conclude, and that is what it says.
    """
    apart = [name for name in varying(groups) if name in CASE and name != "batch_size"]
    lines = []
    for here in _cases(groups):
        settings = here[0].settings
        case = [
            *(f"{title_of(name)} {show(name, settings[name])}" for name in apart),
            f"batch {settings['batch_size']}",
        ]
        first, *others = compare_groups(here)
        lines.append(f"{', '.join(case)}: {_conclusion(first, others)}")
    return lines


def method_of(groups: Sequence[Group]) -> str:
    """How the intervals and verdicts of a study are made, in sentences; nothing where every setting has one seed."""
    if all(len(group.by_seed) < 2 for group in groups):
        return ""
    cases = _cases(groups)
    counts = {sum(is_number(value) for value in group.by_seed.values()) for group in groups}
    few, many = any(2 <= count < FEWEST for count in counts), max(counts) >= FEWEST
    way = "studentised bootstrap over seeds" if many else "Student's, over seeds"
    also = f"; Student's below {FEWEST} seeds" if few and many else ""
    said = [f"Interval of the mean in 95 of 100 studies: {way}{also}."] if few or many else []
    if any(len(values_of(here, "norm")) > 1 for here in cases):
        said.append("Verdict: sign-flip test paired by seed, corrected after Holm at each batch size.")
        if any(len(here) > len(values_of(here, "norm")) for here in cases):
            said.append("Each norm is judged at its best setting. These runs chose it; other seeds are fairer.")
    if any(group.stopped for group in groups):
        said.append(STOPPED)
    return " ".join(said)


def _cases(groups: Sequence[Group]) -> list[list[Group]]:
    """The groups whose norms can be compared with each other, by batch size."""
    cases: dict[tuple, list[Group]] = {}
    for group in groups:
        cases.setdefault(tuple(group.settings[name] for name in CASE), []).append(group)
    return [cases[key] for key in sorted(cases, key=lambda key: [sort_key(value) for value in reversed(key)])]


def _conclusion(first: Verdict, others: list[Verdict]) -> str:
    group = first.group
    name = _name(group)
    if group.value is None:
        return "no run has finished."
    metric = printable(group.metric)
    mean, *ends = digits(group.value.mean, *(interval_of(group) or ()))
    if others and len(group.by_seed) == 1:
        return f"{name} has the best {metric} of one seed, {mean}. That ranks nothing."
    sure = f" ({' to '.join(ends)})" if ends else ""
    if not others:
        stopped = f" {first.stopped} of {first.tried} settings were stopped, clearly beaten." if first.stopped else ""
        return f"{name} alone, {metric} {mean}{sure} at its best setting.{stopped}"
    parts = [f"{name} has the best {metric}, {mean}{sure}."]
    worse = [_by(one, group.value.mean) for one in others if one.worse]
    better = [_name(one.group) for one in others if one.apart and not one.behind]
    alike = [one for one in others if one.p is not None and not one.apart]
    strange = [_name(one.group) for one in others if one.p is None]
    if worse:
        parts.append(f"Worse: {', '.join(worse)}.")
    if better:
        parts.append(f"Better on the seeds in common: {', '.join(better)}.")
    if alike:
        shares = [f"{_name(one.group)} {100 * one.improvement:.0f} %" for one in alike]
        parts.append(f"Not told apart from it, with the share of pairs of runs that it wins: {', '.join(shares)}.")
        seeds = min(one.seeds for one in alike)
        if seeds < first.needed:
            parts.append(f"{seeds} seed{'s' * (seeds != 1)}; {first.needed} or more could tell.")
    if strange:
        parts.append(f"No seed in common with it: {', '.join(strange)}.")
    if max(one.tried for one in (first, *others)) > 1:
        shares = [f"{_name(one.group)} {one.training} of {one.tried}" for one in (first, *others)]
        parts.append(f"Settings that train: {', '.join(shares)}.")
    if any(one.stopped for one in (first, *others)):
        shares = [f"{_name(one.group)} {one.stopped} of {one.tried}" for one in (first, *others)]
        parts.append(f"Settings that were stopped, clearly beaten: {', '.join(shares)}.")
    return " ".join(parts)


def _by(verdict: Verdict, best: float) -> str:
    name = _name(verdict.group)
    return name if verdict.difference is None else f"{name} by {digits(best, verdict.difference)[1]}"


def _name(group: Group) -> str:
    """The name of the norm, in quotes if a sentence would not show where it ends."""
    name = show("norm", group.settings["norm"])
    return name if PLAIN.fullmatch(name) else json.dumps(name, ensure_ascii=False)


def _verdicts(norms: list[list[Group]]) -> list[Verdict]:
    """Of norms with all their settings, the best norm first."""
    leaders = [max(settings, key=lambda group: group.rank) for settings in norms]
    worst, runs = worst_of(leaders), [outcomes_of(one) for one in leaders]
    pairs = list(itertools.combinations(range(len(leaders)), 2))
    found = {(i, j): paired_test(runs[i], runs[j], worst) for i, j in pairs}
    known = {pair: p for pair, p in found.items() if p is not None}
    corrected = dict(zip(known, holm(list(known.values())), strict=True))
    verdicts = []
    for place, group in enumerate(leaders):
        better = (-1 if group.lower else 1) * _apart(runs[0], runs[place], worst)
        verdict = Verdict(
            group,
            against=leaders[0],
            rivals=len(leaders) - 1,
            seeds=len(better),
            difference=_difference(leaders[0], group),
            p=known.get((0, place)),
            p_corrected=corrected.get((0, place)),
            improvement=improvement(runs[0], runs[place], group.lower),
            needed=fewest_seeds(len(pairs)),
            would_tell=seeds_to_tell(list(better), len(pairs)),
            tried=len(norms[place]),
            training=sum(one.trains for one in norms[place]),
            behind=bool(better.sum() > 0),
            stopped=sum(bool(one.stopped) for one in norms[place]),
        )
        verdicts.append(verdict)
    return verdicts


def worst_of(groups: Sequence[Group]) -> float:
    """What a run that diverged counts as, see `compare_groups`."""
    if groups[0].metric in UP_TO_ONE and not groups[0].lower:
        return 0.0
    seen = [value for group in groups for value in group.by_seed.values() if is_number(value)]
    if not seen:
        return 0.0
    low, high = min(seen), max(seen)
    beyond = (high - low) or 1.0
    return high + beyond if groups[0].lower else low - beyond


def _apart(first: BySeed, second: BySeed, worst: float) -> np.ndarray:
    """First less second, for each seed that both have."""
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return np.array([(worst if a is None else a) - (worst if b is None else b) for a, b in pairs])


def _difference(first: Group, other: Group) -> float | None:
    ours, theirs = outcomes_of(first), outcomes_of(other)
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


def _quantiles(values: np.ndarray, weights: np.ndarray, shares: Sequence[float]) -> list[float]:
    """The least values that so large a share of the weights reaches up to."""
    if weights[0] == 1 / len(weights):  # drawn: all weigh the same, so that no sorting is needed
        places = [math.ceil(share * len(values) - 1e-9) - 1 for share in shares]
        return np.partition(values, places)[places].tolist()
    order = np.argsort(values)
    reached = np.cumsum(weights[order])
    places = [min(int((reached < share - 1e-12).sum()), len(values) - 1) for share in shares]
    return values[order][places].tolist()

"""What a study concludes: each norm beside the best one of its batch size, by tests, and in words."""

import functools
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields

from .plan import Shared
from .statistics import (
    FEWEST,
    LEVEL,
    fewest_seeds,
    holm,
    improvement,
    interval,
    paired_differences,
    paired_test,
    seeds_to_tell,
)
from .summary import UP_TO_ONE, Group, digits, is_number, printable, show, sort_key, title_of, values_of, varying

PLAIN = re.compile(r"[\w.:/+-]+")  # names that a list can hold as they are

# Settings that must be the same where norms are compared; in the others each norm has its best.
CASE = (*(one.name for one in fields(Shared)), "task", "batch_size")

STOPPED = (
    "A setting was stopped once another one of its norm clearly beat it. It has fewer seeds, and is never the best."
)


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
        better = (-1 if group.lower else 1) * paired_differences(runs[0], runs[place], worst)
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


def _difference(first: Group, other: Group) -> float | None:
    ours, theirs = outcomes_of(first), outcomes_of(other)
    both = [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()]
    apart = [a - b for a, b in both if a is not None and b is not None]
    if not apart:
        return None
    return float((-1 if first.lower else 1) * sum(apart) / len(apart))

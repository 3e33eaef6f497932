"""Early stopping of a setting that another one of its norm clearly beats: it is run with no further seed."""

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from .plan import Plan, Trial
from .record import Record
from .statistics import BySeed, paired_differences
from .summary import Group, show, summarize, varying
from .verdicts import CASE, outcomes_of, worst_of

FEWEST = 3  # seeds in common
LEVEL = 0.01


def beats(first: BySeed, second: BySeed, worst: float, lower: bool = False) -> bool:
    """Whether a setting is clearly better than another one over the seeds that both have.

    These are three or more, it is better at each of them, and p of Student's paired test from one side is below 0.01.
    Differences that are all equal are clear.

    Args:
        first: the metric of each run of a setting, by seed; None where the run diverged.
        second: the same of the other setting.
        worst: what a run that diverged counts as.
        lower: whether less of the metric is better.

    Example:
        >>> good = {0: 0.93, 1: 0.95, 2: 0.94}
        >>> beats(good, {0: 0.83, 1: 0.84, 2: 0.85}, worst=0.0)
        True
        >>> beats(good, {0: 0.83, 1: 0.84, 2: 0.93}, worst=0.0)
        False
    """
    from scipy.special import stdtr

    apart = paired_differences(second, first, worst) if lower else paired_differences(first, second, worst)
    n = len(apart)
    if n < FEWEST or not (apart > 0).all():
        return False
    apart = apart / apart.max()  # squares of tiny differences would be 0
    deviation = apart.std(ddof=1)
    return bool(deviation == 0 or stdtr(n - 1, -apart.mean() / deviation * math.sqrt(n)) < LEVEL)


@dataclass(frozen=True)
class Step:
    """What may be done once some runs have ended.

    Attributes:
        ready: the keys of the runs that may begin now.
        stopped: a record for each run that is not to be made, with the reason as its error.
    """

    ready: list[str] = field(default_factory=list)
    stopped: list[Record] = field(default_factory=list)


class Rounds:
    """Lets the runs of each norm begin seed by seed, and stops settings that are beaten by then.

    A norm's runs with the next seed wait until all its runs with the seeds before have ended. So whether a run is made
    depends on the results alone, and not on the order in which they came. Norms, batch sizes, and whatever else makes
    settings incomparable, do not wait for each other. A run that failed tells nothing.

    Args:
        trials: of a study; its order is that of the seeds.
        records: of the trials that have ended already.
        made_by: for the records of runs that are stopped, by key.

    Attributes:
        first: what may be done at the beginning.
    """

    def __init__(
        self, trials: Iterable[Trial], records: Iterable[Record], made_by: Mapping[str, dict[str, str]] | None = None
    ):
        families: dict[tuple, list[Trial]] = {}
        for trial in dict.fromkeys(trials):
            families.setdefault(tuple(getattr(trial, name) for name in ("norm", *CASE)), []).append(trial)
        found = {record.key: record for record in records if record.status in ("finished", "diverged")}
        self._made_by, self._families, self.first = made_by or {}, {}, Step()
        for members in families.values():
            family = _Family(members, found)
            self._families |= {trial.key: family for trial in members}
            step = self._go_on(family)
            self.first.ready.extend(step.ready)
            self.first.stopped.extend(step.stopped)

    def end(self, record: Record) -> Step:
        """A run has ended, or failed."""
        family = self._families[record.key]
        family.end(record)
        return self._go_on(family)

    def _go_on(self, family: "_Family") -> Step:
        ready, stopped = family.go_on()
        records = [
            Record(trial.key, trial.to_dict(), "stopped", error=why, made_by=self._made_by.get(trial.key, {}))
            for trial, why in stopped
        ]
        return Step([trial.key for trial in ready], records)


class _Family:
    """The settings of one norm that can be compared with each other."""

    def __init__(self, trials: Sequence[Trial], found: Mapping[str, Record]):
        rounds: dict[int, list[Trial]] = {}
        for trial in trials:
            rounds.setdefault(trial.seed, []).append(trial)
        self._rounds = deque(rounds.values())
        keys = [trial.key for trial in trials]
        self._found = {key: found[key] for key in keys if key in found}
        self._last: list[str] = []  # runs of this seed
        self._seen: list[Record] = []  # of the seeds before
        self._open: set[str] = set()  # runs of this seed that have not ended
        self._beaten: dict[Trial, str] = {}  # a setting, with seed 0, and why

    def end(self, record: Record) -> None:
        self._found[record.key] = record
        self._open.discard(record.key)

    def go_on(self) -> tuple[list[Trial], list[tuple[Trial, str]]]:
        """The runs that may begin now; and those that are stopped, each with the reason."""
        ready, stopped = [], []
        while self._rounds and not self._open:
            self._seen += [self._found[key] for key in self._last if key in self._found]
            self._look()
            trials = {trial.key: trial for trial in self._rounds.popleft()}
            self._last = list(trials)
            for key, trial in trials.items():
                if key in self._found:
                    continue
                if why := self._beaten.get(replace(trial, seed=0)):
                    stopped.append((trial, why))
                else:
                    ready.append(trial)
                    self._open.add(key)
        return ready, stopped

    def _look(self) -> None:
        """Find the settings that are beaten by one that is not."""
        if len(self._seen) < 2 * FEWEST:
            return
        groups = {_setting(group): group for group in summarize(self._seen)}
        outcomes = {setting: outcomes_of(group) for setting, group in groups.items()}
        worst, names = worst_of(list(groups.values())), varying(groups.values())
        for setting in [one for one in groups if one not in self._beaten]:
            winners = [
                other
                for other, rival in groups.items()
                if other not in self._beaten and beats(outcomes[other], outcomes[setting], worst, rival.lower)
            ]
            if winners:
                winner = max(winners, key=lambda other: groups[other].score)
                seeds = len(outcomes[winner].keys() & outcomes[setting].keys())
                words = " ".join(f"{name} {show(name, groups[winner].settings[name])}" for name in names)
                self._beaten[setting] = f"beaten by {words} at {seeds} seeds"


def _setting(group: Group) -> Trial:
    return Trial(**group.settings, seed=0)


def counts(plan: Plan, record: Record) -> bool:
    """Whether a stored record is of a run that the plan wants no more; a stopped one may be wanted again."""
    return record.status != "stopped" or plan.stop_beaten

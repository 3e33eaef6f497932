"""What the records of a study say, and in words: runs that differ in nothing but their seed become one `Group`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from operator import attrgetter
from typing import Any, TypeGuard

from ..errors import InputError
from .plan import LATER, Trial
from .record import Record

SETTINGS = tuple(field.name for field in fields(Trial) if field.name != "seed")
UP_TO_ONE = ("accuracy", "dice", "mean_iou")  # metrics from 0 to 1, where more is better
TRAINS_FROM = 0.5
TITLES = {"batch_size": "batch size", "lr": "learning rate"}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of some values; a single value has no deviation."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Iterable[float | None]) -> "Spread | None":
        """The spread of the values that are finite numbers; None if there are none."""
        known = [value for value in values if is_number(value)]
        if not known:
            return None
        mean, n = math.fsum(known) / len(known), len(known)
        return cls(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in known) / (n - 1)) if n > 1 else None)

    def __str__(self) -> str:
        return " ±".join(digits(self.mean, *([] if self.std is None else [self.std])))


@dataclass(frozen=True)
class Group:
    """The runs of one setting, one for each seed.

    Attributes:
        settings: what the runs share, by the names of `SETTINGS`.
        records: the runs, by seed.
        value: the first metric of the last epoch on the validation data, over the finished runs only.
        loss: the same for the validation loss.
        seconds_per_step: mean over the finished runs.
        stopped: the runs that were not made, since another setting of the norm beats this one clearly, by seed.
    """

    settings: dict[str, Any]
    records: tuple[Record, ...]
    value: Spread | None
    loss: Spread | None
    seconds_per_step: float | None
    stopped: tuple[Record, ...] = ()

    @property
    def diverged_at(self) -> list[int | None]:
        """The step of each run that diverged; None where it is not known."""
        return [record.diverged_at_step for record in self.records if record.status == "diverged"]

    @property
    def errors(self) -> list[str]:
        """What stopped each run that failed."""
        return [record.error or "unknown" for record in self.records if record.status == "failed"]

    @property
    def metric(self) -> str:
        """The name of the metric that judges, without its module: `accuracy`."""
        return self.records[0].metric

    @property
    def lower(self) -> bool:
        """Whether less of it is better."""
        return self.settings["lower"]

    @property
    def by_seed(self) -> dict[int, float | None]:
        """The metric of each run, by its seed; None where the run did not finish."""
        return {record.settings.get("seed", 0): record.result for record in self.records}

    @property
    def trains(self) -> bool:
        """Whether the mean is one half or more, of a metric of `UP_TO_ONE`; of others, whether there is a mean."""
        return self.value is not None and (self.metric not in UP_TO_ONE or self.value.mean >= TRAINS_FROM)

    @cached_property
    def score(self) -> float:
        """For ranking only, more is better: the mean, and worse for a share that diverged. Failed runs do not count."""
        if self.value is None:
            return 0.0 if self.metric in UP_TO_ONE and not self.lower else -math.inf
        ended = [record for record in self.records if record.status != "failed"]
        share = sum(is_number(record.result) for record in ended) / len(ended)
        mean = -self.value.mean if self.lower else self.value.mean
        return mean * share if mean > 0 else mean / share

    @property
    def rank(self) -> tuple[bool, float]:
        """What the best is chosen by: the score, but any setting that was stopped comes behind all others."""
        return not self.stopped, self.score

    @property
    def made(self) -> str:
        """How many of the planned runs were made, where the rest was stopped: `3 of 6 seeds`; empty elsewhere."""
        count = len(self.records)
        return f"{count} of {count + len(self.stopped)} seeds" if self.stopped else ""

    @property
    def outcome(self) -> str:
        """The result in a few words: `0.9612 ±0.0021`, `diverged at step 41`, `0.9612, 2 of 3 diverged`.

        Of a setting that was stopped: `0.9612 ±0.0021, stopped after 3 of 6 seeds, beaten by lr 0.1 at 3 seeds`.
        """
        parts = [str(self.value)] if self.value else []
        if self.value and not self.trains:
            parts.append("does not train")
        if len(self.records) == 1 and not self.stopped and self.diverged_at and self.diverged_at[0] is not None:
            return f"diverged at step {self.diverged_at[0]}"
        for count, word in ((len(self.diverged_at), "diverged"), (len(self.errors), "failed")):
            if count:
                parts.append(word if len(self.records) == 1 else f"{count} of {len(self.records)} {word}")
        if self.stopped:
            parts += [f"stopped after {self.made}", printable(self.stopped[0].error or "clearly beaten")]
        return ", ".join(parts) or f"no {printable(self.metric)}"


def latest(records: Iterable[Record]) -> list[Record]:
    """The records without those that a later one with the same key replaces."""
    return list({record.key: record for record in records}.values())


def summarize(records: Iterable[Record]) -> list[Group]:
    """The groups of runs that share everything but the seed, ordered by their settings.

    A setting of which no run was made is left out.

    Raises:
        InputError: there are no records.
    """
    runs: dict[tuple, list[Record]] = {}
    for record in latest(records):
        runs.setdefault(_settings(Trial.from_dict(record.settings)), []).append(record)
    groups = [
        _group(dict(zip(SETTINGS, values, strict=True)), members)
        for values, members in runs.items()
        if any(record.status != "stopped" for record in members)
    ]
    if not groups:
        raise InputError("There is nothing to report: no run has ended yet.")
    return sorted(groups, key=lambda group: [sort_key(group.settings[name]) for name in SETTINGS])


def varying(groups: Iterable[Group]) -> list[str]:
    """The names of the settings that are not the same in all groups."""
    seen = [group.settings for group in groups]
    return [name for name in SETTINGS if len({settings[name] for settings in seen}) > 1]


def values_of(groups: Iterable[Group], name: str) -> list[Any]:
    """The values of a setting, each once and in order."""
    return sorted({group.settings[name] for group in groups}, key=sort_key)


def best(groups: Iterable[Group]) -> Group | None:
    """The group with the highest rank, the first of equals; None if there is no group."""
    return max(groups, key=lambda group: group.rank, default=None)


def is_number(value: float | None) -> TypeGuard[float]:
    """Whether `value` is there and finite."""
    return value is not None and math.isfinite(value)


def sort_key(value: Any) -> tuple:
    """Orders the values of a setting: none, then numbers, then words."""
    return (0,) if value is None else (2, value) if isinstance(value, str) else (1, value)


def title_of(name: str) -> str:
    """A setting's name in words."""
    return TITLES.get(name, name)


def show(name: str, value: Any) -> str:
    """A setting's value in words, without what would move a terminal's cursor."""
    if value is None:
        return "all" if name == "images" else "none"
    if isinstance(value, tuple):
        return ", ".join(printable(str(one)) for one in value)
    return f"{value:g}" if isinstance(value, float) else printable(str(value))


def digits(first: float, *others: float) -> list[str]:
    """Numbers to be read beside each other: with four places, or with four digits if the first is tiny or huge."""
    places = first == 0 or 1e-3 <= abs(first) < 1e5
    return [f"{value:.4f}" if places else f"{value:.4g}" for value in (first, *others)]


def printable(text: str) -> str:
    """The text with a sign for each character that cannot be printed, such as the escape of terminals."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def conditions_of(groups: Sequence[Group]) -> str:
    """The settings that all runs share, and their seeds, in a line."""
    apart = (*varying(groups), "norm", "batch_size")
    settings = {name: groups[0].settings[name] for name in SETTINGS if name not in apart}
    default = {field.name: field.default for field in fields(Trial) if field.name in LATER}
    shared = [f"{title_of(n)} {show(n, value)}" for n, value in settings.items() if value != default.get(n, ...)]
    many = any(len(group.records) > 1 for group in groups)
    return "; ".join([*shared, seeds_of(groups)]) + (". Mean ± sample standard deviation." if many else ".")


def seeds_of(groups: Iterable[Group]) -> str:
    """The seeds of the runs in words: `seeds 0, 1`."""
    seeds = sorted({record.settings.get("seed", 0) for group in groups for record in group.records})
    return ("seeds " if len(seeds) > 1 else "seed ") + ", ".join(map(str, seeds))


_settings = attrgetter(*SETTINGS)


def _group(settings: dict[str, Any], records: list[Record]) -> Group:
    records = sorted(records, key=lambda record: record.settings.get("seed", 0))
    finished = [record for record in records if record.status == "finished"]
    speed = Spread.of(one.seconds / one.steps for one in finished if one.seconds is not None and one.steps)
    return Group(
        settings=settings,
        records=tuple(record for record in records if record.status != "stopped"),
        value=Spread.of(record.result for record in records),
        loss=Spread.of(record.final("loss") for record in records),
        seconds_per_step=speed.mean if speed else None,
        stopped=tuple(record for record in records if record.status == "stopped"),
    )

"""What studies found, in short: in one case at one batch size, how each norm did on each seed."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .record import Record
from .summary import Group, best, is_number, show, summarize, title_of

COMMITTED = Path(__file__).with_name("evidence.json")
LEAST_SEEDS = 3  # fewer say nothing
SHOWN = ("lr", "optimizer", "schedule", "clip")  # settings that a norm may have of its own


@dataclass(frozen=True)
class Outcome:
    """How one norm did.

    Attributes:
        settings: those of its own, in words.
        by_seed: the metric that judges, by the seed in words; None where the run diverged or failed.
        tried: how many settings it is the best of, on these same seeds.
    """

    settings: str
    by_seed: dict[str, float | None]
    tried: int = 1

    @property
    def whole(self) -> bool:
        """Whether no run diverged or failed."""
        return None not in self.by_seed.values()

    @property
    def mean(self) -> float:
        """Over the seeds that finished."""
        values = [value for value in self.by_seed.values() if value is not None]
        return sum(values) / len(values)


@dataclass(frozen=True)
class Case:
    """One comparison: norms on the same data and network, at one batch size.

    Attributes:
        study: the folder with its runs.
        name: of data and network.
        task: `classification` or `segmentation`.
        pretrained: whether the network was trained before.
        batch_size: the true one.
        metric: what judges.
        lower: whether less of it is better.
        norms: by name, or by the name of what was done to them.
    """

    study: str
    name: str
    task: str
    pretrained: bool
    batch_size: int
    metric: str
    lower: bool
    norms: dict[str, Outcome]

    def difference(self, norm: str, rival: str) -> list[float]:
        """By how much a norm is better than another on each seed that both finished; less than 0 where it is worse."""
        one, other = self.norms[norm].by_seed, self.norms[rival].by_seed
        sign = -1 if self.lower else 1
        return [
            sign * (value - other[seed])  # pyright: ignore[reportOperatorIssue]
            for seed, value in one.items()
            if value is not None and other.get(seed) is not None
        ]


def make_cases(
    records: Iterable[Record], study: str, name: str | None = None, task: str = "", pretrained: bool = False
) -> list[Case]:
    """The cases of a study, one for each data set, network and batch size, with each norm at its best setting.

    Norms with fewer than three seeds are left out, and so are cases with fewer than two norms.

    Args:
        records: of the study.
        study: its folder.
        name: of data and network; as its settings have them if None.
        task: `classification` or `segmentation`.
        pretrained: whether the network was trained before.
    """
    places: dict[tuple[str, str, int], dict[str, list[Group]]] = {}
    for group in summarize(records):
        place = tuple(group.settings[setting] for setting in ("data", "model", "batch_size"))
        places.setdefault(place, {}).setdefault(group.settings["norm"], []).append(group)
    cases = []
    for (data, model, size), norms in places.items():
        outcomes = {norm: outcome for norm, own in norms.items() if (outcome := _best_outcome(own)) is not None}
        if len(outcomes) > 1:
            first = next(iter(norms.values()))[0]
            title = f"{data}, {model}" if name is None else name
            cases.append(Case(study, title, task, pretrained, size, first.metric, first.lower, outcomes))
    return cases


def read_cases(path: Path = COMMITTED) -> list[Case]:
    """The cases of a file that `write_cases` wrote; by default those of the committed studies."""
    found = []
    for one in json.loads(path.read_text(encoding="utf-8")):
        norms = {norm: Outcome(**outcome) for norm, outcome in one.pop("norms").items()}
        found.append(Case(**one, norms=norms))
    return found


def to_json(cases: Iterable[Case]) -> str:
    """The text of a file of cases, one a line."""
    return "[\n" + ",\n".join(json.dumps(asdict(case), ensure_ascii=False) for case in cases) + "\n]\n"


def _best_outcome(groups: list[Group]) -> Outcome | None:
    groups = [one for one in groups if len(one.records) >= LEAST_SEEDS]
    group = best(groups)
    if group is None:
        return None
    settings = ", ".join(f"{title_of(name)} {show(name, group.settings[name])}" for name in SHOWN)
    values = {str(seed): float(f"{value:.6g}") if is_number(value) else None for seed, value in group.by_seed.items()}
    return Outcome(settings, values, len(groups))

"""A norm for a task, with the evidence for it and what speaks against it; or that it is not known."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import check, is_whole, unknown
from .evidence import Case, make_cases, read_cases
from .statistics import fewest_seeds, interval

TASKS = ("classification", "segmentation", "detection")
FURTHEST = 2.0  # a batch size this many times as large or small still counts
ENOUGH_SEEDS = fewest_seeds(tests=1)
OWN_STUDY = "Compare norms on your own model and data, six seeds or more: normlab study run."
PRACTICE = {
    "classification": "Published practice is batch norm at large batches, and group norm at small ones (Wu and He "
    "2018, arXiv:1803.08494).",
    "segmentation": "Group or instance norm is the safe choice in published practice. nnU-Net trains with instance "
    "norm at batch 2 (Isensee et al. 2021, Nature Methods 18, 203).",
    "detection": "Group norm, or the frozen batch norm of a pretrained backbone, is the safe choice in published "
    "practice (Wu and He 2018, arXiv:1803.08494).",
}
HOW = {  # what is not `convert` to the norm of this name
    "batch": 'batch norm as it is; or normlab.convert(model, "batch")',
    "as is": "leave the norms as they are",
    "frozen": "normlab.freeze(model)",
    "frozen, γ and β learn": "normlab.freeze(model, affine=False)",
    "frozen, recalibrated": "normlab.recalibrate(model, batches), then normlab.freeze(model)",
    "group, fitted": 'normlab.convert(model, "group", batches=batches, fit=True)',
    "running_instance, fitted": 'normlab.convert(model, "running_instance", batches=batches, fit=True)',
    "running, recalibrated": 'normlab.recalibrate(model, batches), then normlab.convert(model, "running")',
}
NOT_FOLDED = "It cannot be folded into the weights for inference."
OF_RUNNING_INSTANCE = [
    NOT_FOLDED,
    "On a GPU it is made of torch's operators, and slow.",
    "On images of a microscope with other units group and instance norm are ahead of it: studies/proof.",
    "With momentum it is 0.06 behind instance norm in a detector at batch 1, and 0.02 behind group norm in a U-Net in "
    "3-D on raw images: docs/which_norm.md.",
    "In two residual nets on standardised images batch norm is ahead of it by up to 0.017: studies/collapse.",
]
ELSEWHERE = (
    "On photographs of other sites a detector with it had an average precision of 0.10 or less, one with "
    "running_instance 0.15 to 0.19: studies/proof."
)
KNOWN_OF = {
    "batch": [ELSEWHERE],
    "running": [
        ELSEWHERE,
        "Its figures are of its rule before the newest change, which costs 0.0003 to 0.0023 on MNIST: "
        "studies/flagship/NOTES.md.",
        "With AdamW it could collapse in a residual net, before its rule changed; 18 runs of 18 train since: "
        "studies/collapse/README.md.",
        "On CIFAR-10 at batch 2 a run of batch norm was ahead of it, 0.7245 to 0.7149: studies/flagship/NOTES.md.",
    ],
    **{name: OF_RUNNING_INSTANCE for name in ("running_instance", "running_instance, fitted")},
    **{name: [NOT_FOLDED] for name in ("group", "group, fitted", "instance", "layer")},
}


@dataclass(frozen=True)
class Evidence:
    """The norm beside a rival in one comparison.

    Attributes:
        study: the folder with the runs.
        case: data and network.
        batch_size: the true one.
        metric: what was compared.
        rival: the other norm.
        difference: the mean over the seeds that both finished, above 0 where the norm is better; None without seeds.
        interval: of 95 %, of the differences by seed, see `statistics.interval`; None for fewer than two.
        seeds: how many both finished.
        failed: runs of the rival that diverged or failed.
    """

    study: str
    case: str
    batch_size: int
    metric: str
    rival: str
    difference: float | None
    interval: tuple[float, float] | None
    seeds: int
    failed: int

    @property
    def level(self) -> bool:
        """Whether no run of the rival failed, and the interval has 0 in it."""
        if self.failed:
            return False
        return self.interval is None or self.interval[0] <= 0 <= self.interval[1]

    def __str__(self) -> str:
        said = []
        if self.difference is not None and self.interval is not None:
            low, high = self.interval
            said.append(f"{self.difference:+.4f} ({low:+.4f} to {high:+.4f}), {self.seeds} seeds")
        if self.failed:
            said.append(f"{self.failed} of its runs failed")
        return f"{self.rival}: " + "; ".join(said)


@dataclass(frozen=True)
class Advice:
    """What `advise` found; as a text it is what `normlab advise` prints.

    Attributes:
        asked: the question in words.
        norm: its name, or that of what to do to the norms; None if it is not known.
        how: the code that does it.
        why: plain sentences.
        evidence: the norm beside its rivals.
        caveats: plain sentences.
    """

    asked: str
    norm: str | None
    how: str | None
    why: list[str]
    evidence: list[Evidence] = field(default_factory=list)
    caveats: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.asked}: {self.norm or 'I do not know.'}"]
        parts += [_listed("How", [self.how])] if self.how else []
        parts.append(_listed("Why", self.why))
        if self.evidence:
            places = dict.fromkeys((one.study, one.case, one.batch_size) for one in self.evidence)
            lines = [f"Evidence: {self.evidence[0].metric} of {self.norm}, less that of the rival, with 95 % intervals"]
            for place in places:
                lines.append("- {}, {}, batch {}".format(*place))
                own = [one for one in self.evidence if (one.study, one.case, one.batch_size) == place]
                lines += [f"    against {one}" for one in own]
            parts.append("\n".join(lines))
        parts += [_listed("Caveats", self.caveats)] if self.caveats else []
        return "\n\n".join(parts)


def advise(
    task: str = "classification", batch_size: int = 2, *, pretrained: bool = False, study: str | Path | None = None
) -> Advice:
    """The norm whose worst shortfall, over the comparisons at about this batch size, is the least.

    Its shortfall in a comparison is how far its mean lies behind the best. Only norms without a failed run count.
    Where batch norm is level with that norm, the answer is batch norm, which needs no change. Level means that in every
    comparison the interval of the difference has 0 in it.

    Args:
        task: `classification`, `segmentation` or `detection`.
        batch_size: images that a norm sees at a time.
        pretrained: whether the network was trained before, with batch norm at a large batch.
        study: folder of a study of your own, which then is the only evidence; by default the committed studies.

    Raises:
        InputError: an unknown task, a batch size below 1, or a folder without runs.

    Example:
        >>> advise("detection", batch_size=2, pretrained=True).norm is None
        True
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    check(is_whole(batch_size, 1), "batch_size", batch_size, "a whole number from 1")
    if study is None:
        asked = f"{task} at batch {batch_size}" + (", pretrained" if pretrained else "")
        cases = [case for case in read_cases() if (case.task, case.pretrained) == (task, pretrained)]
    else:
        asked = f"{study} at batch {batch_size}"
        cases = _own_cases(Path(study))
    near = _nearest(cases, batch_size)
    norm = _least_shortfall(near)
    if norm is None:
        return _not_known(asked, task, cases, batch_size, own=study is not None)
    default = "as is" if any("as is" in case.norms for case in near) else "batch"
    chosen = default if _is_level(near, norm, default) else norm
    evidence = [one for case in near for one in _evidence(case, chosen, default)]
    return Advice(
        asked,
        chosen,
        HOW.get(chosen, f'normlab.convert(model, "{chosen}")'),
        _why(near, chosen, norm),
        evidence,
        _caveats(near, chosen, default, batch_size, own=study is not None),
    )


def _listed(title: str, lines: Sequence[str]) -> str:
    return "\n".join([title, *(f"- {line}" for line in lines)])


def _own_cases(folder: Path) -> list[Case]:
    from .store import RunStore

    records = RunStore(folder / "runs.jsonl").read()
    check(bool(records), "study", str(folder), "the folder of a study with runs")
    return make_cases(records, str(folder))


def _nearest(cases: Sequence[Case], batch_size: int) -> list[Case]:
    """Of each study's data and network the case with the nearest batch size, the smaller of two; none further away."""
    found: dict[tuple[str, str], Case] = {}
    for case in sorted(cases, key=lambda one: (_distance(one, batch_size), one.batch_size)):
        if _distance(case, batch_size) <= FURTHEST:
            found.setdefault((case.study, case.name), case)
    return list(found.values())


def _distance(case: Case, batch_size: int) -> float:
    return max(case.batch_size / batch_size, batch_size / case.batch_size)


def _shortfall(case: Case, norm: str) -> float:
    """How far the norm's mean lies behind the best of those that did not fail; 0 for the best."""
    sign = -1 if case.lower else 1
    return max(sign * one.mean for one in case.norms.values() if one.whole) - sign * case.norms[norm].mean


def _least_shortfall(cases: Sequence[Case]) -> str | None:
    shared = [norm for norm in cases[0].norms if _in_all(cases, norm)] if cases else []
    return min(shared, key=lambda norm: max(_shortfall(case, norm) for case in cases), default=None)


def _in_all(cases: Sequence[Case], norm: str) -> bool:
    return all(norm in case.norms and case.norms[norm].whole for case in cases)


def _is_level(cases: Sequence[Case], norm: str, other: str) -> bool:
    return _in_all(cases, other) and all(_compare(case, norm, other).level for case in cases)


def _compare(case: Case, norm: str, rival: str) -> Evidence:
    differences = case.difference(norm, rival)
    failed = sum(value is None for value in case.norms[rival].by_seed.values())
    mean = sum(differences) / len(differences) if differences else None
    place = case.study, case.name, case.batch_size, case.metric
    return Evidence(*place, rival, mean, interval(differences), len(differences), failed)


def _evidence(case: Case, norm: str, default: str) -> list[Evidence]:
    """Beside the best other norm, the default, group norm and this package's own."""
    others = [one for one in case.norms if one != norm]
    best = min((one for one in others if case.norms[one].whole), key=lambda one: _shortfall(case, one), default=None)
    rivals = dict.fromkeys(one for one in (best, default, "group", "running") if one in others)
    return [_compare(case, norm, rival) for rival in rivals]


def _why(cases: Sequence[Case], chosen: str, least: str) -> list[str]:
    worst = max(cases, key=lambda case: _shortfall(case, least))
    fall = _shortfall(worst, least)
    many = {1: "the comparison", 2: "both comparisons"}.get(len(cases), f"all {len(cases)} comparisons")
    if fall <= 0:
        said = [f"'{least}' has the best mean in {many}."]
    else:
        behind = f"at most {fall:.4f} {worst.metric} behind the best ({worst.name})"
        said = [f"'{least}' falls short least in {many}: {behind}."]
    if chosen != least:
        said.append(f"'{chosen}' is level with it, and needs no change of the model.")
    shared = [norm for norm in cases[0].norms if norm != chosen and _in_all(cases, norm)]
    level = [norm for norm in shared if _is_level(cases, chosen, norm)]
    among = "Of the norms with runs in all of them" if len(cases) > 1 else "Of the others"
    return [*said, f"{among}, level with '{chosen}' (the interval has 0 in it): {'; '.join(level) or 'none'}."]


def _caveats(cases: Sequence[Case], chosen: str, default: str, batch_size: int, own: bool) -> list[str]:
    said = (
        [] if own else [f"The nets are small, and the data few: {'; '.join(case.name for case in cases)}. {OWN_STUDY}"]
    )
    said += [
        f"{case.name} was measured at batch {case.batch_size}, not {batch_size}."
        for case in cases
        if case.batch_size != batch_size
    ]
    missing = [case.name for case in cases if default not in case.norms]
    if missing:
        said.append(f"No runs of {default} are kept for: {'; '.join(missing)}.")
    fewest = min(len(outcome.by_seed) for case in cases for outcome in case.norms.values())
    if fewest < ENOUGH_SEEDS:
        said.append(f"Some norms have {fewest} seeds. Fewer than {ENOUGH_SEEDS} tell only large differences apart.")
    if any(outcome.tried > 1 for case in cases for outcome in case.norms.values()):
        said.append("Each norm has its best of several settings, chosen on the same seeds: a little too good.")
    said.append("Intervals are of one pair at a time. A report's tests, corrected for all pairs, are stricter.")
    return [*said, *KNOWN_OF.get(chosen, [])]


def _not_known(asked: str, task: str, cases: Sequence[Case], batch_size: int, own: bool) -> Advice:
    if not cases:
        why = "No two norms have three seeds at one batch size." if own else "No committed study has this."
    elif not _nearest(cases, batch_size):
        sizes = sorted({case.batch_size for case in cases})
        why = f"The batch sizes measured are {', '.join(map(str, sizes))}. None is within a factor of {FURTHEST:g}."
    else:
        why = "No norm has runs in all comparisons without a failure."
    return Advice(asked, None, None, [why, *([] if own else [PRACTICE[task]]), OWN_STUDY])

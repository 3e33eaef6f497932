"""Writes the tables of docs/which_norm.md from the stored runs: `python studies/which_norm.py`.

Each norm has its best setting. Where a first seed chose the setting, that seed does not judge.
"""

from collections.abc import Sequence
from pathlib import Path

from evidence import HELD_OUT, all_cases

from normlab.files import write_whole
from normlab.study.evidence import Case, Outcome
from normlab.study.statistics import interval, paired_test

PAGE = Path(__file__).parents[1] / "docs" / "which_norm.md"
NEW = ("batch", "group", "instance", "running", "running_instance")
TRAINED = (
    "as is", "frozen", "frozen, recalibrated", "group", "group, fitted", "instance",
    "running", "running_instance", "running_instance, fitted",
)  # fmt: skip
FINE_TUNING, COUNTS = "fine-tuning", "how often first"
SMALL, TOLD_APART, SEEDS = 4, 0.05, 6


def table(cases: Sequence[Case], norms: Sequence[str], among: Sequence[Case]) -> str:
    """A line a case; its last cell is batch norm at the batch size where it is best."""
    head = ["task", "batch", *(f"`{norm}`" for norm in norms), "`batch` at its best batch"]
    rows = [head, ["---"] * len(head)]
    for case in cases:
        outcomes = named(case)
        known = {norm: outcomes[norm] for norm in norms if norm in outcomes}
        cells = [cell(known[norm], known) if norm in known else "" for norm in norms]
        rows.append([f"[{case.name}](../{case.study})", str(case.batch_size), *cells, at_best(case, among)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def named(case: Case) -> dict[str, Outcome]:
    """Its outcomes; batch norm in a trained network is that network as it is."""
    return {"as is" if case.pretrained and norm == "batch" else norm: one for norm, one in case.norms.items()}


def cell(own: Outcome, all_of: dict[str, Outcome]) -> str:
    """Mean and 95 % interval, bold where no other is told apart as better."""
    if not own.whole:
        lost = list(own.by_seed.values()).count(None)
        return f"{lost} of {len(own.by_seed)} failed"
    values = [value for value in own.by_seed.values() if value is not None]
    low, high = interval(values) or (own.mean, own.mean)
    text = f"{own.mean:.3f} ({low:.3f} to {high:.3f})"
    return f"**{text}**" if is_first(own, all_of) else text


def is_first(own: Outcome, all_of: dict[str, Outcome]) -> bool:
    """Whether its mean is the best, or six seeds do not tell it apart from the best."""
    best = max((one for one in all_of.values() if one.whole), key=lambda one: one.mean)
    if own is best:
        return True
    first, second = ({int(seed): value for seed, value in one.by_seed.items()} for one in (best, own))
    p = paired_test(first, second, worst=0.0) if len(own.by_seed) >= SEEDS else None
    return p is not None and p > TOLD_APART


def counts(cases: Sequence[Case]) -> str:
    """For each norm, in how many lines it is bold, and how far it is behind the best mean at most; then held out."""
    held_out = [case for case in cases if case.name in HELD_OUT]
    head = ["norm", "first, or not told apart", "behind the best, at most", "held out: first", "held out: behind"]
    rows = [head, ["---"] * len(head)]
    rows += [[f"`{norm}`", *how_often(norm, cases), *how_often(norm, held_out)] for norm in NEW]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def how_often(norm: str, cases: Sequence[Case]) -> tuple[str, str]:
    """In how many lines a norm is bold, and how far it is behind the best mean at most."""
    there = [case for case in cases if norm in case.norms]
    first, behind = 0, 0.0
    for case in there:
        known = {name: case.norms[name] for name in NEW if name in case.norms}
        first += case.norms[norm].whole and is_first(case.norms[norm], known)
        behind = max(behind, max(one.mean for one in known.values()) - case.norms[norm].mean)
    return f"{first} of {len(there)}", f"{behind:.3f}"


def at_best(case: Case, among: Sequence[Case]) -> str:
    found = [
        (one.norms[name].mean, one.batch_size)
        for one in among
        if (one.study, one.name) == (case.study, case.name)
        for name in ("batch", "as is")
        if name in one.norms and one.norms[name].whole
    ]
    return "{:.3f} at {}".format(*max(found)) if found else ""


def tables() -> dict[str, str]:
    """The table of each kind of task."""
    cases = all_cases()
    small = [case for case in cases if case.batch_size <= SMALL]
    found = {}
    for kind, norms in (("classification", NEW), ("segmentation", NEW), ("detection", NEW), (FINE_TUNING, TRAINED)):
        own = [case for case in small if kind == (FINE_TUNING if case.pretrained else case.task)]
        there = [norm for norm in norms if any(norm in named(case) for case in own)]
        found[kind] = table(own, there, cases)
    six = [one for one in small if not one.pretrained and len(next(iter(one.norms.values())).by_seed) >= SEEDS]
    found[COUNTS] = counts([one for one in six if {"batch", "running", "running_instance"} <= set(one.norms)])
    return found


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for kind, lines in tables().items():
        begin, end = f"<!-- {kind}, made by studies/which_norm.py -->\n", f"<!-- up to here: {kind} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{lines}\n{end}{rest.partition(end)[2]}"
    write_whole(PAGE, text.encode())


if __name__ == "__main__":
    main()

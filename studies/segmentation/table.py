"""Writes the table of README.md from the stored runs.

Run as `python studies/segmentation/table.py`.
"""

from pathlib import Path

from normlab.files import write_whole
from normlab.study.evidence import Case, make_cases
from normlab.study.store import RunStore
from normlab.study.summary import Spread

FOLDER = Path(__file__).parent
CASES = {
    "standardised": "standardised",
    "raw": "raw",
    "few_raw": "fine-tuned, raw",
    "volumes-standardised-adamw": "volumes, standardised, AdamW",
    "volumes-raw-adamw": "volumes, raw, AdamW",
    "volumes-standardised-nesterov": "volumes, standardised, Nesterov",
    "volumes-raw-nesterov": "volumes, raw, Nesterov",
}
START, END = "<!-- from here on made by table.py -->\n", "<!-- up to here -->\n"


def row(name: str, case: Case) -> list[str]:
    """The lines of a case: for each norm the mean and deviation of its Dice, and how far it is from the best one."""
    best = max(case.norms, key=lambda norm: case.norms[norm].mean)
    lines = []
    for norm, outcome in case.norms.items():
        less = Spread.of(case.difference(norm, best))
        behind = "–" if norm == best else str(less)
        rate = outcome.settings.partition(",")[0].removeprefix("learning rate ")
        dice = Spread.of(outcome.by_seed.values())
        lines.append(f"| {name} | {case.batch_size} | `{norm}` | {rate} | {dice} | {behind} |")
    return lines


def main() -> None:
    lines = ["| images | batch | norm | rate | Dice | less the best, by seed |", "|---|---|---|---|---|---|"]
    for file, name in CASES.items():
        for case in make_cases(RunStore(FOLDER / f"confirm-{file}" / "runs.jsonl").read(), ""):
            lines += row(name, case)
    page = FOLDER / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    write_whole(page, (before + START + "\n" + "\n".join(lines) + "\n\n" + END + after).encode())


if __name__ == "__main__":
    main()

"""Cut the records of studies to what their tables and pictures read.

    python studies/trim.py

A run's record carries a training curve of 100 points. A picture draws the curves of each norm's best setting. Its
axis reaches to the lowest and the highest loss of all curves. This script takes the other curves away, activations,
and fields that are null. Numbers keep nine digits, more than float32 has.

The screening has 2,900 runs, which only choose settings. Their numbers keep six digits. They lose versions, machine,
date and count of parameters too; `studies/README.md` has the first three. A file that was cut before has its fields in
another order at most.
"""

import json
from pathlib import Path
from typing import Any

from normlab.files import write_whole
from normlab.study.record import Record
from normlab.study.store import RunStore
from normlab.study.summary import best, is_number, summarize

FOLDER = Path(__file__).parent
DRAWN = [FOLDER / "compare" / "runs.jsonl", *sorted(FOLDER.glob("flagship/confirm-*/runs.jsonl"))]
SCREENED = sorted(FOLDER.glob("flagship/screen-*/runs.jsonl"))
STUDIES = ("collapse", "flagship", "finetune", "proof", "reproduce", "segmentation")
OTHERS = [path for study in STUDIES for path in FOLDER.glob(f"{study}/**/runs.jsonl")]
WITHOUT_CURVES = sorted(set(OTHERS) - {*DRAWN, *SCREENED})
SAID_ONCE = ("versions", "machine", "finished_at", "parameters")


def drawn(records: list[Record]) -> set[str]:
    """The keys of the runs whose curves the picture reads."""
    groups = summarize(records)
    cases = {(group.settings["norm"], group.settings["batch_size"]) for group in groups}
    leaders = [best(g for g in groups if (g.settings["norm"], g.settings["batch_size"]) == case) for case in cases]
    losses = [(loss, record.key) for record in records for _, loss in record.losses if is_number(loss)]
    ends = {key for _, key in (min(losses), max(losses))} if losses else set()
    return ends | {record.key for leader in leaders if leader for record in leader.records}


def cut(record: Record, *names: str, digits: int = 9) -> dict[str, Any]:
    """The line of the record without these fields, and without those that are null."""
    return {n: rounded(value, digits) for n, value in record.to_json().items() if n not in names and value is not None}


def rounded(value: Any, digits: int) -> Any:
    """`value` with this many significant digits in every float."""
    if isinstance(value, dict):
        return {name: rounded(item, digits) for name, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode())


def main() -> None:
    for path in DRAWN:
        records = RunStore(path).read()
        keys = drawn(records)
        write(path, [cut(r, *([] if r.key in keys else ["curve"])) for r in records])
    for path in SCREENED:
        write(path, [cut(r, "curve", *SAID_ONCE, digits=6) for r in RunStore(path).read()])
    for path in WITHOUT_CURVES:
        write(path, [cut(r, "curve", "activations") for r in RunStore(path).read()])


if __name__ == "__main__":
    main()

"""The tables of README.md, from the runs here: `python studies/finetune/tables.py` puts them between its two marks."""

from pathlib import Path

from normlab.files import write_whole
from normlab.study.store import RunStore
from normlab.study.summary import Group, Spread, best, summarize, values_of

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- from here on made by `tables.py` -->", "<!-- up to here -->"


def tables() -> str:
    parts, rates = [], []
    for case in ("camera", "classes"):
        stores = [RunStore(FOLDER / f"{part}-{case}" / "runs.jsonl") for part in ("screen", "confirm")]
        screened, tested = (summarize(store.read()) for store in stores)
        for size in values_of(tested, "batch_size"):
            parts.append(f"### `{case}`, batch {size}\n\n{at_best_rates(of(screened, size), of(tested, size))}")
            rates += [f"`{case}`, batch {size}, screening\n\n{by_rate(of(screened, size))}"]
            rates += [f"`{case}`, batch {size}, test\n\n{by_rate(of(tested, size))}"]
    head = "<details><summary>Every rate: validation accuracy in screening, test accuracy</summary>\n"
    return "\n".join([*parts, head, *rates, "</details>\n"])


def of(found: list[Group], size: int) -> list[Group]:
    return [group for group in found if group.settings["batch_size"] == size]


def at_best_rates(screened: list[Group], tested: list[Group]) -> str:
    """Accuracy of each way at the rate that screening chose, and its distance from running batch norm, seed by seed."""
    ways = values_of(screened, "norm")
    leaders = [best(group for group in screened if group.settings["norm"] == way) for way in ways]
    settings = [leader.settings for leader in leaders if leader]
    chosen = {group.settings["norm"]: group for group in tested if group.settings in settings}
    rows = []
    for way, group in chosen.items():
        before = Spread.of(record.more.get("before") for record in group.records)
        trained = Spread.of(record.epochs[-1]["train"]["accuracy"] for record in group.records if record.epochs)
        pairs = [(chosen["running"].by_seed[seed], own) for seed, own in group.by_seed.items() if way != "running"]
        apart = Spread.of(running - own for running, own in pairs if running is not None and own is not None)
        rows.append([way, f"{group.settings['lr']:g}", before or "–", trained or "–", group.outcome, apart or "–"])
    return table(["", "rate", "before", "training accuracy", "test accuracy", "`running` minus it"], rows)


def by_rate(found: list[Group]) -> str:
    rates, ways = values_of(found, "lr"), values_of(found, "norm")
    cells = {(group.settings["norm"], group.settings["lr"]): group.outcome for group in found}
    return table(["", *(f"{rate:g}" for rate in rates)], [[w, *(cells.get((w, r), "") for r in rates)] for w in ways])


def table(head: list[str], rows: list[list]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


if __name__ == "__main__":
    before, _, rest = (FOLDER / "README.md").read_text().partition(BEGIN)
    text = f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.partition(END)[2]}"
    write_whole(FOLDER / "README.md", text.encode())

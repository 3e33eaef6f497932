"""The tables of tables.md and the pictures beside it, from the runs here: `python studies/flagship/tables.py`."""

from collections.abc import Callable
from pathlib import Path

from normlab.files import write_whole
from normlab.study.picture import write_png
from normlab.study.record import Record
from normlab.study.store import RunStore
from normlab.study.summary import Group, best, summarize, values_of

FOLDER = Path(__file__).parent
SCREENED = {"cifar10": ["screen-cifar10"], "mnist": ["screen-mnist-to-8", "screen-mnist-from-32"]}
CONFIRMED = ["confirm-cifar10", "confirm-fashion_mnist", "confirm-mnist"]
TWICE_CHANCE = 0.2  # of ten classes
HEAD = f"""# Every norm at its best setting

Made by `python studies/flagship/tables.py`. A run trains if it gets half of the images right. At chance is what gets
less than {TWICE_CHANCE:.0%} right.
"""


def tables() -> str:
    parts = [HEAD]
    for data, folders in SCREENED.items():
        groups = summarize(runs(*folders))
        parts.append(best_settings(f"screen-{data}", groups))
        if data == "mnist":  # where few images take norms to half
            parts += ["Share of the settings that train; in brackets without clipping.\n", table(groups, _share)]
    return "\n".join([*parts, *(best_settings(folder, summarize(runs(folder))) for folder in CONFIRMED)])


def runs(*folders: str) -> list[Record]:
    return [run for folder in folders for run in RunStore(FOLDER / folder / "runs.jsonl").read()]


def best_settings(title: str, groups: list[Group]) -> str:
    what = "Best setting: accuracy, and what it is (lr, schedule, clipping)."
    return f"## {title}\n\n{what}\n\n{table(groups, _best)}"


def table(groups: list[Group], cell: Callable[[list[Group]], str]) -> str:
    """Norms down, batch sizes across."""
    sizes = values_of(groups, "batch_size")
    lines = ["| norm | " + " | ".join(f"batch {size}" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for norm in values_of(groups, "norm"):
        found = [[g for g in groups if (g.settings["norm"], g.settings["batch_size"]) == (norm, s)] for s in sizes]
        lines.append(f"| `{norm}` | " + " | ".join(cell(part) if part else "–" for part in found) + " |")
    return "\n".join(lines) + "\n"


def _best(groups: list[Group]) -> str:
    leader = best(groups)
    if leader is None or leader.score < TWICE_CHANCE:
        return "at chance"
    clip = ", clip 1" if leader.settings["clip"] else ""
    return f"{leader.value} ({leader.settings['lr']:g}, {leader.settings['schedule']}{clip})"


def _share(groups: list[Group]) -> str:
    free = [group for group in groups if not group.settings["clip"]]
    return f"{sum(g.trains for g in groups)}/{len(groups)} ({sum(g.trains for g in free)}/{len(free)})"


if __name__ == "__main__":
    write_whole(FOLDER / "tables.md", tables().encode())
    for name in CONFIRMED:
        write_png(runs(name), FOLDER / f"{name}.png", apart=False)

"""Running batch norm beside every other norm, with the same settings for each, by plain SGD.

    python studies/flagship/study.py screen  [--batch-sizes 2 1 …] [--norms …]   # all settings, few images, one seed
    python studies/flagship/study.py confirm [--data fashion_mnist] …            # the best two, all images, more seeds
    python studies/flagship/study.py bars                                        # running and group at high rates
    python studies/flagship/study.py table                                       # tables and pictures of what there is

The lesson's net learns MNIST or Fashion-MNIST in one epoch. A residual net learns CIFAR-10 in three. A setting is a
learning rate, a schedule, and whether the norm of the gradient is clipped at 1. `screen` tries every setting; for
Fashion-MNIST it does so on MNIST. `confirm` takes the two best settings of each norm and batch size. Each run is kept
as it ends, in `screen-DATA.jsonl` or `confirm-DATA.jsonl`. A command started again makes the runs that are missing.
"""

import argparse
import itertools
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console

from normlab.files import write_whole
from normlab.nn import NORMS
from normlab.study.compare import make_job
from normlab.study.executors import run_jobs
from normlab.study.picture import write_png
from normlab.study.plan import Trial
from normlab.study.store import RunStore
from normlab.study.summary import Group, best, summarize

FOLDER = Path(__file__).parent
FINE_TUNED = FOLDER / "finetune.jsonl"
BATCH_SIZES = (2, 1, 4, 8, 32, 128, 512)
LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
SCHEDULES = ("constant", "one-cycle")
CLIPS = (None, 1.0)
TWICE_CHANCE = 0.2  # of ten classes; settings below this in the screening are not confirmed
# Images in the screening: at a batch size up to 8, and above. On CIFAR-10, 5,000 chose rates too high for a whole run.
FEW_IMAGES = {"mnist": (5_000, None), "cifar10": (20_000, 20_000)}
NORMS_STUDIED = [name for name in NORMS if name != "sync"]  # in one process sync is batch norm
MOST_SEEDS = ("running", "group")
SCREENED_ON = {"mnist": "mnist", "fashion_mnist": "mnist", "cifar10": "cifar10"}
TASKS = {"mnist": {}, "fashion_mnist": {}, "cifar10": {"model": "resnet", "epochs": 3}}


def screening(norms: Iterable[str], batch_sizes: Iterable[int], data: str, schedules: Iterable[str]) -> list[Trial]:
    """Every setting of these norms at these batch sizes."""
    task = {"data": data, **TASKS[data], "epochs": 1}
    images = {size: FEW_IMAGES[data][size > 8] for size in batch_sizes}
    return [
        Trial(norm, size, lr, 0, schedule=schedule, clip=clip, images=images[size], **task)
        for size, norm, lr, schedule, clip in itertools.product(batch_sizes, norms, LRS, schedules, CLIPS)
    ]


def confirmation(
    groups: list[Group], norms: Iterable[str], batch_sizes: Iterable[int], data: str, most: int, settings: int
) -> list[Trial]:
    """The best screened `settings` of each norm and batch size, on all images, with `most` seeds or three."""
    trials = []
    for norm, size in itertools.product(norms, batch_sizes):
        screened = [g for g in groups if (g.settings["norm"], g.settings["batch_size"]) == (norm, size)]
        for group in sorted((g for g in screened if g.score > TWICE_CHANCE), key=lambda g: -g.score)[:settings]:
            chosen = {name: group.settings[name] for name in ("lr", "schedule", "clip")}
            seeds = range(most if norm in MOST_SEEDS else min(most, 3))
            trials += [Trial(norm, size, seed=seed, data=data, **TASKS[data], **chosen) for seed in seeds]
    return trials


def high_rates() -> list[Trial]:
    """Batch 2, all images, constant rates at which other norms diverge; a rate of 1 with clipping too."""
    settings = [(0.4, None), (1.0, None), (1.0, 1.0)]
    return [
        Trial(norm, 2, lr, seed, schedule="constant", clip=clip)
        for (lr, clip), seed, norm in itertools.product(settings, range(3), ("running", "group"))
    ]


def run(trials: list[Trial], store: RunStore, data_dir: str | None, workers: int) -> None:
    """Run the trials that the store does not hold yet."""
    kept = {record.key for record in store.read() if record.status != "failed"}
    run_jobs([make_job(trial, data_dir) for trial in trials if trial.key not in kept], store, workers, Console())


def tables() -> str:
    """Tables of each store: best accuracy and share of settings that train. Writes its picture too."""
    made_by = "Made by `python studies/flagship/study.py table`. A run trains if it gets half of the images right."
    parts = [f"# Results so far\n\n{made_by}\n"]
    for path in (*sorted(FOLDER.glob("screen-*.jsonl")), *sorted(FOLDER.glob("confirm-*.jsonl")), FINE_TUNED):
        records = RunStore(path).read()
        if records:
            groups = summarize(records)
            parts.append(f"## {path.stem}\n\nBest setting: accuracy, and what it is (lr, schedule, clipping).\n")
            parts.append(_table(groups, _best_cell))
            if not path.stem.startswith("screen"):
                write_png(records, path.with_suffix(".png"), apart=False)
            elif path.stem != "screen-cifar10":  # where few images do not take any norm to half
                parts.append("Share of the settings that train; in brackets without clipping.\n")
                parts.append(_table(groups, _share_cell))
    return "\n".join(parts)


def _table(groups: list[Group], cell) -> str:
    sizes = sorted({group.settings["batch_size"] for group in groups})
    lines = ["| norm | " + " | ".join(f"batch {size}" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for norm in sorted({group.settings["norm"] for group in groups}):
        found = [[g for g in groups if (g.settings["norm"], g.settings["batch_size"]) == (norm, s)] for s in sizes]
        lines.append(f"| `{norm}` | " + " | ".join(cell(part) if part else "–" for part in found) + " |")
    return "\n".join(lines) + "\n"


def _best_cell(groups: list[Group]) -> str:
    leader = best(groups)
    if leader is None or leader.score < TWICE_CHANCE:
        return "at chance"
    setting = leader.settings
    clip = ", clip 1" if setting["clip"] else ""
    return f"{leader.value} ({setting['lr']:g}, {setting['schedule']}{clip})"


def _share_cell(groups: list[Group]) -> str:
    free = [group for group in groups if not group.settings["clip"]]
    share = f"{sum(group.trains for group in groups)}/{len(groups)}"
    return f"{share} ({sum(group.trains for group in free)}/{len(free)})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["screen", "confirm", "bars", "table"], help="what to do, see above")
    parser.add_argument("--norms", nargs="+", default=NORMS_STUDIED, choices=list(NORMS), help="norms to run")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES, help="images a step")
    parser.add_argument("--data", default="mnist", choices=list(TASKS), help="data set")
    parser.add_argument(
        "--schedules", nargs="+", default=SCHEDULES, choices=SCHEDULES, help="schedules that screen tries"
    )
    parser.add_argument("--settings", type=int, default=2, help="how many of the best settings confirm takes")
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds of confirm: for running and group; other norms have at most 3"
    )
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    a = parser.parse_args()
    screened = RunStore(FOLDER / f"screen-{SCREENED_ON[a.data]}.jsonl")
    if a.part == "screen":
        run(screening(a.norms, a.batch_sizes, SCREENED_ON[a.data], a.schedules), screened, a.data_dir, a.workers)
    elif a.part == "confirm":
        trials = confirmation(summarize(screened.read()), a.norms, a.batch_sizes, a.data, a.seeds, a.settings)
        run(trials, RunStore(FOLDER / f"confirm-{a.data}.jsonl"), a.data_dir, a.workers)
    elif a.part == "bars":
        run(high_rates(), RunStore(FOLDER / "bars.jsonl"), a.data_dir, a.workers)
    write_whole(FOLDER / "tables.md", tables().encode())


if __name__ == "__main__":
    main()

"""What the measurements of the layers say, as a table and a picture.

    python benchmarks/report.py [--results benchmarks/results]

Reads `norms.jsonl` and, of a GPU, `norms_gpu.jsonl`, the last measurement of each shape, layout, layer, type, number of
threads and way (compiled, recorded or neither), and writes `norms.md` and `norms.png` beside them.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from normlab.kernels import policy

MEGABYTE = 2**20
SIZES = {"above 32 MB": (32, math.inf), ".4 to 32 MB": (0.4, 32), "below .4 MB": (0, 0.4)}
LAYERS = ("batch", "batch, ReLU", "running", "running, bounded", "group", "lesson's rule", "JAX batch")
WAYS_ON_GPU = {
    "eager": (False, False, "float32"),
    "compiled": (True, False, "float32"),
    "recorded": (False, True, "float32"),
    "recorded, bfloat16": (False, True, "bfloat16"),
}
DRAWN = ("batch", "batch, ReLU", "running", "group")


def latest(path: Path) -> list[dict[str, Any]]:
    """The last record of each case that has a speed."""
    found: dict[tuple, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        record.setdefault("compiled", False)
        of_way = record["compiled"], record.get("recorded"), record.get("dtype")
        settings = *record["shape"], record["layout"], record["layer"], record["machine"]["threads"], *of_way
        found[settings] = record
    return [record for record in found.values() if "speed" in record]


def megabytes(record: dict[str, Any]) -> float:
    """Of the input, in float32."""
    return 4 * math.prod(record["shape"]) / MEGABYTE


def figures(records: list[dict[str, Any]]) -> str:
    """Geometric mean, and the worst in brackets."""
    speeds = [record["speed"] for record in records]
    if not speeds:
        return "–"
    return f"{math.exp(statistics.fmean(map(math.log, speeds))):.2f} ({min(speeds):.2f})"


def table(records: list[dict[str, Any]]) -> str:
    """Speeds by layer, size of the tensor and number of threads."""
    threads = sorted({record["machine"]["threads"] for record in records})
    columns = [(size, count) for size in (*SIZES, "all") for count in threads]
    lines = [
        "| layer | " + " | ".join(f"{size}, {count} thread{'s' * (count > 1)}" for size, count in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for layer in LAYERS:
        cells = []
        for size, count in columns:
            low, high = SIZES.get(size, (0, math.inf))
            of_layer = [r for r in records if r["layer"] == layer and r["machine"]["threads"] == count]
            cells.append(figures([r for r in of_layer if low <= megabytes(r) < high]))
        if set(cells) != {"–"}:
            lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table_of_gpu(records: list[dict[str, Any]]) -> str:
    """Speeds by layer, way and layout."""
    columns = [(way, last) for way in WAYS_ON_GPU for last in (False, True)]
    lines = [
        "| layer | " + " | ".join(f"{way}, channels {'last' if last else 'first'}" for way, last in columns) + " |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for layer in LAYERS:
        of_layer = [r for r in records if r["layer"] == layer]
        if of_layer:
            of_ways = {
                way: [r for r in of_layer if (r["compiled"], r["recorded"], r["dtype"]) == settings]
                for way, settings in WAYS_ON_GPU.items()
            }
            cells = [figures([r for r in of_ways[w] if ("last" in r["layout"]) == last]) for w, last in columns]
            lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def origin(records: list[dict[str, Any]]) -> str:
    """Machine, kernels, versions and day of the last one."""
    last = max(records, key=lambda record: record["finished_at"])
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    on = last["machine"]["cpu"]
    if "gpu" in last:
        on = f"{last['gpu']}, driver {last['driver']}, CUDA {last['cuda']}, triton {last['triton']}; {on}"
    return f"{on}; {last['kernels']}; {versions}; {last['finished_at'][:10]}"


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """A point for each case: its speed over the size of its tensor."""
    ways = sorted({record["compiled"] for record in records})
    figure, axes = plt.subplots(1, len(ways), figsize=(6.5 * len(ways), 4.6), sharey=True, squeeze=False)
    for ax, compiled in zip(axes[0], ways, strict=True):
        for layer in DRAWN:
            mine = [r for r in records if r["layer"] == layer and r["compiled"] == compiled]
            one = [r for r in mine if r["machine"]["threads"] == 1]
            ax.plot([megabytes(r) for r in one], [r["speed"] for r in one], "o", ms=4, alpha=0.7, label=layer)
        ax.axhline(1, color="gray", lw=1)
        ax.set(xscale="log", yscale="log", xlabel="size of the tensor, MB")
        ax.set_title("all compiled" if compiled else "eager")
        ax.grid(True, which="major", alpha=0.3)
        ax.set_yticks([0.5, 1, 2, 5, 10], ["½", "1", "2", "5", "10"])
        ax.minorticks_off()
    axes[0][0].set_ylabel("times as fast as torch's layer")
    axes[0][0].legend(frameon=False)
    figure.suptitle("Forward and backward pass, one thread")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    a = parser.parse_args()
    records = latest(a.results / "norms.jsonl")
    parts = [
        "# How fast the layers are\n",
        "Made by `python benchmarks/report.py` from `norms.jsonl`. Times as fast as torch's layer of the same kind",
        "(`running`, the lesson's rule and JAX against batch norm), forward and backward: geometric mean over shapes",
        "and layouts, and the worst.\n",
    ]
    for compiled, title in ((False, "Eager"), (True, "All compiled")):
        of_way = [record for record in records if record["compiled"] == compiled]
        if of_way:
            parts += [f"## {title}\n", f"{origin(of_way)}.\n", table(of_way), ""]
    norms = [r for r in records if r["layer"] in ("batch", "running") and not r["compiled"]]
    floors = [r["over_floor"] for r in norms if megabytes(r) >= 32]
    if floors:
        parts.append(
            f"Above 32 MB `batch` and `running` take {max(floors):.2f} times four copies of the tensor at most.\n"
        )
    on_gpu = a.results / "norms_gpu.jsonl"
    if on_gpu.exists():
        of_gpu = latest(on_gpu)
        said = (
            "The kernels are used at every size; by themselves norms that torch has an operator for take it below "
            f"{policy.LARGE_ON_GPU:,} values. Recorded: the step as a CUDA graph.\n"
        )
        parts += ["## On a GPU\n", f"{origin(of_gpu)}.\n", said, table_of_gpu(of_gpu), ""]
    (a.results / "norms.md").write_text("\n".join(parts))
    draw(records, a.results / "norms.png")


if __name__ == "__main__":
    main()

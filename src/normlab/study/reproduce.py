"""The lesson's recorded runs, made again in the lesson's own vocabulary, beside what was recorded."""

import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from .. import lesson
from ..errors import check, is_whole, unknown
from ..files import check_writable, write_whole
from ..training import Callback, StopWhenDiverged, schedules
from .executors import Job, run_jobs
from .processes import ProcessExecutor
from .record import Record
from .results import PLAIN
from .store import RunStore
from .trial import environment, make_record, quick_convolutions

NFS = [8, 16, 32, 64, 64]


@dataclass(frozen=True)
class Row:
    """A recorded run.

    Attributes:
        id: R1 to R12 as in the lesson's table; R8 was run with both batch norms.
        layer: name of the lesson's function that makes a block.
        bs: batch size.
        lr: learning rate, where no schedule moves it.
        epochs: passes over the training images.
        at_least: the validation accuracy to reach at the end; None if the run is recorded as failing, that is
            diverging or staying under `FAILS`.
        recorded: what the lesson and two other published runs show, validation accuracy by epoch.
        on: which seeds have to do so: "every", "most" or "some". Runs without norm and runs at the edge of stability
            depend much on their seed: for these it is "most" or "some".
        bn: whether the block has its norm.
        lr_points: the learning rates that a schedule joins by straight lines; empty for a constant rate.
        lr_shares: the share of the run that each line takes.
    """

    id: str
    layer: str
    bs: int
    lr: float
    epochs: int
    at_least: float | None
    recorded: str
    on: Literal["every", "most", "some"] = "every"
    bn: bool = True
    lr_shares: tuple[float, ...] = ()
    lr_points: tuple[float, ...] = ()

    @property
    def text(self) -> str:
        """What is run, on a line."""
        norm = NORM_NAMES[self.layer] if self.bn else "no norm"
        rate = "→".join(f"{point:g}" for point in self.lr_points) or f"{self.lr:g}"
        return f"{norm}, bs {self.bs}, lr {rate}, {self.epochs} epoch{'s' if self.epochs > 1 else ''}"


FAILS = 0.5
NORM_NAMES = {
    "conv_bn": "custom batch norm",
    "conv_layer": "built-in batch norm",
    "conv_ln": "layer norm",
    "conv_in": "instance norm",
    "conv_rbn": "running batch norm",
}
ROWS = (
    Row("R1", "conv_layer", 512, 0.4, 2, 0.94, "0.9526, 0.9540; 0.9698; 0.9701", on="most", bn=False),
    Row("R2", "conv_layer", 512, 1.0, 2, None, "0.1064, 0.1064", on="some", bn=False),
    Row("R3", "conv_bn", 512, 1.0, 2, 0.97, "0.9715, 0.9733; 0.9716; 0.9334"),
    Row("R4", "conv_layer", 512, 1.0, 2, 0.97, "0.9797, 0.9789; 0.9776; 0.9800"),
    Row("R5", "conv_layer", 512, 0.6, 8, 0.98, "—; 0.9877; 0.9860", lr_shares=(0.3, 0.7), lr_points=(0.6, 2.0, 0.1)),
    Row("R6", "conv_ln", 512, 0.8, 3, None, "—; nan (trains at 0.2–0.4)", on="some"),
    Row("R7", "conv_in", 512, 0.1, 3, None, "—; nan"),
    Row("R8a", "conv_bn", 2, 1.0, 1, None, "0.1531"),
    Row("R8b", "conv_layer", 2, 1.0, 1, None, "0.1531"),
    Row("R9", "conv_layer", 2, 0.4, 1, None, "0.1841; 0.2604; 0.2348"),
    Row("R10", "conv_rbn", 2, 1.0, 1, None, "0.0991 (loss nan)"),
    Row("R11", "conv_rbn", 2, 0.4, 1, 0.90, "0.9621; 0.9723; 0.957–0.972"),
    Row("R12", "conv_rbn", 32, 1.0, 1, 0.955, "—; 0.9818; 0.9787", lr_shares=(1.0,), lr_points=(1.0, 0.2)),
)


def reproduce(
    folder: str | Path,
    *,
    rows: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    workers: int | None = 2,
    console: Console | None = None,
) -> bool:
    """Run the rows for each seed, in `workers` processes, and show ours beside the recorded figures.

    Results are kept in `folder/runs.jsonl`; those found there are not run again. The table goes to `folder/table.md`
    too. Ctrl-C ends it: it shows what there is, and raises KeyboardInterrupt.

    Returns:
        Whether every row behaves as recorded.

    Raises:
        InputError: an unknown row, or a folder that cannot be written.
    """
    console, folder = console or Console(), Path(folder)
    check(bool(seeds) and all(map(is_whole, seeds)), "seeds", seeds, "one whole number from 0, or more")
    executor = ProcessExecutor(workers)
    by_id = {row.id: row for row in ROWS}
    for name in rows:
        if name not in by_id:
            raise unknown("rows", name, by_id)
    chosen = [by_id[name] for name in rows] or list(ROWS)
    check_writable(folder)
    store = RunStore(folder / "runs.jsonl")
    kept = {record.key for record in store.read() if record.status != "failed"}
    jobs = [make_job(row, seed) for row in chosen for seed in seeds]
    try:
        run_jobs([job for job in jobs if job.key not in kept], store, executor, console)
    finally:
        records = {record.key: record for record in store.read() if record.status != "failed"}
        found = [[records[key] for key in (f"{row.id}-{seed}" for seed in seeds) if key in records] for row in chosen]
        verdicts = [verdict(row, runs, len(seeds)) for row, runs in zip(chosen, found, strict=True)]
        console.print(_table(chosen, found, verdicts))
        write_whole(folder / "table.md", _markdown(chosen, found, verdicts).encode())
        console.print(f"runs   {store.path}\ntable  {folder / 'table.md'}", **PLAIN)
    return all(text == AS_RECORDED for text in verdicts)


def make_job(row: Row, seed: int) -> Job:
    """The row with one seed as a job."""
    steps = row.epochs * 50_000 / row.bs
    cost = steps * (1e-3 + 1e-4 * row.bs) * (3 if row.layer == "conv_rbn" else 1)
    label = f"{row.id:<4} {row.text:<55} seed {seed}"
    return Job(f"{row.id}-{seed}", label, cost, partial(run_row, row, seed), {**asdict(row), "seed": seed})


def run_row(row: Row, seed: int, tell: Callback | None = None) -> Record:
    """Train what the row says with `normlab.lesson`, as its notebook would, and return the record."""
    torch.manual_seed(seed)
    train_ds, valid_ds = _datasets()
    data = lesson.DataBunch(*lesson.get_dls(train_ds, valid_ds, row.bs), 10)
    guard = StopWhenDiverged()
    built = [guard] if tell is None else [guard, tell]
    cbs: list[Callable] = [
        lesson.Recorder,
        partial(lesson.AvgStatsCallback, lesson.accuracy),
        partial(lesson.BatchTransformXCallback, lesson.view_tfm(1, 28, 28)),
        *(lambda callback=callback: callback for callback in built),
    ]
    if row.lr_points:
        lines = [schedules.linear(a, b) for a, b in zip(row.lr_points[:-1], row.lr_points[1:], strict=True)]
        cbs.append(partial(lesson.ParamScheduler, "lr", lesson.combine_scheds(row.lr_shares, lines)))
    layer = partial(getattr(lesson, row.layer), bn=row.bn)
    learn, run = lesson.get_learn_run(NFS, data, row.lr, layer, cbs=cbs)
    start = time.perf_counter()
    with quick_convolutions("convnet", row.bs), redirect_stdout(StringIO()):
        run.fit(row.epochs, learn)
    return make_record(
        f"{row.id}-{seed}",
        settings={**asdict(row), "seed": seed},
        epochs=run.history,
        losses=run.recorder.losses,  # pyright: ignore[reportAttributeAccessIssue]
        diverged_at_step=guard.step,
        seconds=time.perf_counter() - start,
        parameters=sum(p.numel() for p in learn.model.parameters()),
    )


AS_RECORDED = "as recorded"


def verdict(row: Row, runs: Sequence[Record], seeds: int) -> str:
    """`AS_RECORDED` if enough seeds for the row behave as recorded; else how many do."""
    if len(runs) < seeds:
        return f"{len(runs)} of {seeds} seeds run"
    behaving = sum(_behaves(row, record.final("accuracy")) for record in runs)
    wanted = {"every": seeds, "most": seeds // 2 + 1, "some": 1}[row.on]
    return AS_RECORDED if behaving >= wanted else f"as recorded on {behaving} of {seeds}"


def _behaves(row: Row, final: float | None) -> bool:
    if row.at_least is None:
        return final is None or final < FAILS
    return final is not None and final >= row.at_least


@lru_cache(maxsize=1)
def _datasets() -> tuple[lesson.Dataset, lesson.Dataset]:
    x_train, y_train, x_valid, y_valid = lesson.get_data()
    x_train, x_valid = lesson.normalize_to(x_train, x_valid)
    return lesson.Dataset(x_train, y_train), lesson.Dataset(x_valid, y_valid)


def _ours(runs: Sequence[Record]) -> tuple[str, str]:
    """Mean and range over the seeds that ended, and what became of the others."""
    finals = [final for final in (record.final("accuracy") for record in runs) if final is not None]
    steps = [str(record.diverged_at_step) for record in runs if record.status == "diverged"]
    lost = f"diverged at step {', '.join(steps)}" if steps else ""
    if not finals:
        return lost or "—", ""
    return f"{mean(finals):.4f} ({min(finals):.4f}–{max(finals):.4f})", lost


def _cells(row: Row, runs: Sequence[Record], text: str) -> list[str]:
    ours = "; ".join(part for part in _ours(runs) if part)
    wanted = f"{'fails' if row.at_least is None else f'≥ {row.at_least:g}'} on {row.on} seed{'s' * (row.on == 'most')}"
    return [row.id, row.text, row.recorded, wanted, ours, text]


HEADINGS = ("#", "run", "recorded: lesson; others", "wanted", "ours: mean (least–most)", "verdict")


def _table(rows: Sequence[Row], found: Sequence[Sequence[Record]], verdicts: Sequence[str]) -> Table:
    table = Table(*HEADINGS, title="The lesson's recorded runs: validation accuracy", title_justify="left")
    for row, runs, text in zip(rows, found, verdicts, strict=True):
        table.add_row(*_cells(row, runs, text), style="" if text == AS_RECORDED else "bold yellow")
    return table


def _markdown(rows: Sequence[Row], found: Sequence[Sequence[Record]], verdicts: Sequence[str]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS)]
    lines += [_cells(row, runs, text) for row, runs, text in zip(rows, found, verdicts, strict=True)]
    seeds = sorted({record.settings["seed"] for runs in found for record in runs})
    here = environment()
    where = f"Seeds {', '.join(map(str, seeds))}; {here['machine']['cpu']}; torch {here['versions']['torch']}."
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", where, ""])

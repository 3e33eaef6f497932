"""Fine-tuning at batch 2 of networks that batch norm trained at batch 64: which norms should they go on with?

    python studies/finetune/study.py train                         # the two networks, with torch.nn.BatchNorm2d
    python studies/finetune/study.py screen  [--batch-sizes 2 …]   # learning rates, on a seed of their own
    python studies/finetune/study.py confirm [--batch-sizes 2 …]   # five other seeds at the best rate, test images
    python studies/finetune/study.py why                           # print two looks at causes
    python studies/finetune/study.py report                        # the tables of README.md, and finetune.png

README.md says what is compared and why. Each run is kept in `results.jsonl` as it ends. A command started again makes
the runs that are missing. A run takes one thread. The trained networks are kept in `runs/finetune`.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from rich.console import Console
from torch import Tensor, nn

import normlab
from normlab.colours import BLUE, GREEN, GREY, PINK, RED, SKY, VERMILION, VIOLET
from normlab.data import ImageData, TensorBatches, load_dataset
from normlab.files import write_whole
from normlab.models import build_model
from normlab.nn import BatchNorm2d
from normlab.study.executors import Job, run_jobs
from normlab.study.picture import save_figure
from normlab.study.plan import Trial
from normlab.study.record import Record
from normlab.study.schedules import SCHEDULES
from normlab.study.store import RunStore
from normlab.study.summary import Group, Spread, best, summarize
from normlab.study.trial import make_record, quick_convolutions
from normlab.training import Callback, Learner, Metrics, Recorder, ScheduleParameter, StopWhenDiverged, accuracy

FOLDER = Path(__file__).parent
STORE = RunStore(FOLDER / "results.jsonl")
NETWORKS = FOLDER.parents[1] / "runs" / "finetune"
TRAINED_ON, TRAINED_AT, TRAINED_EPOCHS, TRAINED_LR = 40_000, 64, 5, 0.05
IMAGES, EPOCHS = 2_000, 1
TO_CHOOSE, TO_JUDGE = 2_000, 5_000  # images held out, for screening and for confirmation
SCREENING, CONFIRMATION = 0, (1, 2, 3, 4, 5)  # seeds
# Screening starts with the four in the middle. It goes on while the best is the lowest or the highest.
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FIRST_RATES = RATES[4:8]


def seen_by_another_camera(images: Tensor, generator: torch.Generator) -> Tensor:
    """Dark on a light ground, with less contrast, and noise."""
    return (0.9 - 0.6 * images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def as_they_are(images: Tensor, generator: torch.Generator) -> Tensor:
    return images


@dataclass(frozen=True)
class Case:
    """A network of `model` trained on `source`, to be fine-tuned on `target`."""

    model: str
    source: str
    target: str
    seen: Callable[[Tensor, torch.Generator], Tensor]
    new_classes: bool


CASES = {
    "camera": Case("resnet", "fashion_mnist", "fashion_mnist", seen_by_another_camera, new_classes=False),
    "classes": Case("convnet", "mnist", "fashion_mnist", as_they_are, new_classes=True),
}


def as_is(model: nn.Module, images: Tensor) -> None:
    """Batch norm goes on with the statistics of each batch."""


def frozen(model: nn.Module, images: Tensor) -> None:
    normlab.freeze(model, inplace=True)


def frozen_statistics(model: nn.Module, images: Tensor) -> None:
    normlab.freeze(model, affine=False, inplace=True)


def recalibrated(model: nn.Module, images: Tensor) -> None:
    recalibrate(model, images)
    normlab.freeze(model, affine=False, inplace=True)


def group(model: nn.Module, images: Tensor) -> None:
    normlab.convert(model, "group", inplace=True)


def group_fitted(model: nn.Module, images: Tensor) -> None:
    normlab.convert(model, "group", inplace=True, batches=images.split(250), fit=True)


def running(model: nn.Module, images: Tensor) -> None:
    normlab.convert(model, "running", inplace=True)


def running_recalibrated(model: nn.Module, images: Tensor) -> None:
    recalibrate(model, images)
    normlab.convert(model, "running", inplace=True)


def recalibrate(model: nn.Module, images: Tensor) -> None:
    normlab.recalibrate(model, images[:1000].split(250))


WAYS = {
    "as is": as_is,
    "frozen": frozen,
    "frozen, γ and β learn": frozen_statistics,
    "frozen, recalibrated": recalibrated,
    "group": group,
    "group, fitted": group_fitted,
    "running": running,
    "running, recalibrated": running_recalibrated,
}
MARKERS = "osD"
BEGIN, END = "<!-- from here on made by `study.py report` -->", "<!-- up to here -->"
COLOURS = (VERMILION, GREY, SKY, VIOLET, GREEN, PINK, BLUE, RED)


# Training


def train(case: Case, data_dir: str | None) -> Record:
    """Train the network of a case from scratch, and keep it."""
    torch.set_num_threads(1)
    data = images_of(case.source, data_dir, "validation")
    torch.manual_seed(SCREENING)
    model = new_network(case)
    trial = Trial(
        "batch", TRAINED_AT, TRAINED_LR, SCREENING, TRAINED_EPOCHS, "one-cycle", case.source, case.model, TRAINED_ON
    )
    x, y = normalized(data.x_train[:TRAINED_ON], case, data_dir), data.y_train[:TRAINED_ON]
    record = fit(trial, model, x, y, normalized(data.x_valid, case, data_dir), data.y_valid)
    NETWORKS.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), network_file(case))
    return record


def fine_tune(trial: Trial, data_dir: str | None, *callbacks: Callback) -> Record:
    """Go on with a trained network; `trial.task` names the case and the way."""
    torch.set_num_threads(1)
    name, way = case_and_way(trial)
    case = CASES[name]
    x, y, x_held_out, y_held_out = target_images(case, trial.seed, data_dir)
    torch.manual_seed(trial.seed)
    model = trained_network(case)
    WAYS[way](model, x)
    before = share_right(model, x_held_out[:TO_CHOOSE], y_held_out[:TO_CHOOSE])
    return replace(fit(trial, model, x, y, x_held_out, y_held_out, *callbacks), more={"before": before})


def fit(
    trial: Trial, model: nn.Module, x: Tensor, y: Tensor, x_held_out: Tensor, y_held_out: Tensor, *callbacks: Callback
) -> Record:
    """Train on `x` as `trial` says, by SGD with momentum. Measure the accuracy on what is held out at the end."""
    recorder, guard = Recorder(), StopWhenDiverged()
    schedule = ScheduleParameter("lr", SCHEDULES[trial.schedule](trial.lr))
    learner = Learner(
        model,
        TensorBatches(x, y, trial.batch_size, shuffle=True, seed=trial.seed),
        optimizer=torch.optim.SGD(model.parameters(), lr=trial.lr, momentum=0.9),
        callbacks=[Metrics(accuracy=accuracy), schedule, recorder, guard, *callbacks],
    )
    start = time.perf_counter()
    with quick_convolutions(trial.model, trial.batch_size):
        learner.fit(trial.epochs)
    seconds = time.perf_counter() - start
    if guard.step is None:
        learner.history[-1]["valid"] = {"accuracy": share_right(model, x_held_out, y_held_out)}
    return make_record(
        trial.key,
        settings=trial.to_dict(),
        epochs=learner.history,
        losses=recorder.losses,
        diverged_at_step=guard.step,
        seconds=seconds,
        parameters=sum(part.numel() for part in model.parameters()),
    )


def share_right(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The accuracy, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found = torch.cat([model(batch).argmax(1) for batch in x.split(250)])
    return (found == y).double().mean().item()


# Networks and images


def new_network(case: Case) -> nn.Module:
    """A network of the case, with torch's own batch norm."""
    model = build_model(case.model, "batch", num_classes=10, in_channels=1)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BatchNorm2d):
            model.set_submodule(name, nn.BatchNorm2d(layer.num_features))
    return model


def trained_network(case: Case) -> nn.Module:
    """The network that `train` kept. Where classes are new, so is its last layer, drawn from torch's global seed."""
    model = new_network(case)
    state = torch.load(network_file(case), weights_only=True)
    last = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
    kept = {name: value for name, value in state.items() if not (case.new_classes and name.startswith(f"{last}."))}
    model.load_state_dict(kept, strict=not case.new_classes)
    return model


def network_file(case: Case) -> Path:
    return NETWORKS / f"{case.source}-{case.model}.pt"


def target_images(case: Case, seed: int, data_dir: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A seed's own images to train on, and images held out: validation images in screening, else test images.

    No network was trained on any of them. All are normalised as the network's training images were.
    """
    screening = seed == SCREENING
    data = images_of(case.target, data_dir, "validation" if screening else "test")
    generator = torch.Generator().manual_seed(seed)
    drawn = TRAINED_ON + torch.randperm(len(data.x_train) - TRAINED_ON, generator=generator)[:IMAGES]
    held_out = slice(TO_CHOOSE if screening else TO_JUDGE)
    x, x_held_out = (
        normalized(case.seen(part, generator), case, data_dir) for part in (data.x_train[drawn], data.x_valid[held_out])
    )
    return x, data.y_train[drawn], x_held_out, data.y_valid[held_out]


def normalized(images: Tensor, case: Case, data_dir: str | None) -> Tensor:
    """The images, by mean and deviation of those that the network was trained on."""
    mean, deviation = scale_of(case.source, data_dir)
    return (images - mean) / deviation


@lru_cache
def scale_of(name: str, data_dir: str | None) -> tuple[Tensor, Tensor]:
    images = images_of(name, data_dir, "validation").x_train[:TRAINED_ON]
    return images.mean(), images.std()


@lru_cache(maxsize=3)
def images_of(name: str, data_dir: str | None, held_out: str) -> ImageData:
    return load_dataset(name, data_dir, held_out)


# Which runs


def to_screen(groups: Iterable[Group], case: str, way: str, batch_size: int) -> list[Trial]:
    """The first rates. Then the next one, while the best so far is the lowest or the highest.

    If no run ended, there are no more.
    """
    scores = {one.settings["lr"]: one.score for one in groups}
    if not scores:
        rates: Iterable[float] = FIRST_RATES
    elif not any(scores.values()):
        rates = []
    else:
        place, tried = RATES.index(max(scores, key=lambda rate: scores[rate])), scores.keys()
        rates = [rate for rate in RATES[max(place - 1, 0) : place + 2] if rate not in tried]
    return [settings(case, way, batch_size, rate, SCREENING) for rate in rates]


def to_confirm(
    groups: Iterable[Group], case: str, way: str, batch_size: int, rates: Iterable[float] = ()
) -> list[Trial]:
    """The best rate and the ones in `rates`, with fresh seeds."""
    leader = best(groups)
    if leader is None:
        return []
    rates = dict.fromkeys([leader.settings["lr"], *rates])
    return [settings(case, way, batch_size, rate, seed) for rate in rates for seed in CONFIRMATION]


def settings(case: str, way: str, batch_size: int, lr: float, seed: int) -> Trial:
    chosen = CASES[case]
    trial = Trial(norm_of(way), batch_size, lr, seed, EPOCHS, "one-cycle", chosen.target, chosen.model, IMAGES)
    return replace(trial, task=f"{case}: {way}")


def case_and_way(trial: Trial) -> tuple[str, str]:
    """The names in its task, as `settings` writes it."""
    case, _, way = (trial.task or "").partition(": ")
    return case, way


def norm_of(way: str) -> str:
    """The norm that the network has after the change."""
    return "batch" if way == "as is" else way.partition(",")[0]


def kept_runs() -> list[Record]:
    """All kept runs. Those from before trials had a task have the case in `data` and the way in `norm`."""
    records = STORE.read()
    return [with_task(record) if record.settings["data"] in CASES else record for record in records]


def with_task(record: Record) -> Record:
    case, way = record.settings["data"], record.settings["norm"]
    own = {"norm": norm_of(way), "data": CASES[case].target, "task": f"{case}: {way}"}
    trial = Trial.from_dict({**record.settings, **own})
    return replace(record, key=trial.key, settings=trial.to_dict())


def runs(seeds: Iterable[int]) -> list[Record]:
    """The kept runs of fine-tuning with these seeds."""
    return [
        record
        for record in kept_runs()
        if "task" in record.settings and record.settings["seed"] in seeds and record.settings["epochs"] == EPOCHS
    ]


def grouped(seeds: Iterable[int], case: str, way: str, batch_size: int) -> list[Group]:
    wanted = f"{case}: {way}", batch_size
    found = [run for run in runs(seeds) if (run.settings["task"], run.settings["batch_size"]) == wanted]
    return summarize(found) if found else []


def run(
    choose: Callable[[Iterable[Group], str, str, int], list[Trial]],
    cases: Iterable[str],
    batch_sizes: Iterable[int],
    data_dir: str | None,
    workers: int,
) -> bool:
    """Make the runs that `choose` picks and the store does not hold. Returns whether there were any."""
    kept = {record.key for record in kept_runs()}
    trials = [
        trial
        for case, batch_size, way in itertools.product(cases, batch_sizes, WAYS)
        for trial in choose(grouped([SCREENING], case, way, batch_size), case, way, batch_size)
        if trial.key not in kept
    ]
    run_jobs([job(trial, data_dir) for trial in trials], STORE, workers, Console())
    return bool(trials)


def job(trial: Trial, data_dir: str | None) -> Job:
    label = f"{trial.task:<30} batch {trial.batch_size} lr {trial.lr:<6g} seed {trial.seed}"
    cost = (10 if trial.model == "resnet" else 2) / trial.batch_size
    return Job(trial.key, label, cost, partial(fine_tune, trial, data_dir), trial.to_dict())


# Why


def show_recalibrated(data_dir: str | None) -> None:
    """Print the loss of the main case's network on its new images, before and after `recalibrate`."""
    case = CASES["camera"]
    x, y, _, _ = target_images(case, SCREENING, data_dir)
    model = trained_network(case)

    def loss() -> float:
        with torch.no_grad():
            return nn.functional.cross_entropy(model(x[:1000]), y[:1000]).item()

    model.eval()
    print(f"old statistics: loss {loss():.2f}")
    recalibrate(model, x)
    print(f"recalibrated: loss {loss():.2f}")
    model.train()
    print(f"statistics of the batch itself: loss {loss():.2f}")


def show_statistics(data_dir: str | None) -> None:
    """Print the test accuracy of running batch norm in the second case: as it is, and recalibrated after training."""
    for batch_size, lr in ((2, 0.003), (2, 0.01), (1, 0.003)):
        own, measured = [], []
        for seed in CONFIRMATION:
            x, y, x_test, y_test = target_images(CASES["classes"], seed, data_dir)
            torch.manual_seed(seed)
            model = trained_network(CASES["classes"])
            running(model, x)
            record = fit(settings("classes", "running", batch_size, lr, seed), model, x, y, x_test, y_test)
            own.append(record.final("accuracy"))
            recalibrate(model, x)
            measured.append(share_right(model, x_test, y_test))
        print(f"batch {batch_size}, rate {lr}: running {Spread.of(own)}, measured {Spread.of(measured)}")


# What came of it


def report() -> None:
    """Write the tables of README.md, between its two marks, and the picture."""
    readme = FOLDER / "README.md"
    head, _, rest = readme.read_text().partition(BEGIN)
    tail = rest.partition(END)[2]
    write_whole(readme, f"{head}{BEGIN}\n\n{tables()}\n{END}{tail}".encode())
    write_picture(FOLDER / "finetune.png")


def tables() -> str:
    found = [(case, size) for case, size in itertools.product(CASES, sizes()) if confirmed(case, "running", size)]
    parts = [f"### `{case}`, batch {size}\n\n{table(case, size)}" for case, size in found]
    parts += ["<details><summary>Every rate: validation accuracy in screening, test accuracy</summary>\n"]
    for case, size in found:
        screened, tested = (
            rates_table({way: by_rate(seeds, case, way, size) for way in WAYS}) for seeds in ([SCREENING], CONFIRMATION)
        )
        parts.append(f"`{case}`, batch {size}, screening\n\n{screened}\n`{case}`, batch {size}, test\n\n{tested}")
    return "\n".join([*parts, "</details>\n", made_with()])


def sizes() -> list[int]:
    return sorted({record.settings["batch_size"] for record in runs(CONFIRMATION)})


def table(case: str, batch_size: int) -> str:
    """Test accuracy of each way at its best rate, and its distance from running batch norm, seed by seed."""
    lines = [
        "| | rate | before | training accuracy | test accuracy | `running` minus it |",
        "|---|---|---|---|---|---|",
    ]
    reference = accuracies(case, "running", batch_size)
    for way in WAYS:
        members = confirmed(case, way, batch_size)
        if members is None:
            continue
        own = accuracies(case, way, batch_size)
        before = Spread.of(record.more.get("before") for record in members.records)
        trained = Spread.of(record.epochs[-1]["train"]["accuracy"] for record in members.records if record.epochs)
        apart = Spread.of(reference[seed] - own[seed] for seed in own if seed in reference and way != "running")
        cells = [before or "–", trained or "–", members.outcome, apart or "–"]
        lines.append(f"| {way} | {members.settings['lr']:g} | " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def rates_table(found: dict[str, dict[float, Group]]) -> str:
    rates = sorted({rate for at_rate in found.values() for rate in at_rate})
    lines = ["| | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for way, at_rate in found.items():
        cells = [at_rate[rate].outcome if rate in at_rate else "" for rate in rates]
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def confirmed(case: str, way: str, batch_size: int) -> Group | None:
    """The runs at the rate that screening chose."""
    leader = best(grouped([SCREENING], case, way, batch_size))
    return by_rate(CONFIRMATION, case, way, batch_size).get(leader.settings["lr"]) if leader else None


def by_rate(seeds: Iterable[int], case: str, way: str, batch_size: int) -> dict[float, Group]:
    return {one.settings["lr"]: one for one in grouped(seeds, case, way, batch_size)}


def accuracies(case: str, way: str, batch_size: int) -> dict[int, float]:
    """The accuracy of each run that finished, by seed."""
    members = confirmed(case, way, batch_size)
    found = {record.settings["seed"]: record.final("accuracy") for record in members.records} if members else {}
    return {seed: value for seed, value in found.items() if value is not None}


def made_with() -> str:
    """A line each on the networks, and on versions and machines."""
    records = [record for record in kept_runs() if record.status != "failed"]
    sources = {(case.source, case.model): f"`{name}`" for name, case in CASES.items()}
    trained = [
        f"{sources[record.settings['data'], record.settings['model']]} {record.final('accuracy'):.4f}"
        for record in records
        if "task" not in record.settings
    ]
    versions = {", ".join(f"{name} {number}" for name, number in record.versions.items()) for record in records}
    machines = {record.machine["cpu"] for record in records}
    seconds = sum(record.seconds or 0 for record in records)
    return (
        f"Validation accuracy of the networks on what they were trained on: {', '.join(trained)}.\n"
        f"{len(records)} runs, {seconds / 3600:.1f} hours of one thread; {'; '.join(sorted(machines))}; "
        f"{'; '.join(sorted(versions))}.\n"
    )


def write_picture(path: Path) -> None:
    """Draw errors on the test images, and on the validation images by learning rate. Each case has a row."""
    figure = Figure(figsize=(11, 4.5 * len(CASES)), layout="constrained")
    for row, case in zip(figure.subplots(len(CASES), 2, squeeze=False), CASES, strict=True):
        draw_errors(row[0], case)
        draw_screening(row[1], case, 2)
    save_figure(figure, path)


def draw_errors(axes: Axes, case: str) -> None:
    axes.set_title(f"{case}: test error at the best rate, five seeds", loc="left", fontsize=10)
    there = [size for size in sizes() if confirmed(case, "running", size)]
    for (place, way), (turn, size) in itertools.product(enumerate(WAYS), enumerate(there)):
        members = confirmed(case, way, size)
        if members is None or members.value is None:
            continue
        y = place + 0.3 * (turn - (len(there) - 1) / 2)
        error, deviation = 1 - members.value.mean, members.value.std or 0.0
        axes.errorbar(
            error,
            y,
            xerr=deviation,
            color=COLOURS[place],
            marker=MARKERS[sizes().index(size) % len(MARKERS)],
            capsize=3,
        )
        axes.annotate(
            f"{error:.3f}" + (f", batch {size}" if len(there) > 1 else ""), (1, y), (4, -2),
            xycoords=axes.get_yaxis_transform(), textcoords="offset points", fontsize=7, color="#555555",
        )  # fmt: skip
    axes.set_yticks(range(len(WAYS)), list(WAYS))
    axes.set_xlabel("1 − accuracy")
    axes.invert_yaxis()
    axes.set_xscale("log")
    scale_errors(axes.xaxis)


def draw_screening(axes: Axes, case: str, size: int) -> None:
    axes.set_title(f"{case}: validation error by rate, batch {size}, one seed", loc="left", fontsize=10)
    for way, colour in zip(WAYS, COLOURS, strict=True):
        found = sorted(by_rate([SCREENING], case, way, size).items())
        axes.plot([rate for rate, _ in found], [1 - one.score for _, one in found], "o-", color=colour, label=way)
    axes.set_xlabel("highest learning rate")
    axes.set_xscale("log")
    axes.set_yscale("log")
    scale_errors(axes.yaxis)
    axes.legend(fontsize=7)


def scale_errors(axis: Axis) -> None:
    """Put a few plain numbers on a logarithmic axis of errors."""
    axis.set_major_locator(FixedLocator([0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
    axis.grid(color="#DDDDDD", linewidth=0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["train", "screen", "confirm", "why", "report"], help="what to do")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES), help="cases to run")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[2], help="images a step")
    parser.add_argument("--rates", nargs="+", type=float, default=[], help="rates that confirm runs beside the best")
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    a = parser.parse_args()
    if a.part == "train":
        for case in a.cases:
            if not network_file(CASES[case]).exists():
                STORE.append(train(CASES[case], a.data_dir))
    elif a.part == "screen":
        while run(to_screen, a.cases, a.batch_sizes, a.data_dir, a.workers):
            pass
    elif a.part == "confirm":
        run(partial(to_confirm, rates=a.rates), a.cases, a.batch_sizes, a.data_dir, a.workers)
    elif a.part == "why":
        torch.set_num_threads(1)
        show_recalibrated(a.data_dir)
        show_statistics(a.data_dir)
    else:
        report()


if __name__ == "__main__":
    main()

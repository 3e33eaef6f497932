"""The command line: parse, call, print."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import tyro
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional, arg

from .errors import InputError, check
from .files import check_writable
from .study.commands import GOES_ON, Study
from .study.interrupts import impatient_ctrl_c
from .study.optimizers import OPTIMIZERS
from .study.plan import Names, Plan, Shared, Trial, Varied, WholeNumbers
from .study.schedules import SCHEDULES

if TYPE_CHECKING:
    from .study.subject import Subject

# torch takes more than a second to import: the commands import what they need, so that --help answers at once.
# A text under a field is its help. The settings of a trial have theirs in the plan.


@dataclass(frozen=True)
class Train(Shared, Varied):
    """Train one network and show how it goes."""

    kept: ClassVar[str] = "this run is not kept: its record, pictures and weights are written when it ends"

    lr: float = 0.1
    data_dir: Path | None = None
    """Folder with local copies of the data sets; the variable NORMLAB_DATA names one too."""
    out: Path = Path("runs/train")
    """Folder for the record and the pictures."""

    def run(self, console: Console) -> int:
        from .observe import ActivationStats, blocks, plot_activations, plot_histograms, plot_training
        from .observe.plots import save
        from .study.store import RunStore
        from .study.subject import WEIGHTS
        from .study.tasks import check_tasks
        from .study.trial import build_learner, run_learner
        from .study.weights import save_weights
        from .training import ShowProgress

        trial = Trial.from_dict(vars(self))
        check_tasks([trial], self.data_dir)
        check_writable(self.out)
        learner = build_learner(trial, self.data_dir, (ShowProgress(console),))
        batches = self.epochs * len(learner.train)  # pyright: ignore[reportArgumentType]
        every = max(1, batches // 200)  # a picture shows no more
        with ActivationStats(blocks(learner.model), every=every) as stats:
            record, recorder = run_learner(trial, learner)
        save_weights(learner.model, self.out / WEIGHTS, trial.key)  # before the record: the last one has its weights
        RunStore(self.out / "runs.jsonl").append(record)
        save(plot_training(recorder.losses, recorder.lrs[-1]), self.out / "training.png")
        save(plot_activations(stats), self.out / "activations.png")
        save(plot_histograms(stats), self.out / "histograms.png")
        if record.status == "diverged":
            console.print(f"diverged at step {record.diverged_at_step}", style="bold yellow")
        names = "runs.jsonl", "training.png", "activations.png", "histograms.png", "model.safetensors"
        _say_where(console, self.out, *names)
        return 0


@dataclass(frozen=True)
class Diagnose:
    """Say what is wrong with the norms of a model, and what helps. The exit status is 1 if something is wrong."""

    model: Positional[Annotated[str, arg(metavar="[MODEL]")]] = "runs/train"
    """Folder that normlab train wrote; or module:name (or file.py:name) of a model, or of a function that makes one."""
    batches: str | None = None
    """Batches for a model of your own: module:name of an iterable, or of a function that makes it."""
    weights: Path | None = None
    """State to load into a model of your own: .safetensors, or as torch.save writes it."""
    loss: str | None = None
    """Loss of a model of your own: module:name of a function of output and target."""
    batch_size: int | None = None
    """Images a batch of a run; as many as it trained with if None."""
    limit: int = 32
    """The most batches to take."""
    data_dir: Path | None = None
    """Folder with local copies of the data sets; the variable NORMLAB_DATA names one too."""
    out: Path = Path("runs/diagnosis")
    """Folder for the figures (JSON) and the picture."""

    def run(self, console: Console) -> int:
        from .health import diagnose
        from .study.named import explain_failure

        subject = self._subject()
        check_writable(self.out)
        for note in subject.notes:
            console.print(f"warning: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        with explain_failure(f"model={self.model!r} failed on batches={self.batches!r}"):
            found = diagnose(
                subject.model, subject.batches, loss=subject.loss, optimizer=subject.optimizer, limit=self.limit
            )
        console.print(found, highlight=False, soft_wrap=True)
        found.save(self.out / "diagnosis.json")
        found.save(self.out / "diagnosis.png")
        _say_where(console, self.out, "diagnosis.json", "diagnosis.png")
        return 0 if found.healthy else 1

    def _subject(self) -> "Subject":
        from .study.subject import of_run, of_user

        if self.batches is not None:
            check(self.batch_size is None, "batch_size", self.batch_size, "None with --batches, which have their size")
            return of_user(self.model, self.batches, self.weights, self.loss)
        for name in ("weights", "loss"):
            given = getattr(self, name)
            check(given is None, name, str(given), "None for a run", "Give --batches too for a model of your own.")
        return of_run(Path(self.model), self.batch_size, self.data_dir)


@dataclass(frozen=True)
class Compare(Plan):
    """Compare norms at several batch sizes: a table, a picture and a page. The short form of `study run`."""

    kept: ClassVar[str] = GOES_ON

    data_dir: Path | None = None
    """Folder with local copies of the data sets; the variable NORMLAB_DATA names one too."""
    out: Path = Path("runs/compare")
    """Folder for the results; runs found there are not run again."""
    workers: int | None = None
    """Runs at a time; None for as many as there are cores."""

    def run(self, console: Console) -> int:
        from .study.compare import compare

        command = shlex.join(["normlab", *sys.argv[1:]])
        compare(
            self.trials(),
            self.out,
            data_dir=self.data_dir,
            workers=self.workers,
            console=console,
            command=command,
            stop_beaten=self.stop_beaten,
        )
        return 0


@dataclass(frozen=True)
class Advise:
    """Name a norm for a task, with its evidence and caveats. The exit status is 1 if it is not known."""

    task: Literal["classification", "segmentation", "detection"] = "classification"
    """What the network does."""
    batch_size: int = 2
    """Images that a norm sees at a time."""
    pretrained: bool = False
    """Whether the network was trained before, with batch norm at a large batch."""
    study: Annotated[Path | None, arg(name="from")] = None
    """Folder of a study of your own, in place of the committed ones; then the task is the study's."""

    def run(self, console: Console) -> int:
        from .study.advise import advise

        advice = advise(self.task, self.batch_size, pretrained=self.pretrained, study=self.study)
        console.print(str(advice), highlight=False, markup=False, soft_wrap=True)
        return 0 if advice.norm is not None else 1


@dataclass(frozen=True)
class Reproduce:
    """Make the lesson's recorded runs again, and show them beside the recorded figures."""

    kept: ClassVar[str] = GOES_ON

    rows: Annotated[Names, arg(help_behavior_hint="(default: all)")] = field(default_factory=list)
    """Which of R1 to R12."""
    seeds: WholeNumbers = field(default_factory=lambda: [0, 1, 2])
    """Seeds; a row says on how many of them it has to behave as recorded."""
    out: Path = Path("runs/reproduce")
    """Folder for the results; runs found there are not run again."""
    workers: int | None = None
    """Runs at a time; None for as many as there are cores."""

    def run(self, console: Console) -> int:
        from .study.reproduce import reproduce

        whole = reproduce(self.out, rows=self.rows, seeds=self.seeds, workers=self.workers, console=console)
        return 0 if whole else 1


@dataclass(frozen=True)
class List:
    """List the norms, networks, data sets, schedules and optimizers."""

    def run(self, console: Console) -> int:
        from .data import DATASETS
        from .models import MODELS
        from .nn import NORMS

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, norm in NORMS.items():
            table.add_row("norm", name, norm.summary)
        for name, model in MODELS.items():
            table.add_row("model", name, (model.__doc__ or "").split(".")[0])
        for name in DATASETS:
            table.add_row("data", name, "")
        for name, schedule in SCHEDULES.items():
            table.add_row("schedule", name, (schedule.__doc__ or "").rstrip("."))
        for name, optimizer in OPTIMIZERS.items():
            table.add_row("optimizer", name, (optimizer.__doc__ or "").rstrip("."))
        console.print(table, highlight=False)
        return 0


@dataclass(frozen=True)
class Info:
    """Say what is installed, and whether the compiled kernels are in use. If they are not, say why."""

    def run(self, console: Console) -> int:
        import platform
        from importlib.metadata import version

        import torch

        from .kernels import cpu, policy

        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_row("normlab", version("normlab"))
        table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
        table.add_row("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
        table.add_row("kernels", cpu.PATH)
        if torch.cuda.is_available():
            table.add_row("on GPU", f"{policy.PATH_ON_GPU}, {torch.cuda.get_device_name()}")
        console.print(table, highlight=False)
        return 0


Command = (
    Annotated[Train, arg(name="train")]
    | Annotated[Diagnose, arg(name="diagnose")]
    | Annotated[Compare, arg(name="compare")]
    | Annotated[Study, arg(name="study")]
    | Annotated[Advise, arg(name="advise")]
    | Annotated[Reproduce, arg(name="reproduce")]
    | Annotated[List, arg(name="list")]
    | Annotated[Info, arg(name="info")]
)


def main() -> None:
    """Run the command of `sys.argv`; exits 2 on bad input, 130 on Ctrl-C. A second Ctrl-C ends it at once."""
    kept = "nothing was written"
    with impatient_ctrl_c():
        try:
            command = tyro.cli(
                Command, prog="normlab", description="Norms that hold at any batch size, and the lab that proves it."
            )  # pyright: ignore[reportArgumentType, reportCallIssue]
            kept = getattr(command, "kept", kept)
            sys.exit(command.run(Console(markup=False)))  # pyright: ignore[reportAttributeAccessIssue]
        except InputError as error:
            _complain(f"normlab: {error}", style="bold red")
            sys.exit(2)
        except KeyboardInterrupt:
            _complain(f"normlab: interrupted; {kept}.")
            sys.exit(130)


def _complain(message: str, style: str = "") -> None:
    Console(stderr=True).print(message, style=style, highlight=False, markup=False, soft_wrap=True)


def _say_where(console: Console, folder: Path, *names: str) -> None:
    for name in names:
        console.print(str(folder / name), highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()

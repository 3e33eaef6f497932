"""The command line of studies: `normlab study …`."""

import shlex
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, configure

from ..errors import check
from ..files import write_whole
from .plan import PLAN, Plan, WholeNumbers

if TYPE_CHECKING:
    from rich.console import Console

    from .record import Record

GOES_ON = "what is done is kept, run the same command to go on"
FOLDER = Path("runs/study")


@dataclass(frozen=True)
class Run(Plan):
    """Run a study: what its folder does not hold yet. The plan is a TOML file, or these options."""

    kept: ClassVar[str] = GOES_ON

    file: Positional[Annotated[Path | None, arg(metavar="[FILE]")]] = None
    """TOML file of the plan, whose keys are the names of the options; or none, with options."""
    out: Path = FOLDER
    """Folder for the results; runs found there are not run again."""
    data_dir: Path | None = None
    """Folder with local copies of the data sets; the variable NORMLAB_DATA names one too."""
    workers: int | None = None
    """Runs at a time; None for as many as there is room for."""
    executor: str = "processes"
    """What makes the runs: processes, here (in this process), ray or ray:ADDRESS (a cluster), or slurm."""

    def run(self, console: "Console") -> int:
        from .compare import run_study
        from .executors import make_executor

        plan = Plan(**{one.name: getattr(self, one.name) for one in fields(Plan)})
        if self.file is not None:
            check(plan == Plan(), "plan", "a file and options", "one of them", f"Write the options into {self.file}.")
            plan = Plan.read(self.file)
        executor = make_executor(self.executor, self.workers)
        run_study(plan, self.out, data_dir=self.data_dir, workers=executor, console=console)
        return 0


@dataclass(frozen=True)
class Report:
    """Make the table, the pictures and the page of a study again."""

    folder: Positional[Path] = FOLDER
    """Of the study."""

    def run(self, console: "Console") -> int:
        from .lines import uncollected
        from .results import complete_groups, report
        from .stopping import counts
        from .store import RunStore

        with uncollected():
            plan, store = Plan.read(self.folder / PLAN), RunStore(self.folder / "runs.jsonl")
            keys = {trial.key for trial in plan.trials()}
            groups = complete_groups(store, (one for one in store.outcomes() if one.key in keys and counts(plan, one)))
            report(groups, self.folder, console, shlex.join(["normlab", *sys.argv[1:]]))
        return 0


@dataclass(frozen=True)
class Status:
    """Say how far a study is: which runs wait, run, ended or failed. The exit status is 1 if some are left."""

    folder: Positional[Path] = FOLDER
    """Of the study."""

    def run(self, console: "Console") -> int:
        from .lines import uncollected
        from .status import status
        from .stopping import counts

        with uncollected():
            plan = Plan.read(self.folder / PLAN)
            found = status(self.folder, plan.trials(), partial(counts, plan))
        console.print(found)
        return 0 if found.done else 1


@dataclass(frozen=True)
class Export:
    """Write the runs of a study to a file: .csv or .parquet with a line a run, .tex with a table for a paper."""

    folder: Positional[Path]
    """Of the study."""
    file: Positional[Path]
    """Its suffix says how: .csv, .parquet or .tex; .png, .svg or .pdf are its figures, in a folder of that name."""

    def run(self, console: "Console") -> int:
        _, records = _study(self.folder)
        for path in _exported(records, self.file):
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Merge:
    """Put the runs of several folders together, such as those of the machines that shared a study."""

    folders: Positional[list[Path]]
    """Of studies. They stay as they are."""
    out: Path = Path("runs/merged")
    """Folder of the merged study; what it holds already stays."""

    def run(self, console: "Console") -> int:
        from .export import merge

        check(bool(self.folders), "folders", "none", "one folder or more")
        records = merge(self.folders, self.out)
        console.print(f"{len(records)} runs: {self.out}", highlight=False, markup=False, soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Confirm:
    """Write the plan that tries the best settings of a study again, with seeds that did not choose them."""

    folder: Positional[Path] = FOLDER
    """Of the study."""
    seeds: WholeNumbers | None = None
    """Other seeds than the study had; by default as many new ones as it takes to tell the chosen norms apart."""
    best: int = 1
    """Settings of each norm and batch size."""
    file: Path = Path("confirm.toml")
    """The plan; look at it, then run it: normlab study run FILE."""

    def run(self, console: "Console") -> int:
        from .confirm import confirm

        plan, records = _study(self.folder)
        made = confirm(plan, records, self.seeds, self.best)
        write_whole(self.file, made.to_toml().encode())
        console.print(f"{len(made.trials())} runs: {self.file}", highlight=False, markup=False, soft_wrap=True)
        return 0


@dataclass(frozen=True)
class Watch:
    """Show the page of a study that runs, in the browser of this machine, until Ctrl-C."""

    folder: Positional[Path] = FOLDER
    """Of the study."""
    port: int = 8017
    """At 127.0.0.1; 0 for any that is free."""

    def run(self, console: "Console") -> int:
        from .watch import make_server

        with make_server(self.folder, self.port) as server:
            console.print(f"{server.address}  (Ctrl-C ends it)", highlight=False, markup=False)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                return 0
        return 0


@configure(OmitSubcommandPrefixes, OmitArgPrefixes)
@dataclass(frozen=True)
class Study:
    """Studies of norms on any model and data."""

    command: (
        Annotated[Run, arg(name="run")]
        | Annotated[Status, arg(name="status")]
        | Annotated[Watch, arg(name="watch")]
        | Annotated[Report, arg(name="report")]
        | Annotated[Export, arg(name="export")]
        | Annotated[Merge, arg(name="merge")]
        | Annotated[Confirm, arg(name="confirm")]
    )

    def run(self, console: "Console") -> int:
        return self.command.run(console)

    @property
    def kept(self) -> str:
        """What is kept after Ctrl-C."""
        return getattr(self.command, "kept", "nothing was written")


def _study(folder: Path) -> "tuple[Plan, list[Record]]":
    """The plan in a study's folder, and those of the runs there that are its own."""
    from .stopping import counts
    from .store import RunStore

    plan = Plan.read(folder / PLAN)
    keys = {trial.key for trial in plan.trials()}
    records = RunStore(folder / "runs.jsonl").read()
    return plan, [record for record in records if record.key in keys and counts(plan, record)]


def _exported(records: "list[Record]", file: Path) -> list[Path]:
    from .export import export
    from .picture import FORMATS, write_figures

    kind = file.suffix.removeprefix(".")
    return write_figures(records, file.with_suffix(""), [kind]) if kind in FORMATS else [export(records, file)]

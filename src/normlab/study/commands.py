"""The command line of studies: `normlab study run`, `report`."""

import os
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional, arg, configure

from ..errors import check
from .plan import Plan

if TYPE_CHECKING:
    from rich.console import Console

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
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """Runs at a time."""

    def run(self, console: "Console") -> int:
        from .compare import run_study

        plan = Plan(**{one.name: getattr(self, one.name) for one in fields(Plan)})
        if self.file is not None:
            check(plan == Plan(), "plan", "a file and options", "one of them", f"Write the options into {self.file}.")
            plan = Plan.read(self.file)
        run_study(plan, self.out, data_dir=self.data_dir, workers=self.workers, console=console)
        return 0


@dataclass(frozen=True)
class Report:
    """Make the table, the pictures and the page of a study again."""

    folder: Positional[Path] = FOLDER
    """Of the study."""

    def run(self, console: "Console") -> int:
        from .compare import PLAN, report
        from .store import RunStore

        records = RunStore(self.folder / "runs.jsonl").read()
        keys = {trial.key for trial in Plan.read(self.folder / PLAN).trials()}
        report([one for one in records if one.key in keys], self.folder, console, shlex.join(sys.argv))
        return 0


@configure(OmitSubcommandPrefixes, OmitArgPrefixes)
@dataclass(frozen=True)
class Study:
    """Studies of norms on any model and data: run, report."""

    command: Annotated[Run, arg(name="run")] | Annotated[Report, arg(name="report")]

    def run(self, console: "Console") -> int:
        return self.command.run(console)

    @property
    def kept(self) -> str:
        """What is kept after Ctrl-C."""
        return getattr(self.command, "kept", "nothing was written")

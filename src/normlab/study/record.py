"""What is kept of a run: a `Record`, which is a line of JSON in a store."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

Status = Literal["finished", "diverged", "failed"]

# A line has these only where they are known; the other fields are always there.
FIGURES = ("steps", "seconds", "parameters", "versions", "machine", "finished_at")


def _no_curve() -> dict[str, list]:
    return {"step": [], "loss": []}


@dataclass(frozen=True)
class Record:
    """One run: what was run, what came of it, where and when.

    Attributes:
        key: names the run in its store.
        settings: what was run; those of a trial are the fields of `Trial`.
        status: `finished`; `diverged` at a training loss that is not finite; `failed` with an error.
        diverged_at_step: the first step whose loss is not finite; None if there is none, or if it is not known.
        error: what stopped a run that failed, in a line.
        traceback: of that error.
        epochs: for each epoch its number (`epoch`), its `seconds`, and its figures by name in `train` and `valid`.
        curve: the training `loss`, and after which `step`.
        steps: how many there were.
        seconds: of training, in all.
        parameters: how many the network has.
        versions: of Python and of the packages, by name.
        machine: its `cpu`, and how many `threads` the run had.
        finished_at: date and time, as ISO 8601 writes them.
        more: what a study adds of its own, by name.
    """

    key: str
    settings: dict[str, Any]
    status: Status
    diverged_at_step: int | None = None
    error: str | None = None
    traceback: str | None = None
    epochs: list[dict[str, Any]] = field(default_factory=list)
    curve: dict[str, list] = field(default_factory=_no_curve)
    steps: int | None = None
    seconds: float | None = None
    parameters: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    finished_at: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Record":
        """The record of a line. Fields that it lacks have their defaults, those unknown here are `more`.

        Raises:
            ValueError: it is no record of a run.
        """
        if "settings" not in line or "status" not in line:
            raise ValueError("no settings or status")
        if "key" not in line:
            raise ValueError("no key")
        own = {name: line[name] for name in NAMES if line.get(name) is not None}
        return cls(**own, more={name: value for name, value in line.items() if name not in NAMES})

    def to_json(self) -> dict[str, Any]:
        """The line of the record. A failed run has its error in front."""
        error = ("error", "traceback", "diverged_at_step") if self.status == "failed" else ("diverged_at_step", "error")
        names = ("key", "settings", "status", *error, "epochs", "curve", *FIGURES)
        values = {name: getattr(self, name) for name in names}
        known = {name: value for name, value in values.items() if name not in FIGURES or value not in (None, {})}
        return known | self.more

    def final(self, measure: str) -> float | None:
        """A measure of the last epoch on the validation images, such as `accuracy`; None unless the run finished."""
        return self.by_epoch(measure)[-1] if self.status == "finished" and self.epochs else None

    @property
    def metric(self) -> str:
        """The name of the metric that judges, without its module: `dice` of `my.measures:dice`."""
        return (self.settings.get("metrics") or ["accuracy"])[0].rpartition(":")[2]

    @property
    def result(self) -> float | None:
        """The metric that judges, of the last epoch on the validation data; None unless the run finished."""
        return self.final(self.metric)

    def by_epoch(self, measure: str) -> list[float | None]:
        """A measure of each epoch on the validation images; None where it was not taken."""
        return [(epoch.get("valid") or {}).get(measure) for epoch in self.epochs]

    @property
    def losses(self) -> list[tuple[int, float | None]]:
        """The training loss: pairs of step and loss; None where it is not finite."""
        return list(zip(self.curve["step"], self.curve["loss"], strict=True))


NAMES = tuple(one.name for one in fields(Record) if one.name != "more")

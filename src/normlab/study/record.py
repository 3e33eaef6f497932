"""What is kept of a run: a `Record`, which is a line of JSON in a store."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from ..errors import is_whole
from .plan import Trial

Status = Literal["finished", "diverged", "failed", "stopped"]

# A line has these only where they are known; the other fields are always there.
FIGURES = ("made_by", "steps", "seconds", "parameters", "versions", "machine", "finished_at")


def _no_curve() -> dict[str, list]:
    return {"step": [], "loss": []}


@dataclass(frozen=True)
class Record:
    """One run: what was run, what came of it, where and when; or why it was not made.

    Attributes:
        key: names the run in its store.
        settings: what was run; those of a trial are the fields of `Trial`.
        status: `finished`; `diverged` at a training loss that is not finite; `failed` with an error; or `stopped`: not
            made, since another setting beats this one clearly.
        diverged_at_step: the first step whose loss is not finite; None if there is none, or if it is not known.
        error: what stopped a run that failed, or why a run was not made, in a line.
        traceback: of that error.
        epochs: for each epoch its number (`epoch`), its `seconds`, and its figures by name in `train` and `valid`.
        curve: the training `loss`, and after which `step`.
        made_by: the code, data, versions and threads that made it, see `fingerprint`; empty if not known.
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
    made_by: dict[str, str] = field(default_factory=dict)
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
            ValueError: it is no record of a run, or a value is not of the kind that its field has.
        """
        if not isinstance(line, Mapping):
            raise ValueError(f"no object but {_short(line)}")
        own = {name: line[name] for name in NAMES if line.get(name) is not None}
        if "settings" not in own or "status" not in own:
            raise ValueError("no settings or status")
        if "key" not in own:
            raise ValueError("no key")
        more = {name: value for name, value in line.items() if name not in NAMES}
        for name, (fits, kind) in KINDS.items():
            if name in own and not fits(own[name]):
                raise ValueError(f"{name} is not {kind}: {_short(own[name])}")
        if not _is_activations(more.get("activations")):
            raise ValueError("activations are not lists of numbers by layer, as many as steps")
        if "norm" in own["settings"]:
            hash(Trial.from_dict(own["settings"]))
        return cls(**own, more=more)

    def to_json(self) -> dict[str, Any]:
        """The line of the record. What is long comes last; a failed run has its error in front."""
        error = ("error", "traceback", "diverged_at_step") if self.status == "failed" else ("diverged_at_step", "error")
        names = ("key", "settings", "status", *error, *FIGURES, "epochs", "curve")
        values = {name: getattr(self, name) for name in names}
        known = {name: value for name, value in values.items() if name not in FIGURES or value not in (None, {})}
        return known | self.more

    def final(self, measure: str) -> float | None:
        """A measure of the last epoch on the validation images, such as `accuracy`; None unless the run finished."""
        return _taken(self.epochs[-1], measure) if self.status == "finished" and self.epochs else None

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
        return [_taken(epoch, measure) for epoch in self.epochs]

    @property
    def losses(self) -> list[tuple[int, float | None]]:
        """The training loss: pairs of step and loss; None where it is not finite."""
        return list(zip(self.curve["step"], self.curve["loss"], strict=True))


@dataclass(frozen=True)
class Start:
    """A run was begun.

    Attributes:
        key: of the run.
        host: name of the machine of the process that began it, and that writes its record.
        process: the number of that process.
        started: date and time, as ISO 8601 writes them.
        where: the run is made, such as the name of another machine; empty if in that process.
    """

    key: str
    host: str
    process: int
    started: str
    where: str = ""

    @classmethod
    def from_json(cls, line: Mapping[str, Any]) -> "Start":
        """The start of a line.

        Raises:
            ValueError: a field is missing or not of its kind.
        """
        values = {one.name: line.get(one.name, "") for one in fields(cls)}
        process = values.pop("process")
        if not (all(map(_is_text, values.values())) and is_whole(process) and line.get("host")):
            raise ValueError("a start needs key, host, process and started")
        return cls(**values, process=process)  # pyright: ignore[reportArgumentType]


NAMES = tuple(one.name for one in fields(Record) if one.name != "more")
STATUSES = get_args(Status)
NUMBERS = {int, float, type(None)}
BOUND = 1e150  # of what is kept of numbers: the sum of their squares is finite


def _taken(epoch: Mapping[str, Any], measure: str) -> float | None:
    return (epoch.get("valid") or {}).get(measure)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, value.values()))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < BOUND


def _is_numbers(values: Iterable[Any]) -> bool:
    """Whether each is a number within the bound, or None."""
    values = list(values)
    return NUMBERS.issuperset(map(type, values)) and all(
        -BOUND < value < BOUND for value in values if value is not None
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and _is_numbers(value)


def _is_steps(value: Any) -> bool:
    return isinstance(value, list) and {int}.issuperset(map(type, value))


def _is_epoch(value: Any) -> bool:
    if not isinstance(value, dict) or not _is_numbers((value.get("epoch"), value.get("seconds"))):
        return False
    parts = [value[part] for part in ("train", "valid") if value.get(part) is not None]
    return all(isinstance(part, dict) and _is_numbers(part.values()) for part in parts)


def _is_curve(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    step, loss = value.get("step"), value.get("loss")
    return _is_steps(step) and _is_list(loss) and len(step) == len(loss)  # pyright: ignore[reportArgumentType]


def _is_activations(value: Any) -> bool:
    """Whether it is what `run_trial` adds, or None."""
    if value is None:
        return True
    if not isinstance(value, dict) or not _is_steps(value.get("step")):
        return False
    looks, figures = len(value["step"]), [layers for name, layers in value.items() if name != "step"]
    return all(
        isinstance(layers, dict) and all(_is_list(one) and len(one) == looks for one in layers.values())
        for layers in figures
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


KINDS = {
    "key": (_is_text, "a text"),
    "settings": (lambda value: isinstance(value, dict), "an object"),
    "status": (lambda value: value in STATUSES, f"one of {', '.join(STATUSES)}"),
    "diverged_at_step": (is_whole, "a whole number"),
    "error": (_is_text, "a text"),
    "traceback": (_is_text, "a text"),
    "epochs": (lambda value: isinstance(value, list) and all(map(_is_epoch, value)), "a list of numbers by epoch"),
    "curve": (_is_curve, "two lists of one length, numbers of step and loss"),
    "made_by": (_is_texts, "an object of texts"),
    "steps": (is_whole, "a whole number"),
    "seconds": (_is_number, "a number"),
    "parameters": (is_whole, "a whole number"),
    "versions": (_is_texts, "an object of texts"),
    "machine": (lambda value: isinstance(value, dict), "an object"),
    "finished_at": (_is_text, "a text"),
}

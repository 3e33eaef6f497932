"""What a study runs: a `Trial` has the settings of one training run, a `Plan` has those of all."""

import hashlib
import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Suppress, arg

from ..errors import InputError, check, is_real, is_whole, unknown
from .schedules import SCHEDULES

# A text under a field is its help on the command line too.

Names = Annotated[list[str], arg(metavar="NAME ...")]
WholeNumbers = Annotated[list[int], arg(metavar="INT ...")]
Numbers = Annotated[list[float], arg(metavar="FLOAT ...")]
PLAN = "plan.toml"  # in the folder of a study
PRECISIONS = ("float32", "bfloat16", "float16")

# Settings that came later than stored records.
LATER = ("optimizer", "steps", "weight_decay", "precision", "loss", "metrics", "lower", "task")


@dataclass(frozen=True)
class Varied:
    """The settings that a comparison varies."""

    norm: str = "running"
    """Registered name of the norm (normlab list)."""
    batch_size: int = 2
    """Images a step: the true batch of statistics and gradient."""
    lr: float = 0.4
    """Learning rate; its peak where the schedule moves it."""
    seed: int = 0
    """Of the initial weights and of the order of the images."""
    optimizer: str = "sgd"
    """Name of the optimizer (normlab list), or module:name of one of your own."""
    schedule: str = "constant"
    """How the learning rate moves (normlab list)."""
    clip: float | None = None
    """Bound on the norm of the whole gradient; None for no clipping."""


@dataclass(frozen=True)
class Shared:
    """The settings that all runs of a comparison share."""

    epochs: int = 1
    """Passes over the training images."""
    data: str = "mnist"
    """Name of the data set (normlab list), or module:name of a function that makes your own."""
    model: str = "convnet"
    """Name of the network (normlab list), or module:name of a function that makes your own."""
    images: int | None = None
    """How many training images are used, the first ones; None for all."""
    steps: int | None = None
    """Steps of an epoch, going through the data again or not to its end; None for one pass."""
    weight_decay: float = 0.0
    """Of weights; norms and biases are spared."""
    precision: str = "float32"
    """Of forward pass and loss: float32, bfloat16 or float16."""
    loss: str | None = None
    """module:name of the loss, a function of output and targets; None for cross entropy."""
    metrics: Annotated[tuple[str, ...], arg(metavar="NAME ...")] = ("accuracy",)
    """Measures on the validation data: accuracy, dice, mean_iou, loss, or module:name. The first one judges."""
    lower: bool = False
    """Whether less of the first metric is better."""


@dataclass(frozen=True)
class Trial(Shared, Varied):  # fields in the order norm … clip, epochs … lower, task: those of the last base come first
    """The settings of one training run; equal settings have equal keys.

    Raises:
        InputError: a value is out of range.
    """

    task: str | None = None
    """What else a study does, in its own words; None where norm, data and network say it all."""

    def __post_init__(self) -> None:
        for name in ("norm", "data", "model", "optimizer", "schedule"):
            check(isinstance(getattr(self, name), str), name, getattr(self, name), "a name (normlab list)")
        check(is_whole(self.batch_size, 1), "batch_size", self.batch_size, "a whole number from 1")
        check(is_real(self.lr) and 0 < self.lr < float("inf"), "lr", self.lr, "a number above 0")
        check(is_whole(self.seed), "seed", self.seed, "a whole number from 0")
        check(is_whole(self.epochs, 1), "epochs", self.epochs, "a whole number from 1")
        images, clip, task = self.images, self.clip, self.task
        check(images is None or is_whole(images, 1), "images", images, "a whole number from 1, or None for all")
        check(clip is None or (is_real(clip) and clip > 0), "clip", clip, "a number above 0, or None for no clipping")
        check(task is None or isinstance(task, str), "task", task, "words, or None")
        check(self.steps is None or is_whole(self.steps, 1), "steps", self.steps, "a whole number from 1, or None")
        decay = self.weight_decay
        check(is_real(decay) and 0 <= decay < float("inf"), "weight_decay", decay, "a number from 0")
        if self.precision not in PRECISIONS:
            raise unknown("precision", self.precision, PRECISIONS)
        check(self.loss is None or isinstance(self.loss, str), "loss", self.loss, "module:name, or None")
        names = self.metrics
        listed = isinstance(names, list | tuple) and bool(names) and all(isinstance(name, str) for name in names)
        check(listed, "metrics", names, "a list of names")
        object.__setattr__(self, "metrics", tuple(names))
        check(isinstance(self.lower, bool), "lower", self.lower, "True or False")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name these settings in a store."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Trial":
        """The trial of a stored record; settings of another version that are not known here are ignored."""
        return cls(**{name: settings[name] for name in DEFAULTS if name in settings})

    def to_dict(self) -> dict[str, Any]:
        """The settings for a record. Those of `LATER` at their default are left out, as in records from before them."""
        values = {name: getattr(self, name) for name in DEFAULTS}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if name not in LATER or value != DEFAULTS[name]
        }


DEFAULTS = {one.name: one.default for one in fields(Trial)}


@dataclass(frozen=True)
class Several:
    """The values that a study combines."""

    norms: Names = field(default_factory=lambda: ["none", "batch", "group", "layer", "instance", "running"])
    """Registered names of the norms (normlab list)."""
    batch_sizes: WholeNumbers = field(default_factory=lambda: [2, 32, 512])
    """Images a step."""
    lrs: Numbers = field(default_factory=lambda: [0.4])
    """Learning rates; their peaks where the schedule moves them."""
    seeds: WholeNumbers = field(default_factory=lambda: [0])
    """Seeds; the table shows the mean over them, and how sure it is."""
    optimizers: Names = field(default_factory=lambda: ["sgd"])
    """Names of the optimizers (normlab list), or module:name of your own."""
    schedules: Names = field(default_factory=lambda: ["constant"])
    """How the learning rate moves (normlab list)."""
    clips: Annotated[list[float | None], arg(metavar="FLOAT|None ...")] = field(default_factory=lambda: [None])
    """Bounds on the norm of the whole gradient; None for no clipping."""


@dataclass(frozen=True)
class Plan(Shared, Several):
    """A study: every combination of what varies, with the same other settings; or a list of settings, times the seeds.

    Example:
        >>> plan = Plan(norms=["batch", "running"], batch_sizes=[2], lrs=[0.1], seeds=[0, 1, 2])
        >>> len(plan.trials())
        6
    """

    settings: Annotated[list[dict[str, Any]], Suppress] = field(default_factory=list)
    """In place of the combinations: of each setting what varies, by the singular names (`norm`, `lr`, …).

    A setting may have `seeds` of its own.
    """
    stop_beaten: bool = False
    """Whether a setting that another one of its norm clearly beats at three seeds or more gets no further seeds."""

    def trials(self) -> list[Trial]:
        """The runs, each once.

        Raises:
            InputError: an empty list, or a value out of range.
        """
        return list(self._trials)

    @cached_property
    def _trials(self) -> list[Trial]:
        check(isinstance(self.stop_beaten, bool), "stop_beaten", self.stop_beaten, "True or False")
        if not self.settings:
            lists = self.norms, self.batch_sizes, self.lrs, self.seeds
            return grid(*lists, self, self.optimizers, self.schedules, self.clips)
        shared = {one.name: getattr(self, one.name) for one in fields(Shared)}
        names = [*(one.name for one in fields(Varied) if one.name != "seed"), "seeds"]
        trials = []
        check_list("settings", self.settings)
        for setting in self.settings:
            check(isinstance(setting, dict), "settings", setting, "a list of tables", 'Write [{norm = "batch"}].')
            for name in setting:
                if name not in names:
                    raise unknown("settings: key", name, names)
            seeds = setting.get("seeds", self.seeds)
            check_list("seeds", seeds)
            own = {name: value for name, value in setting.items() if name != "seeds"}
            trials += [Trial(**shared, **own, seed=seed) for seed in seeds]
        return list(dict.fromkeys(trials))

    @classmethod
    def read(cls, path: str | Path) -> "Plan":
        """The plan of a TOML file, which has the names of the fields as keys.

        Raises:
            InputError: there is no such file, it is no TOML, or a key or value is not one of a plan.
        """
        try:
            values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}. Give the TOML file of a plan.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{path} is no TOML: {error}. Mend it there.") from error
        names = [one.name for one in fields(cls)]
        for name in values:
            if name not in names:
                raise unknown(f"{path}: key", name, names)
        if isinstance(values.get("metrics"), list):
            values["metrics"] = tuple(values["metrics"])
        if isinstance(values.get("clips"), list):  # TOML has no None
            values["clips"] = [None if value == "none" else value for value in values["clips"]]
        plan = cls(**values)
        plan.trials()
        return plan

    def to_toml(self) -> str:
        """The text of a file that `read` takes; settings at their default are left out."""
        default = type(self)()
        varied = {"seeds"} if self.settings else {"norms", "batch_sizes", "lrs", "seeds"}
        values = {one.name: getattr(self, one.name) for one in fields(Plan) if one.name != "settings"}
        values["clips"] = ["none" if value is None else value for value in self.clips]
        chosen = {n: value for n, value in values.items() if n in varied or getattr(self, n) != getattr(default, n)}
        rows = ["    {" + ", ".join(_pairs(one)) + "},\n" for one in self.settings]
        settings = ["\nsettings = [\n", *rows, "]\n"] if rows else []
        return "".join([f"{pair}\n" for pair in _pairs(chosen)] + settings)


def _pairs(values: Mapping[str, Any]) -> list[str]:
    """A text, number or list is written in TOML as in JSON; there is no None."""
    return [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]


def grid(
    norms: Sequence[str],
    batch_sizes: Sequence[int],
    lrs: Sequence[float],
    seeds: Sequence[int],
    shared: Shared,
    optimizers: Sequence[str] | None = None,
    schedules: Sequence[str] | None = None,
    clips: Sequence[float | None] | None = None,
) -> list[Trial]:
    """Every combination of the lists, each with the settings in `shared`, without repetition.

    Raises:
        InputError: an empty list, or a value out of range.
    """
    base = shared if isinstance(shared, Trial) else Trial(**{f.name: getattr(shared, f.name) for f in fields(Shared)})
    lists = {
        "batch_sizes": batch_sizes,
        "norms": norms,
        "lrs": lrs,
        "optimizers": [base.optimizer] if optimizers is None else optimizers,
        "schedules": [base.schedule] if schedules is None else schedules,
        "clips": [base.clip] if clips is None else clips,
        "seeds": seeds,
    }
    for name, values in lists.items():
        check_list(name, values)
    names = [name.removesuffix("s") for name in lists]
    shared_values = {name: getattr(base, name) for name in DEFAULTS if name not in names}
    combinations = itertools.product(*lists.values())
    trials = (Trial(**shared_values, **dict(zip(names, one, strict=True))) for one in combinations)
    return list(dict.fromkeys(trials))


def check_list(name: str, values: Any) -> None:
    """Raise an InputError unless `values` is a list with something in it."""
    several = isinstance(values, list | tuple | range)
    check(several, name, values, "a list", "" if several else f"Write {name}=[{values!r}].")
    check(len(values) > 0, name, values, "one value or more")

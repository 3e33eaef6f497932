"""What a study runs: one `Trial` is one training run, a `Plan` the grid of them."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, fields

from ..errors import check, is_real, is_whole, unknown

SCHEDULES = ("constant", "one-cycle", "linear")


@dataclass(frozen=True)
class Trial:
    """The settings of one training run; equal settings have equal keys.

    Attributes:
        norm: registered name of the norm (`normlab list`).
        batch_size: images a step, the statistics' and the gradient's true batch.
        lr: learning rate; the peak where `schedule` moves it.
        seed: of the initial weights and of the order of the images.
        epochs: passes over the training images.
        schedule: `constant`; `one-cycle` (cosine up over the first quarter, then down to nothing);
            `linear` (straight down to a fifth).
        data: name of the data set.
        model: name of the network.
        images: how many training images are used, the first ones; all of them if None.
        clip: bound on the norm of the whole gradient; none if None.
    """

    norm: str = "running"
    batch_size: int = 2
    lr: float = 0.4
    seed: int = 0
    epochs: int = 1
    schedule: str = "constant"
    data: str = "mnist"
    model: str = "convnet"
    images: int | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        for name in ("norm", "data", "model"):
            check(isinstance(getattr(self, name), str), name, getattr(self, name), "a name (normlab list)")
        check(is_whole(self.batch_size, 1), "batch_size", self.batch_size, "a whole number from 1")
        check(is_real(self.lr) and 0 < self.lr < float("inf"), "lr", self.lr, "a number above 0")
        check(is_whole(self.seed), "seed", self.seed, "a whole number from 0")
        check(is_whole(self.epochs, 1), "epochs", self.epochs, "a whole number from 1")
        images, clip = self.images, self.clip
        check(images is None or is_whole(images, 1), "images", images, "a whole number from 1, or none for all")
        check(clip is None or (is_real(clip) and clip > 0), "clip", clip, "a number above 0, or none for no clipping")
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that name these settings in a store."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @classmethod
    def from_dict(cls, settings: dict) -> "Trial":
        """The trial of a stored record; settings of another version that are not known here are ignored."""
        return cls(**{f.name: settings[f.name] for f in fields(cls) if f.name in settings})


def grid(norms: list[str], batch_sizes: list[int], lrs: list[float], seeds: list[int], base: Trial) -> list[Trial]:
    """Every combination of the four lists, each with the other settings of `base`, without repetition.

    Raises:
        InputError: an empty list, or a value out of range.
    """
    for name, values in {"norms": norms, "batch_sizes": batch_sizes, "lrs": lrs, "seeds": seeds}.items():
        several = isinstance(values, list | tuple | range)
        check(several, name, values, "a list", "" if several else f"Write {name}=[{values!r}].")
        check(bool(values), name, values, "one value or more")
    rest = asdict(base)
    combinations = itertools.product(batch_sizes, norms, lrs, seeds)
    trials = (Trial(**{**rest, "norm": n, "batch_size": b, "lr": lr, "seed": s}) for b, n, lr, s in combinations)
    return list(dict.fromkeys(trials))

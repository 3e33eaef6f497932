"""What the plans here train: networks that batch norm trained at batch 64, images of another kind, and ten ways.

    python studies/finetune/task.py

trains the two networks as the plans in `train-camera` and `train-classes` say, and keeps them in `runs/finetune`. The
other plans go on with them. A norm in those plans is one of `WAYS`.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

import normlab
from normlab.data import ImageData, TensorBatches, load_dataset
from normlab.errors import InputError, unknown
from normlab.models import build_model
from normlab.nn import BatchNorm2d
from normlab.study.plan import Plan
from normlab.study.trial import build_learner

Batches = tuple[TensorBatches, TensorBatches]

FOLDER = Path(__file__).parent
NETWORKS = FOLDER.parents[1] / "runs" / "finetune"
TRAINED_ON, IMAGES = 40_000, 2_000  # images of training, and others of fine-tuning
TO_CHOOSE, TO_JUDGE = 2_000, 5_000  # images held out, for screening and for confirmation
SCREENING = 0  # the seed that chooses rates, by validation images; other seeds judge, by test images
VALID_BATCH = 250


WAYS = (
    "as is", "frozen", "frozen, γ and β learn", "frozen, recalibrated",
    "group", "group, fitted", "running", "running, recalibrated",
    "running_instance", "running_instance, fitted",
)  # fmt: skip


def change(model: nn.Module, way: str, images: Tensor) -> None:
    """Give the model the norms of one of `WAYS`. README.md says what each does."""
    kind, _, more = way.partition(", ")
    if more == "recalibrated":
        normlab.recalibrate(model, images[:1000].split(VALID_BATCH))
    if kind == "frozen":
        normlab.freeze(model, affine=not more, inplace=True)
    elif kind != "as is":
        fit = {"batches": images.split(VALID_BATCH), "fit": True} if more == "fitted" else {}
        normlab.convert(model, kind, inplace=True, **fit)


@dataclass(frozen=True)
class Case:
    """A network of `model` trained on `source`, to be fine-tuned on `target`."""

    model: str
    source: str
    target: str
    new_classes: bool = False
    other_camera: bool = False

    @property
    def file(self) -> Path:
        return NETWORKS / f"{self.source}-{self.model}.pt"

    def make_untrained(self, norm: str = "batch") -> nn.Module:
        """A network with torch's own batch norm."""
        model = build_model(self.model, "batch", num_classes=10, in_channels=1)
        for name, layer in list(model.named_modules()):
            if isinstance(layer, BatchNorm2d):
                model.set_submodule(name, nn.BatchNorm2d(layer.num_features))
        return model

    def make_model(self, norm: str, seed: int) -> nn.Module:
        """The trained network, made ready for the images of the seed."""
        if norm not in WAYS:
            raise unknown("norm", norm, WAYS)
        model = self.trained()
        change(model, norm, self.images(seed)[0])
        return model

    def trained(self) -> nn.Module:
        """The network that `main` kept. Where classes are new, so is its last layer, drawn from torch's global seed."""
        if not self.file.exists():
            raise InputError(f"{self.file} is missing. Train it: python studies/finetune/task.py")
        model, state = self.make_untrained(), torch.load(self.file, weights_only=True)
        last = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)][-1]
        kept = {name: value for name, value in state.items() if not (self.new_classes and name.startswith(f"{last}."))}
        model.load_state_dict(kept, strict=not self.new_classes)
        return model

    def make_source(self, batch_size: int, seed: int) -> Batches:
        """What the network is trained on, and the validation images."""
        data = images_of(self.source, "validation")
        x, x_valid = self.normalized(data.x_train[:TRAINED_ON]), self.normalized(data.x_valid)
        return batches(x, data.y_train[:TRAINED_ON], x_valid, data.y_valid, batch_size, seed)

    def make_data(self, batch_size: int, seed: int) -> Batches:
        return batches(*self.images(seed), batch_size, seed)

    def images(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A seed's own images to train on, and images held out. No network was trained on any of them."""
        data = images_of(self.target, "validation" if seed == SCREENING else "test")
        generator = torch.Generator().manual_seed(seed)
        drawn = TRAINED_ON + torch.randperm(len(data.x_train) - TRAINED_ON, generator=generator)[:IMAGES]
        held_out = slice(TO_CHOOSE if seed == SCREENING else TO_JUDGE)
        x, x_held_out = (self.seen(part, generator) for part in (data.x_train[drawn], data.x_valid[held_out]))
        return x, data.y_train[drawn], x_held_out, data.y_valid[held_out]

    def seen(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Another camera's images are dark on a light ground, with less contrast, and noise."""
        if self.other_camera:
            images = (0.9 - 0.6 * images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
        return self.normalized(images)

    def normalized(self, images: Tensor) -> Tensor:
        """By mean and deviation of the images that the network was trained on."""
        trained_on = images_of(self.source, "validation").x_train[:TRAINED_ON]
        return (images - trained_on.mean()) / trained_on.std()


@lru_cache(maxsize=3)
def images_of(name: str, held_out: str) -> ImageData:
    return load_dataset(name, held_out=held_out)


def batches(x: Tensor, y: Tensor, x_held_out: Tensor, y_held_out: Tensor, batch_size: int, seed: int) -> Batches:
    train = TensorBatches(x, y, batch_size, shuffle=True, seed=seed)
    return train, TensorBatches(x_held_out, y_held_out, VALID_BATCH)


CAMERA = Case("resnet", "fashion_mnist", "fashion_mnist", other_camera=True)
CLASSES = Case("convnet", "mnist", "fashion_mnist", new_classes=True)
CASES = {"camera": CAMERA, "classes": CLASSES}

# What the plans name.
camera_untrained, camera_source = CAMERA.make_untrained, CAMERA.make_source
camera_model, camera_data = CAMERA.make_model, CAMERA.make_data
classes_untrained, classes_source = CLASSES.make_untrained, CLASSES.make_source
classes_model, classes_data = CLASSES.make_model, CLASSES.make_data


def main() -> None:
    torch.set_num_threads(1)
    for name, case in CASES.items():
        if not case.file.exists():
            (trial,) = Plan.read(FOLDER / f"train-{name}" / "plan.toml").trials()
            learner = build_learner(trial)
            learner.fit(trial.epochs)
            NETWORKS.mkdir(parents=True, exist_ok=True)
            torch.save(learner.model.state_dict(), case.file)


if __name__ == "__main__":
    main()

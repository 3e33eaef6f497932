"""Two looks at causes: `python studies/finetune/why.py` prints what README.md says of them."""

import torch
from task import CAMERA, CLASSES, FOLDER, change
from torch import nn

from normlab.study.plan import Plan
from normlab.study.summary import Spread
from normlab.study.trial import build_learner
from normlab.training import accuracy


def show_recalibrated() -> None:
    """The loss of the main case's network on its new images, before and after `recalibrate`."""
    x, y, _, _ = CAMERA.images(seed=0)
    model = CAMERA.trained()
    print(f"old statistics: loss {loss(model.eval(), x[:1000], y[:1000]):.2f}")
    change(model, "frozen, recalibrated", x)
    print(f"recalibrated: loss {loss(model.eval(), x[:1000], y[:1000]):.2f}")
    print(f"statistics of the batch itself: loss {loss(CAMERA.trained().train(), x[:1000], y[:1000]):.2f}")


def show_statistics() -> None:
    """The test accuracy of running batch norm in the second case: as it is, and recalibrated after training."""
    trials = Plan.read(FOLDER / "confirm-classes" / "plan.toml").trials()
    for batch_size, lr in ((2, 0.003), (2, 0.01), (1, 0.003)):
        own, measured = [], []
        for trial in trials:
            if (trial.norm, trial.batch_size, trial.lr) != ("running", batch_size, lr):
                continue
            learner = build_learner(trial)
            learner.fit(trial.epochs)
            x, _, x_test, y_test = CLASSES.images(trial.seed)
            own.append(share_right(learner.model, x_test, y_test))
            change(learner.model, "as is, recalibrated", x)
            measured.append(share_right(learner.model, x_test, y_test))
        print(f"batch {batch_size}, rate {lr}: running {Spread.of(own)}, measured {Spread.of(measured)}")


def loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y).item()


def share_right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return accuracy(model.eval()(x), y).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    show_recalibrated()
    show_statistics()

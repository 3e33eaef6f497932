"""A trained net, fine-tuned at batch 2: what to do with its batch norms? Runs in a minute on a CPU.

    python examples/finetune.py

The net learns MNIST at batch 64, then sees digits that are inverted. Put your own net and data in `trained` and `main`.
"""

import copy
import dataclasses

import torch

import normlab
from normlab.data import ImageData, TensorBatches, load_dataset
from normlab.models import build_model
from normlab.training import Learner, Metrics, accuracy

CHOICES = {
    "as it is": lambda net: net,
    "frozen": lambda net: normlab.freeze(net).model,
    "running": lambda net: normlab.convert(net, "running").model,
    "group": lambda net: normlab.convert(net, "group").model,
}


def learn(net: torch.nn.Module, images: ImageData, batch_size: int, lr: float, few: int) -> float:
    """One epoch of the first `few` images; the accuracy on those held out."""
    torch.manual_seed(0)
    learner = Learner(
        net,
        TensorBatches(images.x_train[:few], images.y_train[:few], batch_size=batch_size, shuffle=True),
        TensorBatches(images.x_valid, images.y_valid, batch_size=256),
        optimizer=torch.optim.SGD(net.parameters(), lr=lr),
        callbacks=[Metrics(accuracy=accuracy)],
    )
    return learner.fit(1)[-1]["valid"]["accuracy"]


def main() -> None:
    mnist = load_dataset("mnist")
    torch.manual_seed(0)
    net = build_model("convnet", norm="batch", num_classes=10)
    print(f"trained at batch 64: {learn(net, mnist, batch_size=64, lr=0.2, few=20_000):.3f}")
    inverted = dataclasses.replace(mnist, x_train=1 - mnist.x_train, x_valid=1 - mnist.x_valid)
    for name, prepare in CHOICES.items():
        found = learn(prepare(copy.deepcopy(net)), inverted, batch_size=2, lr=0.01, few=2_000)
        print(f"{name:10}{found:.3f} after 1,000 steps of two inverted images", flush=True)


if __name__ == "__main__":
    main()

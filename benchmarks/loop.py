"""What a training loop costs beside the arithmetic: normlab's learner and its peers against a hand-written loop.

    python benchmarks/loop.py [--out benchmarks/results/loop.json]

Two cases. `batch 2`: a small network with batch norm on batches that are cut beforehand, so that nothing but the loop
differs; every loop but the hand-written one keeps the running mean of loss and accuracy, as its library does it, and
normlab's records loss and learning rate of each step too. `batch 512`: an epoch over 5,120 images of the lesson's net,
whose hand-written loop shuffles and slices by itself and keeps no figures. Each loop and the hand-written one run in
short pairs, so that both see the same machine; the figures are medians and quartiles of what each pair says. Peers
that are not installed are left out (ignite: pytorch-ignite; Lightning and its Fabric: lightning; accelerate; fastai).
Run it on an idle machine.
"""

import argparse
import json
import logging
import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.data import TensorBatches, load_dataset
from normlab.models import build_model
from normlab.study.trial import environment
from normlab.training import Learner, Metrics, Recorder, accuracy

Batches = list[tuple[Tensor, Tensor]]
Loop = Callable[[nn.Module, Batches], None]
IMAGES, PAIRS, LR = 5120, 200, 0.01


def small_net() -> nn.Module:
    """784 → 50 → 10 with batch norm."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(784, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 10))


def by_hand(model: nn.Module, batches: Batches) -> None:
    """No more than it takes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model.train()
    for x, y in batches:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def normlab(model: nn.Module, batches: Batches) -> None:
    """The learner with metrics and recorder."""
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    Learner(model, batches, optimizer=optimizer, callbacks=[Metrics(accuracy=accuracy), Recorder()]).fit(1)


def ignite(model: nn.Module, batches: Batches) -> None:
    from ignite.engine import create_supervised_trainer
    from ignite.metrics import Accuracy, Average

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    transform = lambda x, y, y_pred, loss: (loss.detach(), y_pred, y)  # noqa: E731
    trainer = create_supervised_trainer(model, optimizer, F.cross_entropy, output_transform=transform)
    Average(output_transform=lambda out: out[0]).attach(trainer, "loss")
    Accuracy(output_transform=lambda out: (out[1], out[2])).attach(trainer, "accuracy")
    trainer.run(batches, max_epochs=1)


class OneLoader:
    """The batches as one loader: Lightning takes a list for several."""

    def __init__(self, batches: Batches):
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def lightning(model: nn.Module, batches: Batches) -> None:
    import lightning as L
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.loss, self.accuracy = model, MeanMetric(), MulticlassAccuracy(10, average="micro")

        def training_step(self, batch, batch_idx):
            x, y = batch
            output = self.model(x)
            loss = F.cross_entropy(output, y)
            self.loss.update(loss.detach())
            self.accuracy.update(output.detach(), y)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR)

    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), OneLoader(batches))


def fabric(model: nn.Module, batches: Batches) -> None:
    from lightning.fabric import Fabric
    from torchmetrics import MeanMetric
    from torchmetrics.classification import MulticlassAccuracy

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=LR))
    mean, accuracy = MeanMetric(), MulticlassAccuracy(10, average="micro")
    model.train()
    for x, y in batches:
        output = model(x)
        loss = F.cross_entropy(output, y)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        mean.update(loss.detach())
        accuracy.update(output.detach(), y)


def accelerate(model: nn.Module, batches: Batches) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=LR))
    losses, right = torch.zeros(()), torch.zeros(())
    model.train()
    for x, y in batches:
        with accelerator.accumulate(model):
            output = model(x)
            loss = F.cross_entropy(output, y)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses += loss.detach()
        right += (output.detach().argmax(1) == y).sum()


def fastai(model: nn.Module, batches: Batches) -> None:
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner as FastaiLearner
    from fastai.metrics import accuracy as fastai_accuracy
    from fastai.optimizer import SGD

    data = DataLoaders(batches, batches[:1])
    learner = FastaiLearner(data, model, F.cross_entropy, SGD, LR, metrics=fastai_accuracy)
    with learner.no_logging():
        learner.fit(1)


def installed(loops: dict[str, Loop]) -> dict[str, Loop]:
    """Those that run."""
    found = {}
    for name, loop in loops.items():
        try:
            loop(small_net(), [(torch.randn(2, 784), torch.tensor([0, 1]))] * 2)
        except ImportError as error:
            print(f"{name}: left out ({error})")
        else:
            found[name] = loop
    return found


def beyond_by_hand(loop: Loop, pairs: int, steps: int) -> dict:
    """What `loop` takes beyond the hand-written one, from pairs of runs one right after the other."""
    batches = [(torch.randn(2, 784), torch.randint(0, 10, (2,))) for _ in range(steps)]
    times: dict[Loop, list[float]] = {by_hand: [], loop: []}
    for number in range(pairs):
        for one in (by_hand, loop) if number % 2 else (loop, by_hand):
            model = small_net()
            start = time.perf_counter()
            one(model, batches)
            times[one].append((time.perf_counter() - start) / steps * 1e6)
    beyond = [mine - plain for mine, plain in zip(times[loop], times[by_hand], strict=True)]
    return {
        "pairs": pairs,
        "steps": steps,
        "us_per_step": statistics.median(times[loop]),
        "us_beyond_by_hand": statistics.median(beyond),
        "quartiles_beyond": statistics.quantiles(beyond, n=4)[::2],
    }


def batch_2() -> dict:
    """Microseconds a step beyond the hand-written loop, at batch 2; peers run long, because they take long to start."""
    peers = installed(
        {"ignite": ignite, "lightning": lightning, "fabric": fabric, "accelerate": accelerate, "fastai": fastai}
    )
    figures = {"normlab": beyond_by_hand(normlab, pairs=PAIRS, steps=200)}
    return figures | {name: beyond_by_hand(loop, pairs=11, steps=2000) for name, loop in peers.items()}


def batch_512() -> dict:
    """Ratio of a short training epoch of the lesson's net to the same in a hand-written loop, at batch 512."""
    data = load_dataset("mnist")
    x, y = data.x_train[:IMAGES], data.y_train[:IMAGES]

    def plain(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        model.train()
        order = torch.randperm(len(x))
        for begin in range(0, len(x), 512):
            chosen = order[begin : begin + 512]
            loss = F.cross_entropy(model(x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def learner(model: nn.Module) -> None:
        normlab(model, TensorBatches(x, y, 512, shuffle=True))  # pyright: ignore[reportArgumentType]

    clocks = {"elapsed": time.perf_counter, "processor": time.process_time}
    ratios: dict[str, list[float]] = {name: [] for name in clocks}
    for number in range(PAIRS):
        seconds = {}
        for loop in (plain, learner) if number % 2 else (learner, plain):
            model = build_model("convnet", "batch", 10)
            start = {name: clock() for name, clock in clocks.items()}
            loop(model)
            seconds[loop] = {name: clock() - start[name] for name, clock in clocks.items()}
        for name in clocks:
            ratios[name].append(seconds[learner][name] / seconds[plain][name])
    return {
        "images": IMAGES,
        "pairs": PAIRS,
        "ratio": {name: statistics.median(values) for name, values in ratios.items()},
        "ratio_quartiles": {name: statistics.quantiles(values, n=4)[::2] for name, values in ratios.items()},
    }


def main() -> None:
    """Measure, print, and add a JSON line to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "loop.jsonl")
    out = parser.parse_args().out
    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    result = {**environment(), "batch_2": batch_2(), "batch_512": batch_512()}
    for name, figures in result["batch_2"].items():
        low, high = figures["quartiles_beyond"]
        beyond = figures["us_beyond_by_hand"]
        print(
            f"batch 2    {name:<10} {figures['us_per_step']:7.1f} µs a step, {beyond:+7.1f} ({low:+.1f} … {high:+.1f})"
        )
    case = result["batch_512"]
    for name, (low, high) in case["ratio_quartiles"].items():
        ratio = f"{case['ratio'][name]:.3f} of the hand-written one ({low:.3f} … {high:.3f})"
        print(f"batch 512  epoch {ratio}, {name} time")
    with open(out, "a") as file:
        file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

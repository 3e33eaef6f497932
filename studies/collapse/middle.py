"""Converted in the middle of a training: a net trains three epochs with batch norm, and three with another norm.

    python studies/collapse/middle.py --out studies/collapse/middle.jsonl
    python studies/collapse/middle.py --out studies/collapse/middle.jsonl --net segresnet --optimizer momentum
    python studies/collapse/middle.py --out studies/collapse/middle.jsonl --net segresnet_3d
    python studies/collapse/middle.py --out studies/collapse/middle.jsonl --net vnet

AdamW at 0.003, or SGD with momentum 0.9 at 0.03; batch 2, no clipping. A run is a line of the file; runs that are there
are not made again. The table goes to the terminal.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))

import task

import normlab
from normlab.study.lines import LineStore

NORMS, EPOCHS, BATCH = ("batch", "running", "running_instance"), 6, 2
IMAGES = {"standardised": task.make_standardised, "raw": task.make_raw}
VOLUMES = {"standardised": task.make_standardised_3d, "raw": task.make_raw_3d}
NETS = {"segresnet": task.make_segresnet, "segresnet_3d": task.make_segresnet_3d, "vnet": task.make_vnet}
RATES = {"adamw": 0.003, "momentum": 0.03}
CASE = ("net", "optimizer", "images", "norm", "seed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/middle.jsonl"))
    parser.add_argument("--net", choices=NETS, default="segresnet")
    parser.add_argument("--optimizer", choices=RATES, default="adamw")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(6))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = LineStore(arguments.out)
    done = [{name: line[name] for name in CASE} for line in store.read(dict)]
    for images, make in (VOLUMES if arguments.net.endswith("3d") else IMAGES).items():
        train, valid = make()
        for norm in NORMS:
            for seed in arguments.seeds:
                one: dict[str, Any] = dict(
                    zip(CASE, (arguments.net, arguments.optimizer, images, norm, seed), strict=True)
                )
                if one not in done:
                    store.append({**one, "dice": run(train, valid, **one)})
    show(store.read(dict))


def run(train, valid, net: str, optimizer: str, images: str, norm: str, seed: int) -> list[float]:
    """Dice after each epoch."""
    torch.manual_seed(seed)
    model: nn.Module = make_net(net)
    lr = RATES[optimizer]
    adamw, sgd = partial(torch.optim.AdamW, weight_decay=0.01), partial(torch.optim.SGD, momentum=0.9)
    steps_by = (adamw if optimizer == "adamw" else sgd)(model.parameters(), lr)
    loader = DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    found, step, steps = [], 0, EPOCHS * len(loader)
    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2 and norm != "batch":
            normlab.convert(model, norm, inplace=True, optimizer=steps_by)
        model.train()
        for batch in loader:
            for group in steps_by.param_groups:
                group["lr"] = lr * (1 - step / steps) ** 0.9
            steps_by.zero_grad()
            task.loss(model(as_tensor(batch["image"])), as_tensor(batch["label"])).backward()
            steps_by.step()
            step += 1
        found.append(judge(model.eval(), valid))
    return found


@torch.no_grad()
def judge(model: nn.Module, valid) -> float:
    """The Dice score of images held out."""
    scores = [task.dice(model(as_tensor(one["image"])), as_tensor(one["label"])) for one in DataLoader(valid, 8)]
    return round(mean(float(score) for score in scores), 4)


def make_net(name: str) -> nn.Module:
    """The net with batch norm."""
    return NETS[name]() if name == "vnet" else NETS[name]("batch")


def as_tensor(part: Tensor) -> Tensor:
    """A batch without MONAI's class."""
    return part.as_subclass(Tensor)


def show(lines: list[dict]) -> None:
    """Prints mean, deviation and the lowest seed of the last epoch's Dice."""
    for case in dict.fromkeys(tuple(line[name] for name in CASE[:-1]) for line in lines):
        own = [line["dice"][-1] for line in lines if tuple(line[name] for name in CASE[:-1]) == case]
        if len(own) > 1:
            figures = f"{mean(own):.4f} ± {stdev(own):.4f}, lowest {min(own):.4f}"
            print(f"{', '.join(case):50s} {figures}, {len(own)} seeds")


if __name__ == "__main__":
    main()

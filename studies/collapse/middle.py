"""Converted in the middle of a training: a SegResNet trains three epochs with batch norm, and three with another norm.

    python studies/collapse/middle.py --out studies/collapse/middle.jsonl

AdamW at 0.003, batch 2, no clipping. A run is a line of the file; runs that are there are not made again. The table
goes to the terminal.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parent))

import task

import normlab
from normlab.study.lines import LineStore

NORMS, EPOCHS, BATCH, LR = ("batch", "running", "running_instance"), 6, 2, 0.003
IMAGES = {"standardised": task.make_standardised, "raw": task.make_raw}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/middle.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(6))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = LineStore(arguments.out)
    done = {(line["images"], line["norm"], line["seed"]) for line in store.read(dict)}
    for images, make in IMAGES.items():
        train, valid = make()
        for norm in NORMS:
            for seed in arguments.seeds:
                if (images, norm, seed) not in done:
                    store.append({"images": images, "norm": norm, "seed": seed, "dice": run(train, valid, norm, seed)})
    show(store.read(dict))


def run(train, valid, norm: str, seed: int) -> list[float]:
    """Dice after each epoch."""
    torch.manual_seed(seed)
    model: nn.Module = task.make_segresnet("batch")
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=0.01)
    loader = DataLoader(train, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    found, step, steps = [], 0, EPOCHS * len(loader)
    for epoch in range(EPOCHS):
        if epoch == EPOCHS // 2 and norm != "batch":
            normlab.convert(model, norm, inplace=True, optimizer=optimizer)
        model.train()
        for batch in loader:
            for group in optimizer.param_groups:
                group["lr"] = LR * (1 - step / steps) ** 0.9
            optimizer.zero_grad()
            task.loss(model(as_tensor(batch["image"])), as_tensor(batch["label"])).backward()
            optimizer.step()
            step += 1
        found.append(judge(model.eval(), valid))
    return found


@torch.no_grad()
def judge(model: nn.Module, valid) -> float:
    """The Dice score of images held out."""
    scores = [task.dice(model(as_tensor(one["image"])), as_tensor(one["label"])) for one in DataLoader(valid, 8)]
    return round(mean(float(score) for score in scores), 4)


def as_tensor(part: Tensor) -> Tensor:
    """A batch without MONAI's class."""
    return part.as_subclass(Tensor)


def show(lines: list[dict]) -> None:
    """Prints mean, deviation and the lowest seed of the last epoch's Dice."""
    for images in dict.fromkeys(line["images"] for line in lines):
        for norm in NORMS:
            own = [line["dice"][-1] for line in lines if (line["images"], line["norm"]) == (images, norm)]
            if len(own) > 1:
                figures = f"{mean(own):.4f} ± {stdev(own):.4f}, lowest {min(own):.4f}"
                print(f"{images:13s} {norm:17s} {figures}, {len(own)} seeds")


if __name__ == "__main__":
    main()

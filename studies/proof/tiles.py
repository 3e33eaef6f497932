"""Is a large image found the same, whole and in tiles? Scenes of digits of 128², by networks trained on 64².

    python studies/proof/tiles.py --out runs/tiles.jsonl

Each norm is trained as `plans/digits-*-adamw.toml` say, at batch 2 and a rate of 0.003. A run is a line of the file;
runs that are there are not made again. The table goes to the terminal.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

import digits  # noqa: E402 - it lies beside this file
from segmentation import standardise  # noqa: E402

from normlab.study.lines import LineStore  # noqa: E402
from normlab.study.plan import Plan, Trial  # noqa: E402
from normlab.study.trial import build_learner  # noqa: E402
from normlab.training import dice  # noqa: E402

NORMS = ("batch", "group", "instance", "running", "running_instance")
SCENES, TIMES, SEED = 24, 2, 2**31 + 1  # large scenes, how many times as wide, and a seed that no plan has


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/tiles.jsonl"))
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 7))
    parser.add_argument("--data-dir", help="folder with a copy of MNIST")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    store = LineStore(arguments.out)
    done = {(line["images"], line["norm"], line["seed"]) for line in store.read(dict)}
    for kind in ("standardised", "raw"):
        for norm in NORMS:
            for seed in arguments.seeds:
                if (kind, norm, seed) not in done:
                    store.append(
                        {"images": kind, "norm": norm, "seed": seed, **run(kind, norm, seed, arguments.data_dir)}
                    )
    show(store.read(dict))


def run(kind: str, norm: str, seed: int, data_dir: str | None) -> dict[str, float]:
    """Dice of whole images and of tiles, and how much the two differ: 1 − the Dice score between them."""
    plan = Plan.read(ROOT / "studies" / "proof" / "plans" / f"digits-{kind}-adamw.toml")
    one = replace(plan, norms=[norm], batch_sizes=[2], lrs=[0.003], seeds=[seed])
    (trial,) = one.trials()
    learner = build_learner(at_root(trial), data_dir)
    learner.fit(trial.epochs)
    images, objects = large_scenes(kind)
    return judge(learner.model.eval(), images, objects)


def at_root(trial: Trial) -> Trial:
    """The trial, whose functions are found from any folder."""
    named = {name: str(ROOT / getattr(trial, name)) for name in ("data", "model", "loss")}
    return replace(trial, **named, metrics=[str(ROOT / name) for name in trial.metrics])


def large_scenes(kind: str) -> tuple[Tensor, Tensor]:
    """Scenes of four times as many digits, in the unit of the images that a network was trained on."""
    side, digits.SIDE = digits.SIDE, TIMES * digits.SIDE
    try:
        scenes, objects = digits.draw(*digits.digits()[1], SCENES, SEED, range(10), 10 * TIMES**2)
    finally:
        digits.SIDE = side
    images = digits.scan(scenes, False, SEED)
    return (standardise(images) if kind == "standardised" else images), objects


@torch.no_grad()
def judge(model: nn.Module, images: Tensor, objects: Tensor) -> dict[str, float]:
    """What a model makes of images (N, SIDE, SIDE), whole and in tiles as large as it was trained on."""
    side = images.shape[-1] // TIMES
    whole = torch.cat([model(image[None, None]) for image in images])
    tiled = torch.empty_like(whole)
    for top in range(0, TIMES * side, side):
        for left in range(0, TIMES * side, side):
            tile = (..., slice(top, top + side), slice(left, left + side))
            tiled[tile] = torch.cat([model(image[None, None]) for image in images[tile]])
    found = [part > 0 for part in (whole, tiled)]
    between = 2 * (found[0] & found[1]).sum() / (found[0].sum() + found[1].sum()).clamp(min=1)
    scores = {name: dice(part, objects).mean().item() for name, part in (("whole", whole), ("tiles", tiled))}
    return {**scores, "disagreement": 1 - between.item()}


def show(lines: list[dict]) -> None:
    """Prints mean and deviation over seeds."""
    for kind in dict.fromkeys(line["images"] for line in lines):
        print(f"\n{kind}: Dice whole, Dice in tiles, disagreement")
        for norm in NORMS:
            own = [line for line in lines if (line["images"], line["norm"]) == (kind, norm)]
            if len(own) > 1:
                parts = [[line[name] for line in own] for name in ("whole", "tiles", "disagreement")]
                print(
                    f"{norm:17s}", *(f"{mean(part):.4f} ± {stdev(part):.4f}  " for part in parts), f"{len(own)} seeds"
                )


if __name__ == "__main__":
    main()

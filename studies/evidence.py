"""What `normlab advise` knows: the outcomes of the studies here, in src/normlab/study/evidence.json.

    python studies/evidence.py

Each norm has its best setting. Where a first seed chose the setting, that seed does not judge.
"""

from pathlib import Path

from normlab.files import write_whole
from normlab.study.evidence import COMMITTED, Case, make_cases, to_json
from normlab.study.record import Record
from normlab.study.store import RunStore
from normlab.study.summary import best, summarize

FOLDER = Path(__file__).parent
CONFIRMED = {  # of studies/flagship
    "confirm-mnist": "MNIST, the lesson's net",
    "confirm-fashion_mnist": "Fashion-MNIST, the lesson's net",
    "confirm-cifar10": "CIFAR-10, a residual net",
    "today-mnist": "MNIST, the lesson's net, today's rule",
    "today-fashion_mnist": "Fashion-MNIST, the lesson's net, today's rule",
    "confirm-fashion-adamw": "8,000 images of Fashion-MNIST, AdamW, the lesson's net",
    "confirm-fashion-momentum": "8,000 images of Fashion-MNIST, momentum, the lesson's net",
}
FINE_TUNED = {  # of studies/finetune
    "camera": "Fashion-MNIST by another camera, a residual net",
    "classes": "from MNIST to Fashion-MNIST, the lesson's net",
}
SEGMENTED = {  # of studies/segmentation: what it is, and whether the network was trained before
    "standardised": ("made images, standardised, a small U-Net", False),
    "raw": ("made images of differing contrast, a small U-Net", False),
    "volumes-standardised-adamw": ("made volumes, standardised, AdamW, a small U-Net in 3-D", False),
    "volumes-raw-adamw": ("made volumes of differing contrast, AdamW, a small U-Net in 3-D", False),
    "volumes-standardised-nesterov": ("made volumes, standardised, Nesterov's momentum, a small U-Net in 3-D", False),
    "volumes-raw-nesterov": ("made volumes of differing contrast, Nesterov's momentum, a small U-Net in 3-D", False),
    "few_raw": ("from standardised images to those of differing contrast, a small U-Net", True),
}
PROVEN = {  # of studies/proof
    "nuclei-raw-adamw": "nuclei of differing contrast, AdamW, a small U-Net",
    "nuclei-raw-nesterov": "nuclei of differing contrast, Nesterov's momentum, a small U-Net",
    "nuclei-standardised-adamw": "nuclei, standardised, AdamW, a small U-Net",
    "nuclei-standardised-nesterov": "nuclei, standardised, Nesterov's momentum, a small U-Net",
}
DETECTED = {  # of studies/proof
    "trees-standardised-adamw": "trees in photographs, standardised, AdamW, a small detector",
    "trees-standardised-momentum": "trees in photographs, standardised, momentum, a small detector",
}
RESIDUAL = {  # of studies/collapse, where every norm has the same rates
    "segresnet-standardised": "made images, standardised, AdamW, a SegResNet",
    "segresnet-raw": "made images of differing contrast, AdamW, a SegResNet",
    "segresnet-3d-raw": "made volumes of differing contrast, AdamW, a SegResNet in 3-D",
    "segresnet-standardised-momentum": "made images, standardised, momentum, a SegResNet",
    "segresnet-raw-momentum": "made images of differing contrast, momentum, a SegResNet",
    "vnet-standardised": "made images, standardised, AdamW, a VNet",
    "vnet-raw": "made images of differing contrast, AdamW, a VNet",
}
HELD_OUT = (  # from all tuning
    *PROVEN.values(),
    *DETECTED.values(),
    *(name for folder, name in CONFIRMED.items() if folder.startswith("confirm-fashion-")),
)
CHOOSING = 0  # the seed that chose the settings


def all_cases() -> list[Case]:
    """The cases of all studies."""
    cases = []
    for folder, name in CONFIRMED.items():
        runs = RunStore(FOLDER / "flagship" / folder / "runs.jsonl").read()
        cases += make_cases(runs, "studies/flagship", name, "classification")
    for case, name in FINE_TUNED.items():
        folders = (FOLDER / "finetune" / f"{part}-{case}" for part in ("screen", "confirm"))
        runs = [run for folder in folders for run in RunStore(folder / "runs.jsonl").read()]
        cases += make_cases(chosen(runs), "studies/finetune", name, "classification", pretrained=True)
    for folder, (name, pretrained) in SEGMENTED.items():
        own = RunStore(FOLDER / "segmentation" / f"confirm-{folder}" / "runs.jsonl").read()
        cases += make_cases(own, "studies/segmentation", name, "segmentation", pretrained)
    for task, names in (("segmentation", PROVEN), ("detection", DETECTED)):
        for folder, name in names.items():
            own = RunStore(FOLDER / "proof" / folder / "confirm" / "runs.jsonl").read()
            cases += make_cases(own, "studies/proof", name, task)
    for folder, name in RESIDUAL.items():
        own = RunStore(FOLDER / "collapse" / folder / "runs.jsonl").read()
        cases += make_cases(own, "studies/collapse", name, "segmentation")
    return cases


def chosen(runs: list[Record]) -> list[Record]:
    """The runs of each norm at the setting that the first seed chose, without that seed."""
    kept = []
    for norm, size in {(run.settings["norm"], run.settings["batch_size"]) for run in runs}:
        own = [run for run in runs if (run.settings["norm"], run.settings["batch_size"]) == (norm, size)]
        leader = best(summarize(run for run in own if run.settings["seed"] == CHOOSING))
        kept += [
            run
            for run in own
            if leader and run.settings["lr"] == leader.settings["lr"] and run.settings["seed"] != CHOOSING
        ]
    return kept


if __name__ == "__main__":
    cases = all_cases()
    write_whole(COMMITTED, to_json(cases).encode())
    print(f"{len(cases)} cases: {COMMITTED}")

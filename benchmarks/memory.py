"""Peak memory of a training step of convolution–norm–ReLU blocks, against torch's.

    python benchmarks/memory.py [--out benchmarks/results/memory.jsonl]

One block and a chain of four, 64 channels on maps of 128×128, batch 8, in both layouts: a tensor of activations has
33.6 MB. Each layer runs in a process of its own, one step to warm up and one to measure: the most memory that the
process held in it, less what it held before (Linux). One line is appended for each, with versions and machine.
"""

import argparse
import itertools
import json
import multiprocessing
import re
from pathlib import Path

import torch
from torch import nn

from normlab.kernels import cpu
from normlab.nn import build_norm
from normlab.study.trial import environment

CHANNELS, SHAPE = 64, (8, 64, 128, 128)
NORMS = {
    "torch batch, ReLU": lambda: [nn.BatchNorm2d(CHANNELS), nn.ReLU()],
    "torch batch, ReLU in place": lambda: [nn.BatchNorm2d(CHANNELS), nn.ReLU(inplace=True)],
    "batch, ReLU": lambda: [build_norm("batch", CHANNELS, activation="relu")],
    "running, ReLU": lambda: [build_norm("running", CHANNELS, activation="relu")],
}


def process_memory(name: str) -> float:
    """VmRSS or VmHWM (the most so far) of this process, MB."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, name
    return int(found[1]) * 1024 / 1e6


def measure(norm: str, blocks: int, layout: torch.memory_format) -> float:
    torch.manual_seed(0)
    layers = [[nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), *NORMS[norm]()] for _ in range(blocks)]
    model = nn.Sequential(*[layer for block in layers for layer in block]).to(memory_format=layout)
    x, grad = (torch.randn(SHAPE).contiguous(memory_format=layout) for _ in range(2))

    def step() -> None:
        inputs = x.requires_grad_()
        model(inputs).backward(grad)
        inputs.grad = None

    step()
    model.zero_grad()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before = process_memory("VmRSS")
    step()
    return process_memory("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.jsonl")
    a = parser.parse_args()
    for blocks, layout in itertools.product((1, 4), (torch.contiguous_format, torch.channels_last)):
        peaks = {}
        for norm in NORMS:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[norm] = pool.apply(measure, (norm, blocks, layout))
            ratio = peaks[norm] / peaks["torch batch, ReLU"]
            print(f"{blocks} blocks, {str(layout)[6:]:18} {norm:28} {peaks[norm]:6.0f} MB, {ratio:.2f} of torch")
        record = {"blocks": blocks, "shape": SHAPE, "layout": str(layout)[6:], "peak_mb": peaks, "kernels": cpu.PATH}
        with a.out.open("a") as file:
            file.write(json.dumps({**record, **environment()}) + "\n")


if __name__ == "__main__":
    main()

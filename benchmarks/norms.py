"""A layer's training step, forward and backward, against torch's own and against the memory's speed.

    OMP_NUM_THREADS=1 python benchmarks/norms.py [--compiled] [--out benchmarks/results/norms.jsonl]
    OMP_NUM_THREADS=2 python benchmarks/norms.py [--compiled]
    python benchmarks/norms.py --device cuda [--compiled | --recorded] [--dtype bfloat16] [--always]

Shapes: those of the lesson's net at batch 1, 2, 32 and 512, some of ResNet-50 at 2 and 32, and of a 3-D segmentation
net at 1. The floor is four copies of the tensor: a norm has to read x for its statistics; to read x and write y; to
read x and the gradient for its sums; to read both and write the gradient of x, which makes eight passes. A round runs
every layer in turn, so that all see the same machine; figures are medians over the rounds: how many times as fast as
torch's layer ours is (running norms as batch norm), and how many times the floor it takes. `--compiled` does the same
with every layer compiled, theirs and ours, and with JAX's batch norm, jitted, if it is installed. Gradients are as long
as those of a mean loss; `running, bounded` has longer ones, all of which its bound cuts. On a GPU `--recorded` replays
the step as a CUDA graph, and `--always` uses the kernels where torch's operators are preferred too. One line for each
shape and layer is appended, with versions and machine; a table at the end. Run it on an idle machine.
"""

import argparse
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch._dynamo
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from normlab.kernels import cpu, policy
from normlab.nn import build_norm
from normlab.study.trial import environment

LESSON = [(8, 14), (16, 7), (32, 4), (64, 2), (64, 1)]
RESNET = [(64, 112), (256, 56), (512, 28), (2048, 7)]
SHAPES = {
    **{f"lesson, batch {n}": [(n, c, s, s) for c, s in LESSON] for n in (1, 2, 32, 512)},
    **{f"ResNet-50, batch {n}": [(n, c, s, s) for c, s in RESNET] for n in (2, 32)},
    "3-D segmentation, batch 1": [(1, 32, 96, 96, 96), (1, 128, 24, 24, 24)],
}
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {  # from channels and space dimensions
    "torch batch": lambda channels, dims: (nn.BatchNorm2d, nn.BatchNorm3d)[dims - 2](channels),
    "batch": lambda channels, dims: build_norm("batch", channels, dims),
    "running": lambda channels, dims: build_norm("running", channels, dims),
    "running, bounded": lambda channels, dims: build_norm("running", channels, dims),
    "running instance": lambda channels, dims: build_norm("running_instance", channels, dims),
    "lesson's rule": lambda channels, dims: build_norm("running_lesson", channels, dims),
    "torch batch, ReLU": lambda channels, dims: nn.Sequential(LAYERS["torch batch"](channels, dims), nn.ReLU()),
    "batch, ReLU": lambda channels, dims: build_norm("batch", channels, dims, activation="relu"),
    "torch group": lambda channels, dims: nn.GroupNorm(8, channels),
    "group": lambda channels, dims: build_norm("group", channels, dims),
}
PEERS = {
    "batch": "torch batch", "running": "torch batch", "running, bounded": "torch batch", "lesson's rule": "torch batch",
    "running instance": "torch batch", "batch, ReLU": "torch batch, ReLU", "group": "torch group",
    "JAX batch": "torch batch",
}  # fmt: skip
SECONDS_A_ROUND = 0.01
Step = Callable[[nn.Module, Tensor, Tensor], Callable[[], None]]


def training_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    inputs = x.clone().requires_grad_()

    def run() -> None:
        inputs.grad = None
        layer(inputs).backward(grad)

    return run


def compiled_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    inputs = x.clone().requires_grad_()

    def gradients(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer(inputs), [inputs, *layer.parameters()], grad)

    gradients.__code__ = gradients.__code__.replace()  # the compiler's limit is one of each code
    step = torch.compile(gradients, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        step(grad)
    return lambda: step(grad)


def recorded_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], None]:
    step, stream, graph = training_step(layer, x, grad), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step()

    def run(kept: Callable[[], None] = step) -> None:  # the graph knows the places of the step's tensors only
        graph.replay()

    return run


def jax_step(x: Tensor, grad: Tensor) -> Callable[[], None]:
    """Batch norm with its running statistics, forward and backward."""
    import jax
    import jax.numpy as jnp

    from jax_net import batch_norm

    def gradients(parameters, statistics, x, grad):
        y, pull_back, statistics = jax.vjp(lambda p, x: batch_norm(p, statistics, x), parameters, x, has_aux=True)
        return y, pull_back(grad), statistics

    channels = x.shape[1]
    state = (jnp.ones(channels), jnp.zeros(channels)), (jnp.zeros(channels), jnp.ones(channels))
    step = jax.jit(gradients)
    arrays = [jnp.asarray(part.float().contiguous().cpu().numpy(), str(part.dtype)[6:]) for part in (x, grad)]
    return lambda: jax.block_until_ready(step(*state, *arrays))


def floor(x: Tensor) -> Callable[[], None]:
    other = torch.empty_like(x)

    def run() -> None:
        for _ in range(4):
            other.copy_(x)

    return run


def seconds(run: Callable[[], None], times: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(times):
        run()
    _wait()
    return (time.perf_counter() - start) / times


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure(
    x: Tensor, grad: Tensor, layout: torch.memory_format, make: Step, layers: list[str], rounds: int
) -> dict[str, list[float]]:
    """Seconds a step of each layer and of the floor, round by round."""
    shape = x.shape
    x, grad = (part.contiguous(memory_format=layout) for part in (x, grad))
    refused = () if x.numel() > shape[1] else ("torch batch", "torch batch, ReLU")  # one value a channel
    if x.is_cuda and x.dtype != torch.float32:
        refused = (*refused, "torch group", "lesson's rule")  # one of its parameters' type only
    torch.compiler.reset()
    runs = {
        name: make(build(shape[1], len(shape) - 2).to(x.device), x, grad if "bounded" in name else grad / x.numel())
        for name, build in LAYERS.items()
        if name in layers and name not in refused
    }
    if x.is_cpu and make is compiled_step and layout is torch.contiguous_format and importlib.util.find_spec("jax"):
        runs["JAX batch"] = jax_step(x, grad)
    runs["floor"] = floor(x)
    times = {name: max(1, round(SECONDS_A_ROUND / seconds(run, 2))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(seconds(run, times[name]))
    return found


def gpu() -> dict[str, str]:
    """Name and driver of the first."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    name, driver = (
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[0].split(", ")
    )
    return {"gpu": name, "driver": driver, "cuda": torch.version.cuda or "", "triton": version("triton")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: norms.jsonl or, of a GPU, norms_gpu.jsonl in results")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--compiled", action="store_true")
    ways.add_argument("--recorded", action="store_true")
    parser.add_argument("--always", action="store_true")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--cases", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    a = parser.parse_args()
    on_gpu = a.device == "cuda"
    out = a.out or Path(__file__).parent / "results" / ("norms_gpu.jsonl" if on_gpu else "norms.jsonl")
    make = compiled_step if a.compiled else recorded_step if a.recorded else training_step
    if a.always:
        policy.LARGE_ON_GPU = 0
    about = {"kernels": cpu.PATH}
    if on_gpu:
        about = {"kernels": policy.PATH_ON_GPU, **gpu(), "always": a.always}
    table = Table("shape", "layout", "layer", "ms", "speed, torch = 1", "over the floor", box=None)
    speeds: dict[str, list[float]] = {name: [] for name in PEERS}
    cases = [(case, shape) for case in a.cases for shape in SHAPES[case]]
    for (case, shape), last in itertools.product(cases, (False, True)):
        layout = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)] if last else torch.contiguous_format
        torch.manual_seed(0)
        x, grad = torch.randn(2, *shape, device=a.device).to(getattr(torch, a.dtype))
        found = measure(x, grad, layout, make, a.layers, a.rounds)
        floor = found.pop("floor")
        for name, taken in found.items():
            record = {
                "case": case, "shape": shape, "layout": str(layout).removeprefix("torch."), "layer": name,
                "compiled": a.compiled, "recorded": a.recorded, "dtype": a.dtype,
                "median_ms": 1e3 * statistics.median(taken),
                "over_floor": statistics.median(mine / least for mine, least in zip(taken, floor, strict=True)),
                **about, **environment(),
            }  # fmt: skip
            if PEERS.get(name) in found:
                ratios = [theirs / mine for theirs, mine in zip(found[PEERS[name]], taken, strict=True)]
                record["speed"] = statistics.median(ratios)
                record["speed_quartiles"] = statistics.quantiles(ratios, n=4)[::2]
                speeds[name].append(record["speed"])
            with out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            speed = f"{record['speed']:.2f}" if "speed" in record else ""
            cells = "×".join(map(str, shape)), record["layout"].removesuffix("_format"), name
            table.add_row(*cells, f"{record['median_ms']:.4g}", speed, f"{record['over_floor']:.1f}")
    console = Console(width=110)
    console.print(table)
    for name, values in speeds.items():
        if values:
            mean = math.exp(statistics.fmean(map(math.log, values)))
            console.print(f"{name}: {mean:.2f} times {PEERS[name]} (geometric mean), {min(values):.2f} at worst")


if __name__ == "__main__":
    main()

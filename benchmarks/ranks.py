"""What several processes cost in the learner: a step of `Distributed` against a hand-written loop with torch's DDP.

    python benchmarks/ranks.py [--processes 2 4] [--batch-size 8]

The lesson's net with batch norm learns MNIST in gloo processes of one thread. Both loops see the same global batches,
in turn, so that both see the same machine; the learner keeps loss and accuracy too. The figures are medians and
quartiles of milliseconds a step, and images a second. Results are added to results/ranks.jsonl.
"""

import argparse
import json
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from normlab.data import TensorBatches, load_dataset
from normlab.models import build_model
from normlab.study.trial import environment
from normlab.training import Distributed, Learner, Metrics, accuracy

OUT = Path(__file__).parent / "results" / "ranks.jsonl"
STEPS, ROUNDS, LR = 200, 9, 0.05


def by_hand(model: torch.nn.Module, batches: TensorBatches, rank: int, count: int) -> None:
    """No more than it takes; each process has its share of each batch."""
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    model.train()
    for x, y in batches:
        loss = F.cross_entropy(parallel(x[rank::count]), y[rank::count])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def by_learner(model: torch.nn.Module, batches: TensorBatches, rank: int, count: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    Learner(model, batches, optimizer=optimizer, callbacks=[Distributed(), Metrics(accuracy=accuracy)]).fit(1)


def work(rank: int, count: int, batch_size: int, port: int, out: Path) -> None:
    """One process: both loops in turn; the first one writes the times."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    data = load_dataset("mnist")
    images = STEPS * batch_size
    loops: dict[str, Callable] = {"by hand": by_hand, "normlab": by_learner}
    times: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(ROUNDS + 1):
        for name in loops if number % 2 else reversed(loops):
            torch.manual_seed(0)
            model = build_model("convnet", "batch", 10)
            batches = TensorBatches(data.x_train[:images], data.y_train[:images], batch_size)
            dist.barrier()
            start = time.perf_counter()
            loops[name](model, batches, rank, count)
            dist.barrier()
            times[name].append((time.perf_counter() - start) / STEPS * 1e3)
    if rank == 0:
        out.write_text(json.dumps({name: values[1:] for name, values in times.items()}))  # the first round warms up
    dist.destroy_process_group()


def measure(count: int, batch_size: int) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = OUT.with_suffix(f".{count}.part")
    torch.multiprocessing.spawn(work, (count, batch_size, port, out), nprocs=count)  # pyright: ignore[reportPrivateImportUsage]
    times = json.loads(out.read_text())
    out.unlink()
    ratios = [ours / theirs for ours, theirs in zip(times["normlab"], times["by hand"], strict=True)]
    figures = {
        name: {
            "ms_a_step": statistics.median(values),
            "quartiles": statistics.quantiles(values, n=4)[::2],
            "images_a_second": batch_size / statistics.median(values) * 1e3,
        }
        for name, values in times.items()
    }
    return {"processes": count, "batch_size": batch_size, "loops": figures, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--batch-size", type=int, default=8)
    a = parser.parse_args()
    for count in a.processes:
        result = {**environment(), "steps": STEPS, "rounds": ROUNDS, **measure(count, a.batch_size)}
        for name, figures in result["loops"].items():
            low, high = figures["quartiles"]
            print(
                f"{count} processes  {name:<8} {figures['ms_a_step']:.2f} ms a step ({low:.2f} … {high:.2f}), "
                f"{figures['images_a_second']:.0f} images a second"
            )
        print(f"{count} processes  ratio    {result['ratio']:.2f}")
        with OUT.open("a") as file:
            file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()

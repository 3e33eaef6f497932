"""What a net would learn at batch 2 with perfect statistics.

    python studies/flagship/perfect.py

Each step passes 32 images forward and backward. Means, variances and averages of gradients are those of 32. Only the
first two images have a part in the gradient of weights, γ and β. In the runs named `own` the averages of gradients
are those of each pair. Net, images and schedule are those of `contrast.py`. Each run is kept in `perfect.jsonl` as it
ends. A command started again makes the runs that are missing. NOTES.md has them under "The share in A and B".
"""

import argparse
import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from contrast import LRS, with_drawn_contrast
from rich.console import Console
from torch import Tensor, nn

from normlab.data import load_dataset
from normlab.models import build_model
from normlab.study.executors import Job, run_jobs
from normlab.study.record import Record
from normlab.study.schedules import SCHEDULES
from normlab.study.store import RunStore
from normlab.study.trial import make_record
from normlab.training import Callback

STORE = RunStore(Path(__file__).parent / "perfect.jsonl")
IMAGES, STEPPED, POOL = 4000, 2, 32
SPACE = (0, 2, 3)


class _Normalize(torch.autograd.Function):
    """Batch norm of a pool of images. The gradients of γ and β are those of the first few."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, own: bool) -> Tensor:
        var, mean = torch.var_mean(x, SPACE, correction=0, keepdim=True)
        inverse = (var + 1e-5).rsqrt()
        x_hat = (x - mean) * inverse
        ctx.save_for_backward(x_hat, inverse, weight)
        ctx.own = own
        return x_hat * weight.view(-1, 1, 1) + bias.view(-1, 1, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        x_hat, inverse, weight = ctx.saved_tensors
        grad = grads[0]
        groups = [part.unflatten(0, (-1, STEPPED if ctx.own else POOL)) for part in (grad, grad * x_hat, x_hat * x_hat)]
        of_grad, of_product, square = (part.mean((1, 3, 4), keepdim=True).expand_as(part) for part in groups)
        subtracted = of_grad + (of_product / square.clamp(min=1)) * x_hat.view_as(of_grad)
        scale = POOL / STEPPED
        few, few_hat = grad[:STEPPED] * scale, x_hat[:STEPPED]
        grad_x = inverse * weight.view(-1, 1, 1) * (grad - subtracted.view_as(grad))
        return grad_x, (few * few_hat).sum(SPACE), few.sum(SPACE), None


class PoolNorm(nn.Module):
    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, own: bool):
        super().__init__()
        self.own, self.batches = own, 0
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return F.batch_norm(x, self.mean, self.var, self.weight, self.bias)
        with torch.no_grad():
            self.batches += 1
            var, mean = torch.var_mean(x, SPACE)
            rate = max(0.02, 1 / self.batches)
            self.mean.lerp_(mean, rate)
            self.var.lerp_(var, rate)
        return _Normalize.apply(x, self.weight, self.bias, self.own)


class FewStep(nn.Module):
    """A convolution or linear layer. Only the first few images have a part in the gradient of its weight."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.layer(x)
        constants = {name: value.detach() for name, value in self.layer.named_parameters()}
        y = torch.func.functional_call(self.layer, constants, x)
        of_few = self.layer(x[:STEPPED].detach())
        nothing = (of_few - of_few.detach()) * (POOL / STEPPED)  # zero, but it has a gradient
        return torch.cat([y[:STEPPED] + nothing, y[STEPPED:]])


def with_pools(module: nn.Module, own: bool) -> nn.Module:
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d | nn.Linear):
            setattr(module, name, FewStep(child))
        elif isinstance(child, nn.BatchNorm2d):
            setattr(module, name, PoolNorm(child.num_features, own))
        else:
            with_pools(child, own)
    return module


def train(own: bool, lr: float, tell: Callback) -> Record:
    mnist = load_dataset("mnist")
    drawn = torch.Generator().manual_seed(100)
    x_train, x_valid = (with_drawn_contrast(x, drawn) for x in (mnist.x_train[:IMAGES], mnist.x_valid[:2000]))
    y_train, y_valid = mnist.y_train[:IMAGES], mnist.y_valid[:2000]
    torch.manual_seed(0)
    model = with_pools(build_model("resnet", "batch", 10, 1), own)
    optimizer, schedule = torch.optim.SGD(model.parameters(), lr=lr), SCHEDULES["one-cycle"](lr)
    generator = torch.Generator().manual_seed(0)
    order, losses, start = torch.randperm(IMAGES, generator=generator), [], time.perf_counter()
    for step, few in enumerate(order.split(STEPPED)):
        chosen = torch.cat([few, torch.randint(IMAGES, (POOL - STEPPED,), generator=generator)])
        optimizer.param_groups[0]["lr"] = schedule(step * STEPPED / IMAGES)
        output, targets = model(x_train[chosen]), y_train[chosen]
        optimizer.zero_grad()
        F.cross_entropy(output, targets).backward()
        optimizer.step()
        losses.append(F.cross_entropy(output[:STEPPED], targets[:STEPPED]).item())
    model.eval()
    with torch.no_grad():
        output = torch.cat([model(part) for part in x_valid.split(250)])
    right = (output.argmax(1) == y_valid).float().mean().item()
    means = {"train": {"loss": sum(losses) / len(losses)}, "valid": {"accuracy": right}}
    return make_record(
        key(own, lr),
        settings={"norm": "own" if own else "perfect", "batch_size": STEPPED, "lr": lr, "seed": 0},
        epochs=[{"epoch": 1, **means}],
        losses=losses,
        diverged_at_step=None,
        seconds=time.perf_counter() - start,
        parameters=sum(part.numel() for part in model.parameters()),
    )


def key(own: bool, lr: float) -> str:
    return f"{'own' if own else 'perfect'}-{lr:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    a = parser.parse_args()
    kept = {record.key for record in STORE.read() if record.status != "failed"}
    jobs = [
        Job(key(*run), key(*run), 1.0, partial(train, *run), dict(norm=key(*run)))
        for run in itertools.product((False, True), LRS)
        if key(*run) not in kept
    ]
    run_jobs(jobs, STORE, a.workers, Console())
    for record in STORE.read():
        print(f"{record.key:12} {record.final('accuracy'):.4f}")


if __name__ == "__main__":
    main()

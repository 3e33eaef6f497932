"""Fine-tuning at batch 1 and 2: a net with batch norm, trained on MNIST at batch 128, learns Fashion-MNIST.

    python studies/flagship/finetune.py [--batch-sizes 2 1] [--norms …]

The lesson's net is trained for one epoch with batch norm. Then it gets other norms and a new last layer. The norms
take over γ and β, and running statistics where they have any. The net learns 5,000 images of Fashion-MNIST in one
epoch of plain SGD, one-cycle. `frozen` is batch norm in evaluation mode whose γ and β learn. `scratch` is running
batch norm that takes nothing over. Each run is kept in `finetune.jsonl` as it ends. A command started again makes the
runs that are missing. `studies/finetune` is the later and larger study.
"""

import argparse
import itertools
from copy import deepcopy
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normlab.study.compare import make_job
from normlab.study.executors import run_jobs
from normlab.study.plan import Trial
from normlab.study.record import Record
from normlab.study.store import RunStore
from normlab.study.trial import build_learner, run_learner
from normlab.training import Callback

STORE = RunStore(Path(__file__).parent / "finetune.jsonl")
NORMS = ("running", "batch", "frozen", "renorm", "group", "scratch")
LRS = (0.01, 0.03, 0.1, 0.3)
FEW_IMAGES = 5_000


class Freeze(Callback):
    """Keeps batch norms in evaluation mode while the rest of the net trains."""

    def begin_batch(self) -> None:
        for layer in self.learner.model.modules():
            if isinstance(layer, _NormBase):
                layer.eval()


@lru_cache
def pretrained(seed: int) -> dict[str, Tensor]:
    """The state of the net without its last layer."""
    learner = build_learner(Trial("batch", 128, lr=1.0, seed=seed, schedule="one-cycle"))
    learner.fit(1)
    last = [name for name, layer in learner.model.named_modules() if isinstance(layer, nn.Linear)][-1]
    return {name: value for name, value in learner.model.state_dict().items() if not name.startswith(last)}


def finetune(trial: Trial, data_dir: str | None, tell: Callback) -> Record:
    """Train as `trial` says; its norm may be `frozen` or `scratch`."""
    norm = {"frozen": "batch", "scratch": "running"}.get(trial.norm, trial.norm)
    callbacks = (tell, Freeze()) if trial.norm == "frozen" else (tell,)
    learner = build_learner(replace(trial, norm=norm), data_dir, callbacks)
    if trial.norm != "scratch":
        learner.model.load_state_dict(deepcopy(pretrained(trial.seed)), strict=False)
    return run_learner(trial, learner)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norms", nargs="+", default=NORMS, choices=NORMS, help="norms to run")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(2, 1), help="images a step")
    parser.add_argument("--data-dir", help="folder of the data sets")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    a = parser.parse_args()
    kept = {record.key for record in STORE.read() if record.status != "failed"}
    trials = [
        Trial(norm, size, lr, seed, schedule="one-cycle", data="fashion_mnist", images=FEW_IMAGES)
        for size, seed, lr, norm in itertools.product(a.batch_sizes, range(3), LRS, a.norms)
    ]
    jobs = [
        replace(make_job(trial, a.data_dir), run=partial(finetune, trial, a.data_dir))
        for trial in trials
        if trial.key not in kept
    ]
    run_jobs(jobs, STORE, a.workers, Console())


if __name__ == "__main__":
    main()

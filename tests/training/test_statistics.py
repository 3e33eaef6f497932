"""What the statistics of a norm hold after each way of training, against float64; docs/training.md says it in words.

Those of several processes are in test_distributed.py.
"""

import pytest
import torch
from keeping import KEEPING, norm_of
from statistics_formula import assert_kept, averaged, statistics
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normlab.data import TensorBatches
from normlab.nn import NORMS, build_norm
from normlab.training import EMA, Callback, Learner

C, BATCH = 3, 2


def data(samples: int = 15) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 1 + 2 * torch.randn(samples, C, 4, generator=generator), torch.randint(2, (samples,), generator=generator)


class Net(nn.Module):
    """A norm of what comes in, perhaps narrowed before or run again in the backward pass, and a classifier."""

    def __init__(self, name: str, narrow: torch.dtype | None = None, again: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = norm_of(name, C, 1), nn.Linear(C, 2)
        self.narrow, self.again = narrow, again

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.narrow is None else x.to(self.narrow)
        y = checkpoint(self.norm, x, use_reentrant=False) if self.again else self.norm(x)
        return self.head(y.mean(2))


def trained(model: Net, *callbacks: Callback, **options) -> Learner:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    learner = Learner(model, TensorBatches(*data(), BATCH), optimizer=optimizer, callbacks=callbacks, **options)
    learner.fit(1)
    return learner


@pytest.mark.parametrize("name", KEEPING)
def test_accumulation_each_batch_counts_by_itself(name):
    model = Net(name)
    trained(model, accumulate=4)
    assert_kept(model.norm, statistics(name, list(data()[0].split(BATCH))))


@pytest.mark.parametrize("name", KEEPING)
def test_bfloat16_those_of_the_rounded_values_in_float32(name):
    model = Net(name, narrow=torch.bfloat16)
    trained(model, precision="bfloat16")
    assert_kept(model.norm, statistics(name, list(data()[0].to(torch.bfloat16).split(BATCH))))


class Overflow(Callback):
    """Makes the gradient of one batch overflow."""

    def after_loss(self) -> None:
        if self.learner.batch == 3:
            self.learner.loss = self.learner.loss * float("inf")


@pytest.mark.parametrize(("accumulate", "left_out"), [(1, [3]), (2, [2, 3])])
@pytest.mark.parametrize("name", KEEPING)
def test_float16_no_batch_of_a_step_that_is_left_out(name, accumulate, left_out):
    model = Net(name, narrow=torch.float16)
    learner = trained(
        model,
        Overflow(),
        precision="float16",
        accumulate=accumulate,
        loss_func=lambda output, targets: nn.functional.cross_entropy(output, targets) / 1000,
    )
    batches = list(data()[0].half().split(BATCH))
    assert_kept(model.norm, statistics(name, [x for number, x in enumerate(batches) if number not in left_out]))
    assert learner.step == len(batches) // accumulate - 1


@pytest.mark.parametrize("name", KEEPING)
def test_activation_checkpoint_each_batch_once(name):
    model = Net(name, again=True)
    trained(model)
    assert_kept(model.norm, statistics(name, list(data()[0].split(BATCH))))


@pytest.mark.parametrize("name", ["batch", "running"])
def test_activation_checkpoint_around_a_compiled_norm_each_batch_twice(name):
    torch.compiler.reset()
    model = Net(name, again=True)
    model.norm.compile(backend="aot_eager", dynamic=False)
    trained(model)
    assert_kept(model.norm, statistics(name, [x for x in data()[0].split(BATCH) for _ in range(2)]))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("name", KEEPING)
def test_ema_the_moving_average_of_those_after_each_step(name, accumulate):
    model, ema = Net(name), EMA(0.9)
    trained(model, ema, accumulate=accumulate)
    batches = list(data()[0].split(BATCH))
    steps = [*range(accumulate, len(batches), accumulate), len(batches)]
    assert_kept(ema.model.norm, averaged([statistics(name, batches[:number]) for number in steps], 0.9))


@pytest.mark.parametrize("name", [name for name in NORMS if name not in KEEPING])
def test_other_norms_hold_none(name):
    assert not list(build_norm(name, 8).buffers())

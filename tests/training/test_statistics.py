"""What the statistics of a norm hold after each way of training, against float64; docs/training.md says it in words."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from normlab.data import TensorBatches
from normlab.nn import build_norm
from normlab.training import Callback, Learner
from running_formula import Formula

C, EPS, MOMENTUM, BATCH = 3, 1e-5, 0.1, 2
WITH_STATISTICS = ["batch", "running"]


def data(samples: int = 15) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 1 + 2 * torch.randn(samples, C, 4, generator=generator), torch.randint(2, (samples,), generator=generator)


class Net(nn.Module):
    """A norm of what comes in, perhaps narrowed before or run again in the backward pass, and a classifier."""

    def __init__(self, name: str, narrow: torch.dtype | None = None, again: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.head = build_norm(name, C, 1), nn.Linear(C, 2)
        self.narrow, self.again = narrow, again

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.narrow is None else x.to(self.narrow)
        y = checkpoint(self.norm, x, use_reentrant=False) if self.again else self.norm(x)
        return self.head(y.mean(2))


def expected(name: str, batches: list[Tensor]) -> list[Tensor]:
    """Mean and variance after these batches, one by one."""
    mean, var = torch.zeros(C).double(), torch.ones(C).double()
    formula = Formula(C, MOMENTUM, EPS, None)
    for x in (batch.double() for batch in batches):
        if name == "running":
            formula.step(x, torch.zeros_like(x), torch.ones(C).double(), torch.zeros(C).double())
        values = x.transpose(0, 1).flatten(1)
        mean = (1 - MOMENTUM) * mean + MOMENTUM * values.mean(1)
        var = (1 - MOMENTUM) * var + MOMENTUM * values.var(1)
    return list(formula.running) if name == "running" else [mean, var]


def trained(model: Net, *callbacks: Callback, **options) -> Learner:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    learner = Learner(model, TensorBatches(*data(), BATCH), optimizer=optimizer, callbacks=callbacks, **options)
    learner.fit(1)
    return learner


def check(model: Net, name: str, batches: list[Tensor]) -> None:
    found = [model.norm.running_mean, model.norm.running_var]
    for one, other in zip(found, expected(name, batches), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    assert model.norm.num_batches_tracked == len(batches)


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_accumulation_each_batch_counts_by_itself(name):
    model = Net(name)
    trained(model, accumulate=4)
    check(model, name, list(data()[0].split(BATCH)))


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_bfloat16_those_of_the_rounded_values_in_float32(name):
    model = Net(name, narrow=torch.bfloat16)
    trained(model, precision="bfloat16")
    check(model, name, list(data()[0].to(torch.bfloat16).split(BATCH)))


class Overflow(Callback):
    """Makes the gradient of one batch overflow."""

    def after_loss(self) -> None:
        if self.learner.batch == 3:
            self.learner.loss = self.learner.loss * float("inf")


@pytest.mark.parametrize(("accumulate", "left_out"), [(1, [3]), (2, [2, 3])])
@pytest.mark.parametrize("name", WITH_STATISTICS)
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
    check(model, name, [batch for number, batch in enumerate(batches) if number not in left_out])
    assert learner.step == len(batches) // accumulate - 1


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_activation_checkpoint_each_batch_once(name):
    model = Net(name, again=True)
    trained(model)
    check(model, name, list(data()[0].split(BATCH)))


@pytest.mark.parametrize("name", ["group", "instance", "layer", "rms"])
def test_norms_of_each_image_hold_none(name):
    assert not list(build_norm(name, 8).buffers())

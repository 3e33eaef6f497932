"""The task and the tables of the flagship's study."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from normlab.kernels import running
from normlab.nn import RunningBatchNorm2d
from normlab.study.named import find_named

FOLDER = Path(__file__).parents[2] / "studies" / "flagship"


@pytest.fixture
def task():
    module = sys.modules[find_named("model", f"{FOLDER / 'task.py'}:Pools").__module__]
    yield module
    module.in_use.close()


def test_images_have_a_contrast_of_their_own_and_a_seed_orders_them(task):
    (one, held_out), (other, _) = (task.contrast_data(50, seed) for seed in (0, 1))
    assert (len(one), len(held_out)) == (80, 8)
    assert torch.equal(one.dataset.x, other.dataset.x)
    assert not torch.equal(next(iter(one))[1], next(iter(other))[1])
    contrast = one.dataset.x.std((1, 2, 3)).log()
    assert contrast.std() == pytest.approx(task.SPREAD, rel=0.1)


def test_a_network_has_the_constants_of_its_name(task):
    before = running.CONSTANTS
    model = task.convnet_with_constants("S 200, T 0.6", num_classes=10, in_channels=1)
    assert any(isinstance(layer, RunningBatchNorm2d) for layer in model.modules())
    assert (running.CONSTANTS.steady_images, running.CONSTANTS.tolerated_drift) == (200, 0.6)
    task.residual_net_with_constants("S 64, T 0.2")
    assert before == running.CONSTANTS, "64 and 0.2 are the rule's own"
    task.residual_net_with_constants("S 8, T 0")
    assert (running.CONSTANTS.steady_images, running.CONSTANTS.tolerated_drift) == (8, 0)


def test_each_image_steps_once_an_epoch(task):
    x, y = torch.arange(40.0), torch.arange(40)
    batches = list(task.Pools(x, y, seed=0))
    assert len(batches) == len(task.Pools(x, y, seed=0)) == 20
    assert {len(pool) for pool, _ in batches} == {32}
    assert sorted(torch.cat([pool[:2] for pool, _ in batches]).tolist()) == x.tolist()
    assert all(torch.equal(pool, targets.float()) for pool, targets in batches)


def test_a_pool_steps_by_its_first_images_alone(task):
    """The gradient of weights, γ and β is that of the mean over two; that of the input is there for all 32."""
    torch.manual_seed(0)
    net = task.with_pools(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3)), own=False
    )
    last = net[3].layer
    x = torch.randn(32, 1, 8, 8, requires_grad=True)
    inner = net[:3](x)
    net[3](inner).square().mean((1, 2, 3)).mean().backward()
    few = torch.autograd.grad(last(inner[:2].detach()).square().mean((1, 2, 3)).mean(), list(last.parameters()))
    for parameter, expected in zip(last.parameters(), few, strict=True):
        torch.testing.assert_close(parameter.grad, expected)
    assert x.grad.abs().flatten(1).sum(1).min() > 0
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.eval()
    assert net(x[:1]).shape == (1, 2, 4, 4)


def test_pools_normalise_by_all_images(task):
    torch.manual_seed(0)
    norm, x = task.PoolNorm(3, own=False), torch.randn(32, 3, 4, 4) * 3 + 1
    torch.testing.assert_close(norm(x), nn.functional.batch_norm(x, None, None, training=True))
    torch.testing.assert_close(norm.mean, x.mean((0, 2, 3)))


def test_the_tables_are_those_of_the_runs():
    assert find_named("tables", f"{FOLDER / 'tables.py'}:tables")() == (FOLDER / "tables.md").read_text()

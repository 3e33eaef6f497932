"""Statistics that never saw a batch say nothing, whichever way they arrive."""

import io

import pytest
import torch
from torch import nn

from normlab.nn import NORMS, MovingAverageBatchNorm2d, RunningBatchNorm2d, build_norm

WITH_STATISTICS = [name for name in NORMS if hasattr(build_norm(name, 4), "num_batches_tracked") and name != "frozen"]
BATCH = 3 * torch.randn(16, 4, 5, 5, generator=torch.Generator().manual_seed(0)) + 5


def trained():
    norm = nn.BatchNorm2d(4)
    for scale in (1, 2, 3):
        norm(scale * BATCH)
    return norm


def without_counter(state):
    return {name: value for name, value in state.items() if name != "num_batches_tracked"}


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def of_an_old_checkpoint(state):
    old = nn.BatchNorm2d(4)
    old.load_state_dict(without_counter(state))  # torch counts from 0
    return old.state_dict()


ROADS = [dict, without_counter, through_a_file, of_an_old_checkpoint]


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_a_batch_norm_that_never_saw_a_batch_loads_as_a_new_layer(name, road):
    loaded, new = build_norm(name, 4), build_norm(name, 4)
    loaded.load_state_dict(road(nn.BatchNorm2d(4).state_dict()), strict=False)
    for step in range(1, 4):
        torch.testing.assert_close(loaded(step * BATCH), new(step * BATCH), rtol=0, atol=0)
    for (kind, one), other in zip(loaded.named_buffers(), new.buffers(), strict=True):
        assert torch.equal(one, other), kind


@pytest.mark.parametrize("road", ROADS)
def test_the_first_batch_is_the_statistics_of_running_batch_norm(road):
    norm = RunningBatchNorm2d(4)
    norm.load_state_dict(road(nn.BatchNorm2d(4).state_dict()), strict=False)
    assert norm.share == 1
    norm(BATCH)
    values = BATCH.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean.double(), values.mean(1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(norm.running_var.double(), values.var(1, correction=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("name", ["running", "running_lesson", "renorm", "sync", "ghost", "frozen", "batch"])
def test_statistics_of_a_trained_batch_norm_are_kept(name, road):
    norm, old = build_norm(name, 4), trained()
    norm.load_state_dict(road(old.state_dict()), strict=False)
    torch.testing.assert_close(norm.eval()(BATCH), old.eval()(BATCH), rtol=1e-5, atol=1e-5)
    if name == "running":
        assert norm.share == pytest.approx(norm.momentum)


def test_statistics_that_were_taken_over_follow_an_input_that_grows():
    """Where weights move fast they must: a layer that lags lets the next step overshoot, and the net is lost."""
    norm, old = RunningBatchNorm2d(4), trained()
    norm.load_state_dict(old.state_dict())
    for step in range(40):
        x = BATCH[step % 8 :: 8] * 1.2**step
        norm(x)
        assert (norm.running_var / x.var((0, 2, 3))).mean() > 0.4  # 0.15 where a batch had a share of 0.01 at first


def test_moving_average_batch_norm_takes_no_averages_that_nobody_measured():
    norm, old = MovingAverageBatchNorm2d(4), trained()
    old.num_batches_tracked.fill_(5000)
    norm.load_state_dict(old.state_dict(), strict=False)
    y = norm.train()(BATCH)
    expected = BATCH.double() / (BATCH.double().square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert not norm.running_mean.any()
    second_moment = old.running_var + old.running_mean.square()
    moved = torch.lerp(second_moment, BATCH.square().mean((0, 2, 3)), norm.momentum)
    torch.testing.assert_close(norm.running_var, moved)

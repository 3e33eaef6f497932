"""Norms of other people's classes: what is known of them is used, the rest is left and named."""

import torch
from torch import nn

import normlab
from normlab.surgery import fold, recalibrate


class Centered(nn.Module):
    """Has running statistics, and little else of batch norm."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return x - self.running_mean[:, None, None]


class CenteredNorm(Centered):
    def forward(self, x):
        if self.training:
            self.running_mean.lerp_(x.mean((0, 2, 3)), 0.1)
            self.running_var.lerp_(x.transpose(0, 1).flatten(1).var(1), 0.1)
        return super().forward(x)


class FrozenNorm(nn.Module):
    """As detection libraries have it: batch norm's parts as buffers, and no counter."""

    def __init__(self, channels):
        super().__init__()
        self.eps = 1e-5
        for name, value in {"weight": 2.0, "bias": 1.0, "running_mean": 0.5, "running_var": 3.0}.items():
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def net(norm):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm(4)), [torch.randn(4, 3, 5, 5) for _ in range(3)]


UNKNOWN = "of a class that is not known, and in evaluation no scale and shift by its statistics, γ and β"


def test_a_norm_without_the_parts_of_batch_norm_is_left_and_named():
    model, batches = net(CenteredNorm)
    assert [row.note for row in normlab.convert(model, "running").report] == [UNKNOWN]
    assert [row.note for row in normlab.freeze(model).report] == [UNKNOWN]
    assert [row.note for row in fold(model, batches[0])[1]] == ["is no scale and shift in evaluation"]
    assert normlab.diagnose(model, batches).layers[0].offset is None


def test_statistics_are_measured_without_a_counter_too():
    model, batches = net(CenteredNorm)
    recalibrate(model, batches)
    expected = model[0](torch.cat(batches)).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, expected, rtol=1e-4, atol=1e-5)


def test_what_computes_as_batch_norm_does_is_folded_and_diagnosed():
    model, batches = net(FrozenNorm)
    folded, report = fold(model, batches[0])
    assert [row.became for row in report] == ["torch Identity"]
    torch.testing.assert_close(folded(batches[1]), model(batches[1]), rtol=1e-4, atol=1e-5)
    assert normlab.diagnose(model, batches).layers[0].offset > 0.1

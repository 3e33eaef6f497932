"""Passes that shall not count."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from checks import assert_same_state
from normlab.nn import NORMS, build_norm
from normlab.surgery import kept_statistics


@pytest.mark.parametrize("norm", [*NORMS, "torch"])
def test_passes_inside_leave_no_trace(norm):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(8) if norm == "torch" else build_norm(norm, 8)
    x, other = torch.randn(2, 4, 8, 3, 3).requires_grad_()
    layer(x).square().sum().backward()
    before, buffers = deepcopy(layer), list(layer.buffers())
    with kept_statistics(layer):
        layer(other).square().sum().backward()
    assert_same_state(layer, before)
    assert all(now is then for now, then in zip(layer.buffers(), buffers, strict=True))
    assert torch.equal(layer(x), before(x))


def test_so_it_is_after_an_error():
    layer, x = nn.BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    before = deepcopy(layer)

    def fails():
        with kept_statistics(layer):
            layer(x)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert_same_state(layer, before)

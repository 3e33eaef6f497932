"""A norm that remembers gradients is the same at every loss scale, and when the scale changes."""

import copy

import pytest
import torch

from normlab.nn import NORMS, build_norm

REMEMBER = [name for name in NORMS if getattr(build_norm(name, 4), "of_gradients", ())]
LR = 0.1


def test_those_with_an_average_of_gradients_say_so():
    assert REMEMBER == ["running", "running_instance", "mabn", "online"]


@pytest.mark.parametrize("name", REMEMBER)
def test_a_change_of_the_scale_changes_nothing(name):
    """Of powers of two: what is computed differs by nothing but the exponent, and by the rounding of a logarithm."""
    torch.manual_seed(0)
    plain = build_norm(name, 4).double()
    layer, scale = copy.deepcopy(plain), 1024.0
    layer.rescale_gradients(scale)
    for number in range(40):
        if number in (10, 25):
            factor = 2.0 if number == 10 else 0.5
            scale *= factor
            layer.rescale_gradients(factor)
        x, grad = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
        found = []
        for norm, by in ((plain, 1.0), (layer, scale)):
            inputs = x.clone().requires_grad_()
            y = norm(inputs)
            y.backward(grad * by)
            gradients = [part.grad / by for part in norm.parameters()]
            found.append([y.detach(), inputs.grad / by, *gradients])
            with torch.no_grad():
                for part, gradient in zip(norm.parameters(), gradients, strict=True):
                    part -= LR * gradient
            norm.zero_grad()
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

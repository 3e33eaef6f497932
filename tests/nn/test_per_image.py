"""What per-image norms share: γ and β, the check of the shape, and statistics over space."""

import pytest
import torch

from normlab.errors import InputError
from normlab.nn.per_image import PerImageNorm, check_channels, in_float32, instance_moments, scale_shift


def test_parameters_are_batch_norms():
    layer = PerImageNorm(3, dtype=torch.float64)
    assert torch.equal(layer.weight, torch.ones(3).double())
    assert torch.equal(layer.bias, torch.zeros(3).double())
    assert not list(PerImageNorm(3, affine=False).parameters())
    with pytest.raises(InputError, match="num_features=0"):
        PerImageNorm(0)


@pytest.mark.parametrize("shape", [(3,), (2, 4), (2, 1, 4, 4), (3, 2, 4)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(InputError, match=r"PerImageNorm\(3\): expected input \(N, 3, \*space\), got"):
        check_channels(PerImageNorm(3), torch.randn(shape))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (0, 3, 4, 4), (2, 3, 1, 1, 1)])
def test_the_right_channels_are_accepted(shape):
    check_channels(PerImageNorm(3), torch.randn(shape))


@pytest.mark.parametrize("space", [(4,), (2, 3), (2, 1, 3)])
def test_instance_moments_in_float32_at_least(space):
    x = torch.randn(2, 3, *space).double()
    mean, var = instance_moments(x)
    assert mean.shape == var.shape == (2, 3, *[1] * len(space))
    for image in range(2):
        for channel in range(3):
            values = x[image, channel].flatten()
            torch.testing.assert_close(mean[image, channel].flatten()[0], values.sum() / len(values))
            torch.testing.assert_close(var[image, channel].flatten()[0], values.var(correction=0))
    assert instance_moments(x.half())[1].dtype == torch.float32


def test_without_space_a_value_is_its_own_mean():
    x = torch.randn(4, 3).half()
    mean, var = instance_moments(x)
    assert torch.equal(mean, x.float())
    assert torch.equal(var, torch.zeros(4, 3))


def test_scale_shift_is_per_channel():
    x, weight, bias = torch.randn(2, 3, 3), torch.randn(3), torch.randn(3)
    expected = torch.stack([x[:, c] * weight[c] + bias[c] for c in range(3)], 1)
    torch.testing.assert_close(scale_shift(x, weight, bias), expected)
    torch.testing.assert_close(scale_shift(x, None, bias), expected - x * weight.view(3, 1) + x)
    assert scale_shift(x, None, None) is x


def test_in_float32_keeps_float64():
    assert [in_float32(torch.ones(1, dtype=dtype)).dtype for dtype in (torch.float16, torch.float64)] == [
        torch.float32,
        torch.float64,
    ]

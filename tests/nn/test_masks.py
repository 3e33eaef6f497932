"""Padded batches: with a mask the statistics are those of the values that count, whatever the padding holds."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from normlab.errors import InputError
from normlab.nn import NORMS, build_norm

NAMES = [name for name in NORMS if name != "none"]
STATE = [*nn.BatchNorm2d(8).state_dict()]
# Those that are batch norm but for what they average, and have its state.
AVERAGING = [name for name, norm in NORMS.items() if norm.averages and [*build_norm(name, 8).state_dict()] == STATE]
OF_IMAGES = [name for name, norm in NORMS.items() if norm.over == "each image"]
LENGTHS = torch.tensor([20, 7, 13, 4, 1, 11])
MASK = torch.arange(20) < LENGTHS[:, None]


def sequences(dtype=torch.float32, padding=0.0):
    x = torch.randn(6, 8, 20, generator=torch.Generator().manual_seed(0)).to(dtype) * 2 + 5
    return torch.where(MASK[:, None], x, padding)


def steps(norm, padding, mask=MASK, count=3):
    """Outputs, gradients and buffers of some steps whose loss is of the values that count."""
    found = []
    for step in range(count):
        x = sequences(next(norm.parameters()).dtype, padding) * (1 + step)
        x = x.requires_grad_()
        y = norm(x, mask=mask)
        of_loss = torch.randn(y.shape, generator=torch.Generator().manual_seed(step)).to(y.dtype)
        torch.where(MASK[:, None], y * of_loss, 0).sum().backward()
        counted = MASK[:, None].expand(x.shape)
        found += [y.detach()[counted], x.grad[counted]]
    return [*found, *(p.grad for p in norm.parameters()), *(b.clone() for b in norm.buffers())]


def close(one, other, tolerance=1e-5):
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", AVERAGING)
def test_statistics_are_those_of_the_frames_alone(name):
    norm = build_norm(name, 8, dims=1).double()
    x = sequences(torch.float64)
    frames = x.transpose(1, 2)[MASK]
    mean, var = frames.mean(0), frames.var(0, correction=0)
    y = norm(x, mask=MASK)
    expected = (frames - mean) / (var + norm.eps).sqrt()
    torch.testing.assert_close(y.transpose(1, 2)[MASK], expected)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean)
    if name != "renorm":  # which averages deviations
        torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * frames.var(0))
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["running", "running_lesson"])
def test_the_first_frames_are_the_running_statistics(name):
    norm = build_norm(name, 8, dims=1).double()
    frames = sequences(torch.float64).transpose(1, 2)[MASK]
    norm(sequences(torch.float64), mask=MASK)
    torch.testing.assert_close(norm.running_mean, frames.mean(0))
    torch.testing.assert_close(norm.running_var, frames.var(0, correction=0))


def test_the_gradient_is_that_of_a_batch_of_the_frames():
    norm, plain = build_norm("batch", 8, dims=1).double(), nn.BatchNorm1d(8).double()
    x, other = (sequences(torch.float64).requires_grad_() for _ in range(2))
    of_loss = torch.randn(int(MASK.sum()), 8, dtype=torch.float64)
    (norm(x, mask=MASK).transpose(1, 2)[MASK] * of_loss).sum().backward()
    (plain(other.transpose(1, 2)[MASK]) * of_loss).sum().backward()
    close([x.grad, norm.weight.grad, norm.bias.grad], [other.grad, plain.weight.grad, plain.bias.grad], 1e-9)


@pytest.mark.parametrize("name", OF_IMAGES)
def test_an_image_is_normalised_as_if_it_had_no_padding(name):
    norm = build_norm(name, 8, dims=1).double()
    x = sequences(torch.float64, padding=9.0)
    y = norm(x, mask=MASK)
    for image, length in enumerate(LENGTHS):
        torch.testing.assert_close(y[image, :, :length], norm(x[image : image + 1, :, :length])[0])


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_padding_holds_does_not_matter(name, mode):
    torch.manual_seed(0)
    norm = build_norm(name, 8, dims=1).double().train(mode)
    other = deepcopy(norm)
    close(steps(norm, 0.0), steps(other, 77.0), 1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_all_is_no_mask(name):
    norm = build_norm(name, 8, dims=1)
    other = deepcopy(norm)
    close(steps(norm, 1.0, torch.ones_like(MASK)), steps(other, 1.0, None), 2e-4)


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_of_which_nothing_counts_changes_no_statistics(name):
    norm = build_norm(name, 8, dims=1)
    for _ in range(2):
        norm(sequences())
    kept = deepcopy(norm.state_dict())
    x = sequences().requires_grad_()
    y = norm(x, mask=torch.zeros_like(MASK))
    assert y.isfinite().all()
    y.sum().backward()
    assert x.grad.isfinite().all()
    for key, value in norm.state_dict().items():
        assert torch.equal(value, kept[key]), key
    if name in (*AVERAGING, "running", "running_lesson"):
        torch.testing.assert_close(y, norm.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_has_a_mask_too(name):
    norm = build_norm(name, 8, dims=1)
    kept = deepcopy(norm.state_dict())
    assert norm(sequences()[:0], mask=MASK[:0]).shape == (0, 8, 20)
    for key, value in norm.state_dict().items():
        assert torch.equal(value, kept[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_a_mask_of_another_shape_is_refused(name):
    norm = build_norm(name, 8, dims=1)
    for mask in (MASK[:, None], MASK.T, MASK[:, :5], MASK.float()):
        with pytest.raises(InputError, match=r"\(8\): expected mask torch.bool of \(6, 20\)"):
            norm(sequences(), mask=mask)


def test_images_and_features_too():
    x, mask = torch.randn(4, 8, 5, 6), torch.rand(4, 5, 6) < 0.5
    norm = build_norm("batch", 8)
    norm(x, mask=mask)
    torch.testing.assert_close(norm.running_mean, 0.1 * x.permute(0, 2, 3, 1)[mask].mean(0))
    norm = build_norm("batch", 8, dims=1)
    norm(x[:, :, 0, 0], mask=mask[:, 0, 0])
    torch.testing.assert_close(norm.running_mean, 0.1 * x[:, :, 0, 0][mask[:, 0, 0]].mean(0), equal_nan=True)

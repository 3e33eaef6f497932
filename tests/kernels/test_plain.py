"""The operator with a written-out gradient equals the plain function and the formula in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck

import reference
from checks import assert_close, cases, double, gradients, statistics_dtype
from normlab.kernels.plain import normalize_with_share
from normlab.kernels.running import State, normalize_with_memory
from normlab.nn import functional as F

EXAMPLES = settings(max_examples=100, deadline=None)
EPS = 1.0  # so large that no gradient is the small difference of large terms, which half precision rounds apart
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of `assert_close`


def some_moments(channels: int) -> tuple[Tensor, Tensor]:
    return torch.randn(channels), torch.rand(channels) + 0.1


@EXAMPLES
@given(cases(), st.floats(0.05, 1), st.sampled_from([0.0, 3.0, 500.0]))
def test_fast_equals_plain_equals_float64(case, alpha, total):
    x, grad, *parameters = case
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    state = F.RunningState(*(part.to(dtype) for part in (*some_moments(channels), torch.tensor(total))))
    after, share = F.update_running(x, state, alpha)

    def fast_function(x, weight, bias):
        return normalize_with_share(x, after.mean, after.var, weight, bias, share, share, EPS)

    def plain_function(x, weight, bias):
        return F.lesson_running_batch_norm(x, state, weight, bias, EPS, alpha)[0]

    fast, plain = (gradients(function, grad, x, *parameters) for function in (fast_function, plain_function))
    values = double([x, grad, after.mean, after.var, *parameters, share, share])
    float64 = reference.normalize_with_share(*values, EPS)
    assert [value.dtype for value in fast[:2]] == [x.dtype] * 2
    assert all(value is None or value.dtype == given.dtype for value, given in zip(fast[2:], parameters, strict=True))
    assert_close(fast, float64, TOLERANCE[x.dtype])
    assert_close(plain, float64, TOLERANCE[x.dtype])


@EXAMPLES
@given(cases(), st.floats(0, 1), st.booleans())
def test_any_share_gives_the_gradient_of_the_formula(case, mean_share, per_channel):
    """Also shares of mean and variance that differ, and one for each channel."""
    x, grad, *parameters = case
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    mean, var = (part.to(dtype) for part in some_moments(channels))
    shares = torch.tensor(mean_share, dtype=dtype), torch.rand(channels).to(dtype)
    if per_channel:
        shares = shares[::-1]
    fast = gradients(lambda x, w, b: normalize_with_share(x, mean, var, w, b, *shares, EPS), grad, x, *parameters)
    float64 = reference.normalize_with_share(*double([x, grad, mean, var, *parameters, *shares]), EPS)
    assert_close(fast, float64, TOLERANCE[x.dtype])


def example(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True), *(torch.randn(shape[1], dtype=dtype) for _ in "γβ")]


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (1, 4, 2, 2), (2, 4, 1, 2, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("total", [0.0, 20.0], ids=["first batch", "later batch"])
def test_gradient_is_the_derivative_with_the_state_held(shape, total):
    """Numerically: mean and variance move with the input, as far as this batch is in them."""
    state = F.RunningState(
        torch.linspace(-1, 1, 4).double(), torch.linspace(0.5, 2, 4).double(), torch.tensor(total).double()
    )

    def step(x, weight, bias):
        with torch.no_grad():
            after, share = F.update_running(x, state, 0.3)
        return normalize_with_share(x, after.mean, after.var, weight, bias, share, share, 0.1)

    x, weight, bias = example(*shape)
    assert gradcheck(step, (x, weight.requires_grad_(), bias.requires_grad_()))
    assert gradcheck(lambda x: step(x, None, None), (x,))


def test_shares_of_one_are_batch_norm():
    x, weight, bias = example(4, 3, 5, 5)
    var, mean = torch.var_mean(x.detach(), (0, 2, 3), correction=0)
    one, grad = torch.ones(()).double(), torch.randn(x.shape).double()
    fast = gradients(lambda x, w, b: normalize_with_share(x, mean, var, w, b, one, one, 1e-5), grad, x, weight, bias)
    torchs = gradients(
        lambda x, w, b: torch.nn.functional.batch_norm(x, None, None, w, b, training=True), grad, x, weight, bias
    )
    assert_close(fast, torchs, 1e-12)


def test_shares_of_zero_are_a_frozen_norm():
    x, weight, bias = example(4, 3, 5, 5)
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.1
    zero, grad = torch.zeros(()).double(), torch.randn(x.shape).double()
    fast = gradients(lambda x, w, b: normalize_with_share(x, mean, var, w, b, zero, zero, 1e-5), grad, x, weight, bias)
    torchs = gradients(lambda x, w, b: torch.nn.functional.batch_norm(x, mean, var, w, b), grad, x, weight, bias)
    assert_close(fast, torchs, 1e-12)


@pytest.mark.parametrize("asked", range(3), ids=["x", "weight", "bias"])
def test_only_the_gradients_that_are_asked_for(asked):
    inputs = [value.detach() for value in example(4, 3, 5)]
    inputs[asked].requires_grad_()
    share = torch.tensor(0.5).double()
    normalize_with_share(inputs[0], torch.zeros(3), torch.ones(3), *inputs[1:], share, share, EPS).sum().backward()
    assert [value.grad is not None for value in inputs] == [number == asked for number in range(3)]


def test_the_mean_is_subtracted_first():
    """In float32 1000/.001 has lost the digits that the difference from the mean is made of."""
    x, share = (1000 + torch.arange(-8, 8) / 4096).view(4, 1, 4), torch.tensor(0.5)
    y = normalize_with_share(x, torch.tensor([1000.0]), torch.tensor([1e-6]), None, None, share, share, 0.0)
    torch.testing.assert_close(y.double(), (x.double() - 1000) / 1e-3, rtol=1e-6, atol=0)


def test_large_sums_of_half_gradients_do_not_overflow():
    """Their sum is 4e6 and float16 ends at 65504."""
    x, bias, share = (
        torch.randn(4, 1, 32, 32).half().requires_grad_(),
        torch.zeros(1, requires_grad=True),
        torch.ones(()),
    )
    normalize_with_share(x, torch.zeros(1), torch.ones(1), None, bias, share, share, EPS).backward(
        torch.full((4, 1, 32, 32), 1000.0).half()
    )
    assert bias.grad.item() == 4096 * 1000
    assert x.grad.isfinite().all()


def test_inputs_stay_as_they_are():
    x, weight, bias = example(4, 3, 5, dtype=torch.float32)
    inputs = [x.detach(), torch.randn(3), torch.rand(3), weight, bias, torch.rand(3), torch.rand(3)]
    copies = [value.clone() for value in inputs]
    grad = torch.randn(4, 3, 5)
    grad_copy = grad.clone()
    inputs[0].requires_grad_()
    normalize_with_share(*inputs, EPS).backward(grad)
    assert all(torch.equal(one, other) for one, other in zip([*inputs, grad], [*copies, grad_copy], strict=True))


def test_two_forwards_before_a_backward():
    share = torch.tensor(0.5)

    def once(x):
        return normalize_with_share(x, x.detach().mean((0, 2)), torch.ones(3), None, None, share, share, EPS)

    first, second = (torch.randn(4, 3, 5, requires_grad=True) for _ in range(2))
    a, b = once(first), once(second)
    (a.pow(2).sum() + b.pow(3).sum()).backward()
    for x, power in ((first, 2), (second, 3)):
        alone = x.detach().requires_grad_()
        once(alone).pow(power).sum().backward()
        assert torch.equal(alone.grad, x.grad)


def test_memory_format_is_kept():
    x = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    share = torch.tensor(0.5)
    y = normalize_with_share(x, torch.zeros(3), torch.ones(3), None, None, share, share, EPS)
    y.pow(2).sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_second_derivative_is_refused():
    x = example(4, 3, 5)[0]
    share = torch.tensor(0.5).double()
    y = normalize_with_share(x, torch.zeros(3), torch.ones(3), None, None, share, share, EPS)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@EXAMPLES
@given(cases())
def test_with_memory_at_rate_one_it_is_batch_norm(case):
    x, grad, *parameters = case
    channels, dtype = x.shape[1], statistics_dtype(x.dtype)
    mean, var = (part.view(-1) for part in F.moments(x, (0, *range(2, x.dim()))))
    state = State._make(part.to(dtype) for part in State.empty(channels))

    def fast_function(x, weight, bias):
        return normalize_with_memory(x, mean, var, weight, bias, torch.ones((), dtype=dtype), state.memory, None, EPS)

    fast = gradients(fast_function, grad, x, *parameters)
    values = double([x, *parameters])
    expected = gradients(lambda *v: reference.batch_norm(*v, EPS), grad.double(), *values)
    share = min(1, (len(x) / 64) ** 0.5)
    expected[2:] = [None if value is None else value * share for value in expected[2:]]
    assert_close(fast, expected, TOLERANCE[x.dtype])
    x_hat = reference.normalize(values[0], *reference.channel_moments(values[0]), None, None, EPS)
    dims, n = [0, *range(2, x.dim())], x.numel() / channels
    average = torch.stack([grad.double().sum(dims), (grad.double() * x_hat).sum(dims)]) / n
    assert_close([state.gradient_latest], [average], TOLERANCE[x.dtype])


def test_memory_is_written_by_the_backward_pass_alone_and_each_time():
    x, state = torch.randn(2, 3, 4), State.empty(3)
    one, zero, rate = torch.ones(3), torch.zeros(3), torch.tensor(0.25)
    weight, bias = one.clone().requires_grad_(), zero.clone().requires_grad_()
    y = normalize_with_memory(x, zero, one, weight, bias, rate, state.memory, 1e9, 0.0)
    assert all(part.abs().max() == 0 for part in state.memory)
    y.sum().backward(retain_graph=True)
    torch.testing.assert_close(state.gradient_latest[0], torch.full((3,), 1.0))
    assert state.gradient_average.abs().max() == 0  # the batch enters when its step is known
    y.sum().backward()
    torch.testing.assert_close(state.gradient_average[0], torch.full((3,), 0.25))
    torch.testing.assert_close(state.parameters_gradient[1], torch.full((3,), 16.0 * (2 / 64) ** 0.5))

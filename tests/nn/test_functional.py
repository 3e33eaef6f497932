"""The norms as plain functions equal their formulas in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import reference
from checks import Case, assert_close, cases, double, gradients, statistics_dtype
from normlab.nn import functional as F
from normlab.nn.functional import RunningState

EXAMPLES = settings(max_examples=60, deadline=None)
EPS = 1.0  # so large that no gradient is the small difference of large terms, which half precision rounds apart
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}  # of `assert_close`


def assert_equal_to_float64(function, formula, case: Case) -> None:
    x, grad, *parameters = case
    actual = gradients(function, grad, x, *parameters)
    assert [value.dtype for value in actual[:2]] == [x.dtype] * 2
    assert_close(actual, gradients(formula, *double([grad, x, *parameters])), TOLERANCE[x.dtype])


def frozen(mean: Tensor, var: Tensor, min_var: float | None):
    """The norm with these statistics, the variance held at its minimum."""
    var = var if min_var is None else var.clamp(min=min_var)
    return lambda x, weight, bias: reference.normalize(x, mean, var, weight, bias, EPS)


def some_state(channels: int, dtype=torch.float32, total: float = 50.0) -> RunningState:
    mean, var = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype) + 0.1
    return RunningState(mean, var, torch.tensor(total, dtype=dtype))


def some_constant_state() -> RunningState:
    mean, var = torch.linspace(-1, 1, 4, dtype=torch.float64), torch.linspace(0.5, 2, 4, dtype=torch.float64)
    return RunningState(mean, var, torch.tensor(20.0, dtype=torch.float64))


def empty_state(channels: int = 4) -> RunningState:
    return RunningState(torch.zeros(channels).double(), torch.ones(channels).double(), torch.tensor(0.0).double())


@EXAMPLES
@given(cases())
def test_batch_norm_is_its_formula(case):
    assert_equal_to_float64(
        lambda x, weight, bias: F.batch_norm(x, weight, bias, EPS),
        lambda x, weight, bias: reference.batch_norm(x, weight, bias, EPS),
        case,
    )


@EXAMPLES
@given(cases(), st.data())
def test_group_norm_is_its_formula(case, data):
    channels = case.x.shape[1]
    groups = data.draw(st.sampled_from([g for g in range(1, channels + 1) if channels % g == 0]))
    assert_equal_to_float64(
        lambda x, weight, bias: F.group_norm(x, groups, weight, bias, EPS),
        lambda x, weight, bias: reference.group_norm(x, weight, bias, groups, EPS),
        case,
    )


@EXAMPLES
@given(cases(), st.floats(0.05, 1), st.sampled_from([0.0, 3.0, 500.0]), st.sampled_from([None, 0.5]))
def test_running_batch_norm_is_its_formula(case, alpha, total, min_var):
    state = some_state(case.x.shape[1], statistics_dtype(case.x.dtype), total)
    floor = None if min_var is None else torch.tensor(min_var, dtype=state.var.dtype)
    new = []

    def function(x, weight, bias):
        y, state_after = F.lesson_running_batch_norm(x, state, weight, bias, EPS, alpha, floor)
        new.append(state_after)
        return y

    def formula(x, weight, bias):
        return frozen(*reference.Sums.of(*state).after(x, alpha).moments(), min_var)(x, weight, bias)

    assert_equal_to_float64(function, formula, case)
    expected = reference.Sums.of(*state).after(case.x.double(), alpha)
    for one, other in zip(new[0], (*expected.moments(), expected.c), strict=True):
        assert one.dtype == state.mean.dtype
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(cases(), st.sampled_from([None, 0.4]))
def test_normalize_running_is_its_formula(case, min_var):
    state = some_state(case.x.shape[1], statistics_dtype(case.x.dtype))
    floor = None if min_var is None else torch.tensor(min_var, dtype=state.var.dtype)
    assert_equal_to_float64(
        lambda x, weight, bias: F.normalize_running(x, state, weight, bias, EPS, floor),
        frozen(state.mean.double(), state.var.double(), min_var),
        case,
    )


def test_eps_is_one_in_a_hundred_thousand_by_default():
    x = 0.001 * torch.randn(4, 6, 5)
    state = some_state(6)
    assert torch.equal(F.batch_norm(x), F.batch_norm(x, eps=1e-5))
    assert torch.equal(F.group_norm(x, 3), F.group_norm(x, 3, eps=1e-5))
    assert torch.equal(
        F.lesson_running_batch_norm(x, state)[0], F.lesson_running_batch_norm(x, state, eps=1e-5, alpha=0.1)[0]
    )
    assert torch.equal(F.normalize_running(x, state), F.normalize_running(x, state, eps=1e-5))


@pytest.mark.parametrize("dims", [(0, 2), (1, 2), (2,)])
def test_moments_are_the_mean_and_the_mean_squared_distance(dims):
    x = torch.randn(4, 3, 5)
    mean, var = F.moments(x, dims)
    torch.testing.assert_close(mean.double(), x.double().mean(dims, keepdim=True), rtol=0, atol=1e-6)
    expected = x.double().var(dims, correction=0, keepdim=True)
    torch.testing.assert_close(var.double(), expected, rtol=0, atol=1e-6)


def double_input(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("shape", [(3, 4), (2, 4, 3), (1, 4, 2, 2)])
@pytest.mark.parametrize(
    "function",
    [
        lambda x, weight, bias: F.batch_norm(x, weight, bias, 0.1),
        lambda x, weight, bias: F.group_norm(x, 2, weight, bias, 0.1),
        lambda x, weight, bias: F.lesson_running_batch_norm(x, some_constant_state(), weight, bias, 0.1, 0.3)[0],
        lambda x, weight, bias: F.lesson_running_batch_norm(x, empty_state(), weight, bias, 0.1, 0.3)[0],
        lambda x, weight, bias: F.normalize_running(x, some_constant_state(), weight, bias, 0.1),
    ],
    ids=["batch", "group", "running", "running from empty", "evaluation"],
)
def test_first_and_second_derivatives(function, shape):
    torch.manual_seed(0)
    inputs = double_input(*shape), double_input(4), double_input(4)
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_stable_recursion_equals_interpolated_sums(dtype, tolerance):
    """Over steps of varying batch size; the sums are float64."""
    torch.manual_seed(0)
    state, sums = RunningState(*(part.to(dtype) for part in empty_state(3))), reference.Sums.empty(3)
    for batch_size in (1, 7, 2, 32, 1, 1, 5, 64):
        x = (torch.randn(batch_size, 3, 3, 2) * 2 + torch.randn(3, 1, 1)).to(dtype)
        alpha = F.lesson_alpha(batch_size, 0.1)
        state, share = F.update_running(x, state, alpha)
        sums = sums.after(x.double(), alpha)
        mean, var = sums.moments()
        assert share.item() == pytest.approx(alpha * batch_size * 6 / sums.c.item(), rel=1e-5)
        for one, other in zip(state, (mean, var, sums.c), strict=True):
            torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance)


def test_update_leaves_the_old_state_alone():
    before = RunningState(*(part.requires_grad_() for part in some_state(3)))
    copy = [part.detach().clone() for part in before]
    x = torch.randn(4, 3, 2, requires_grad=True)
    new, _ = F.update_running(x, before, 0.3)
    (new.mean.sum() + new.var.sum()).backward()
    assert all(torch.equal(one, other) for one, other in zip(before, copy, strict=True))
    assert all(part.grad is None for part in before)
    assert x.grad is not None


@pytest.mark.parametrize("batch_size", range(1, 30))
def test_share_of_the_first_batch_is_one(batch_size):
    """What stands in mean and variance before leaves no trace of a distance, not even of rounding."""
    empty, far = (RunningState(torch.full((3,), mean), torch.ones(3), torch.tensor(0.0)) for mean in (0.0, 1e6))
    x, alpha = torch.randn(batch_size, 3, 5), F.lesson_alpha(batch_size, 0.1)
    (new, share), (fresh, _) = (F.update_running(x, state, alpha) for state in (far, empty))
    assert share.item() == pytest.approx(1, rel=1e-6)
    assert torch.equal(new.mean, fresh.mean)
    assert torch.equal(new.var, fresh.var)


@pytest.mark.parametrize(
    ("batch_size", "alpha"),
    [(1, 0.1), (2, 0.1), (5, 1 - 0.9 / 2), (17, 1 - 0.9 / 4), (512, 1 - 0.9 / math.sqrt(511))],
)
def test_lesson_alpha(batch_size, alpha):
    assert F.lesson_alpha(batch_size, 0.1) == pytest.approx(alpha, rel=1e-12)


def test_lesson_alpha_is_one_with_momentum_one():
    assert all(F.lesson_alpha(batch_size, 1.0) == 1 for batch_size in (1, 2, 64))


def test_alpha_one_is_batch_norm_from_any_state():
    torch.manual_seed(0)
    grad, *inputs = (torch.randn(shape).double() for shape in ((4, 3, 5), (4, 3, 5), (3,), (3,)))
    state = some_state(3, torch.float64)
    running = gradients(lambda x, *params: F.lesson_running_batch_norm(x, state, *params, alpha=1.0)[0], grad, *inputs)
    batch = gradients(F.batch_norm, grad, *inputs)
    for one, other in zip(running, batch, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["layer", "group", "instance"])
def test_group_norm_of_an_image_does_not_depend_on_the_others(groups):
    x = torch.randn(5, 4, 3, 3)
    together = F.group_norm(x, groups)
    x[1:] = 1e4 * torch.randn(4, 4, 3, 3)
    assert torch.equal(F.group_norm(x, groups)[0], together[0])
    assert torch.equal(F.group_norm(x[:1], groups)[0], together[0])


@pytest.mark.parametrize(
    "norm",
    [
        F.batch_norm,
        lambda x: F.group_norm(x, 2),
        lambda x: F.lesson_running_batch_norm(x, some_constant_state(), alpha=0.3)[0],
    ],
    ids=["batch", "group", "running"],
)
def test_images_may_come_in_any_order(norm):
    x, order = torch.randn(6, 4, 3, dtype=torch.float64), torch.randperm(6)
    torch.testing.assert_close(norm(x[order]), norm(x)[order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "norm",
    [F.batch_norm, lambda x: F.group_norm(x, 4), lambda x: F.group_norm(x, 1)],
    ids=["batch", "instance", "layer"],
)
def test_channels_may_come_in_any_order(norm):
    x, order = torch.randn(6, 4, 3, dtype=torch.float64), torch.randperm(4)
    torch.testing.assert_close(norm(x[:, order]), norm(x)[:, order], rtol=0, atol=1e-12)


def test_variance_far_from_zero_does_not_cancel():
    """Mean 1000 and deviation .1: in float32 the mean of squares minus the squared mean is noise here."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 10, 10) * 0.1 + 1000
    exact = x.double().var((0, 2, 3), correction=0)
    torch.testing.assert_close(F.moments(x, (0, 2, 3))[1].flatten().double(), exact, rtol=1e-4, atol=0)
    state = RunningState(torch.zeros(3), torch.ones(3), torch.tensor(0.0))
    for _ in range(3):
        state, _ = F.update_running(x, state, 0.3)
    torch.testing.assert_close(state.var.double(), exact, rtol=1e-4, atol=0)


def test_normalize_subtracts_first():
    """In float32 1000/.001 has lost the digits that the difference from the mean is made of."""
    x = (1000 + torch.arange(-8, 8) / 4096).view(4, 1, 4)
    y = F.normalize(x, torch.tensor([1000.0]), torch.tensor([1e-6]), None, None, 0.0)
    torch.testing.assert_close(y.double(), (x.double() - 1000) / 1e-3, rtol=1e-6, atol=0)


def test_statistics_of_half_precision_do_not_overflow():
    x = torch.full((4, 2, 64, 64), 3e4, dtype=torch.float16)
    x[::2] = -3e4
    mean, var = F.moments(x, (0, 2, 3))
    assert mean.dtype == var.dtype == torch.float32
    torch.testing.assert_close(var.flatten(), torch.full((2,), 3e4**2), rtol=1e-6, atol=0)
    assert F.batch_norm(x).abs().max() == 1


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_per_channel_goes_along_dimension_1(dims):
    x, values = torch.zeros(2, 3, *[2] * (dims - 2)), torch.tensor([1.0, 2, 3])
    assert torch.equal((x + F.per_channel(values, x)).transpose(0, 1).reshape(3, -1)[:, -1], values)


def test_per_channel_leaves_other_shapes():
    scalar, shaped, x = torch.tensor(2.0), torch.ones(3, 1, 1), torch.zeros(2, 3, 4, 4)
    assert F.per_channel(scalar, x) is scalar
    assert F.per_channel(shaped, x) is shaped

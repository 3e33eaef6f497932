"""Running batch norm equals the lesson's formula in float64, and lives with batch norm's state."""

import copy
import io
import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from checks import (
    assert_close,
    assert_same_state,
    double,
    dtypes,
    gradients,
    layouts,
    statistics_dtype,
    step,
    with_drawn_parameters,
)
from normlab.errors import InputError
from normlab.nn import LessonRunningNorm1d, LessonRunningNorm2d, LessonRunningNorm3d

LAYERS = {1: LessonRunningNorm1d, 2: LessonRunningNorm2d, 3: LessonRunningNorm3d}
STATISTICS = ("running_mean", "running_var", "count")
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # of `assert_close`


def batches(layer: nn.Module, *sizes: int, scale: float = 1.0, shape: tuple = (3, 5, 5)) -> nn.Module:
    """The layer after training steps of these batch sizes."""
    for size in sizes:
        layer(torch.randn(size, *shape, dtype=layer.running_mean.dtype) * scale + torch.arange(3.0).view(3, 1, 1))
    return layer


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_equals_the_lessons_sums_in_float64(data):
    """Over shapes, types, layouts and batch sizes: output, gradients and buffers at every step; then evaluation."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims = data.draw(st.integers(0, 3))
    channels, space = data.draw(st.integers(1, 4)), data.draw(st.tuples(*[st.integers(1, 4)] * dims))
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 18]), min_size=1, max_size=4))
    dtype = data.draw(dtypes)
    layout = data.draw(layouts)
    momentum, eps = data.draw(st.sampled_from([0.1, 0.6, 1.0])), 0.01
    layer = with_drawn_parameters(LAYERS[max(dims, 1)](channels, eps, momentum))
    if data.draw(st.booleans()) or dtype == torch.float64:
        layer.to(dtype)
    formula = reference.LessonRunningBatchNorm(channels, momentum, eps)
    scale = data.draw(st.sampled_from([0.05, 1.0]))  # a variance below and above the minimum

    for size in [*sizes, 0]:
        layer.train(size > 0)
        x, grad = (torch.randn(size or 2, channels, *space).to(dtype) for _ in range(2))
        x = layout(scale * x)
        actual = step(layer, x, grad)
        expected = gradients(partial(formula, size > 0), *double([grad, x, layer.weight, layer.bias]))
        assert [actual[0].dtype, actual[1].dtype] == [dtype] * 2
        assert_close(actual, expected, TOLERANCE[dtype])
        buffers = [getattr(layer, name) for name in STATISTICS]
        assert_close(buffers, [*formula.sums.moments(), formula.sums.c], min(TOLERANCE[dtype], 1e-4))
        assert layer.num_samples_tracked == formula.seen
    assert layer.num_batches_tracked == len(sizes)
    assert all(getattr(layer, name).dtype == statistics_dtype(dtype) for name in STATISTICS)


def test_gradient_is_that_of_the_docstring():
    """γ/√(σ²+eps) · [g − (w/n)(Σg + x̂ Σ g x̂)], after batches of other sizes."""
    torch.manual_seed(0)
    layer = batches(with_drawn_parameters(LessonRunningNorm2d(3).double()), 32, 7)
    before = layer.count.item()
    x, grad = torch.randn(5, 3, 4, 4).double(), torch.randn(5, 3, 4, 4).double()
    _, grad_x, _, _ = step(layer, x, grad)
    n, alpha = 5 * 4 * 4, 1 - 0.9 / 2
    share = alpha * n / ((1 - alpha) * before + alpha * n)
    assert 0.1 < share < 0.9
    statistics = layer.running_mean, layer.running_var, layer.weight, layer.bias
    _, expected, _, _ = reference.normalize_with_share(x, grad, *double(statistics), share, share, 1e-5)
    torch.testing.assert_close(grad_x, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("momentum", "sizes"), [(0.1, []), (1.0, [32, 3, 64])], ids=["first batch", "momentum 1"])
def test_is_batch_norm(momentum, sizes):
    """The first batch is all there is to go by; with momentum 1 each batch is."""
    torch.manual_seed(0)
    running = batches(with_drawn_parameters(LessonRunningNorm2d(3, momentum=momentum).double()), *sizes)
    batch = nn.BatchNorm2d(3).double()
    batch.load_state_dict(running.state_dict(), strict=False)
    x, grad = torch.randn(24, 3, 4, 4).double() + 2, torch.randn(24, 3, 4, 4).double()
    assert_close(step(running, x, grad), step(batch, x, grad), 1e-12)


def test_images_and_channels_may_come_in_any_order():
    torch.manual_seed(0)
    layer = batches(LessonRunningNorm2d(3, affine=False).double(), 8)
    images, channels = torch.randperm(6), torch.tensor([2, 0, 1])
    other = copy.deepcopy(layer)
    other.running_mean.copy_(layer.running_mean[channels])
    other.running_var.copy_(layer.running_var[channels])
    x = torch.randn(6, 3, 4, 4).double()
    torch.testing.assert_close(other(x[images][:, channels]), layer(x)[images][:, channels], rtol=0, atol=1e-12)
    torch.testing.assert_close(other.running_var, layer.running_var[channels], rtol=0, atol=1e-12)


def test_memory_format_is_kept():
    layer, x = LessonRunningNorm2d(3), torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer.eval()(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_without_affine(training):
    torch.manual_seed(0)
    plain, affine = (batches(LessonRunningNorm2d(3, affine=given), 32).train(training) for given in (False, True))
    affine.load_state_dict(plain.state_dict(), strict=False)
    assert not list(plain.parameters())
    x, grad = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    assert_close(step(plain, x, grad), step(affine, x, grad)[:2], 1e-6)


# --- the minimum of the variance --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seen", "held"), [(19, True), (20, False)])
@pytest.mark.parametrize("training", [True, False])
def test_variance_is_held_until_twenty_images(seen, held, training):
    torch.manual_seed(0)
    layer = LessonRunningNorm2d(1, momentum=0.5)
    x = torch.randn(seen, 1, 4, 4) * 0.01
    y = layer(x)
    y = y if training else layer.eval()(x)
    var = 0.01 if held else x.var(correction=0).item()
    torch.testing.assert_close(y, (x - x.mean()) / math.sqrt(var + 1e-5), rtol=1e-4, atol=1e-5)
    assert layer.running_var.item() == pytest.approx(x.var(correction=0).item(), rel=1e-4)


def test_variance_at_its_minimum_is_a_constant_to_the_gradient():
    torch.manual_seed(0)
    layer = LessonRunningNorm2d(2).double()
    x, grad = torch.randn(4, 2, 3, 3).double(), torch.randn(4, 2, 3, 3).double()
    x[:, 0] *= 0.01  # held at .01, unlike the other channel
    _, grad_x, _, _ = step(layer, x, grad)
    deviation = torch.tensor([0.01, x[:, 1].var(correction=0)]).double().add(1e-5).sqrt().view(2, 1, 1)
    x_hat = (x - x.mean((0, 2, 3), keepdim=True)) / deviation
    through_var = torch.tensor([0.0, 1.0]).view(2, 1, 1) * x_hat * (grad * x_hat).mean((0, 2, 3), keepdim=True)
    expected = (grad - grad.mean((0, 2, 3), keepdim=True) - through_var) / deviation
    torch.testing.assert_close(grad_x, expected, rtol=0, atol=1e-6)


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_fresh_layer_evaluates_with_mean_0_and_variance_1():
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(LessonRunningNorm2d(3).eval()(x), x / math.sqrt(1 + 1e-5))


@pytest.mark.parametrize("grad", [True, False])
def test_evaluation_changes_nothing(grad):
    layer = batches(LessonRunningNorm2d(3), 4).eval()
    before = copy.deepcopy(layer)
    with torch.set_grad_enabled(grad):
        assert layer(torch.randn(2, 3, 4, 4)).requires_grad == grad
    assert_same_state(layer, before)


def test_evaluation_gradient_is_that_of_a_frozen_norm():
    torch.manual_seed(0)
    layer = batches(with_drawn_parameters(LessonRunningNorm2d(3).double()), 32).eval()
    frozen = nn.BatchNorm2d(3).double().eval()
    frozen.load_state_dict(layer.state_dict(), strict=False)
    x, grad = torch.randn(4, 3, 5, 5).double(), torch.randn(4, 3, 5, 5).double()
    assert_close(step(layer, x, grad), step(frozen, x, grad), 1e-12)


def test_statistics_are_updated_in_place():
    """Who holds a buffer, such as an average of models or a captured graph, sees the update."""
    layer = LessonRunningNorm2d(3)
    before = dict(layer.named_buffers())
    batches(layer, 4)
    assert all(before[name] is buffer for name, buffer in layer.named_buffers())


def test_training_without_gradient_counts():
    torch.manual_seed(0)
    layer, x = LessonRunningNorm2d(3), torch.randn(4, 3, 2, 2)
    other = copy.deepcopy(layer)
    layer(x)
    with torch.no_grad():
        assert not other(x).requires_grad
    assert_same_state(layer, other)


# --- a batch norm's state, and its own --------------------------------------------------------------------------------


@pytest.fixture
def batch_norm() -> nn.BatchNorm2d:
    """A trained one, with a variance that the minimum of the first images would hide."""
    torch.manual_seed(0)
    layer = batches(with_drawn_parameters(nn.BatchNorm2d(3)), 8, 8)
    layer.running_var[0] = 0.001
    return layer


def loaded(state: dict, **kwargs) -> LessonRunningNorm2d:
    layer = LessonRunningNorm2d(3)
    layer.load_state_dict(state, **kwargs)
    return layer


def saved(layer: nn.Module) -> dict:
    """The state after a file."""
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_next_batch_has_share_alpha(layer: LessonRunningNorm2d, batch_norm: nn.BatchNorm2d) -> None:
    sums = reference.Sums.of(batch_norm.running_mean, batch_norm.running_var, torch.tensor(5 * 16))
    for size, alpha in ((5, 1 - 0.9 / 2), (2, 0.1)):
        x = torch.randn(size, 3, 4, 4) * 2 + 3
        y = layer.train()(x)
        sums = sums.after(x.double(), alpha)
        assert_close([layer.running_mean, layer.running_var, layer.count], [*sums.moments(), sums.c], 1e-6)
        expected = reference.normalize(x.double(), *sums.moments(), layer.weight, layer.bias, 1e-5)
        assert_close([y], [expected], 1e-5)


def test_batch_norms_state_loads(batch_norm):
    layer = loaded(batch_norm.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), batch_norm.eval()(x))
    assert layer.num_batches_tracked == 2
    assert_next_batch_has_share_alpha(layer, batch_norm)


def test_batch_norms_state_loads_within_a_model(batch_norm):
    model = nn.Sequential(nn.Conv2d(1, 3, 1), LessonRunningNorm2d(3))
    model.load_state_dict(nn.Sequential(nn.Conv2d(1, 3, 1), batch_norm).state_dict())
    assert_next_batch_has_share_alpha(model[1], batch_norm)


@pytest.mark.parametrize("again", [saved, lambda layer: copy.deepcopy(layer).state_dict()], ids=["file", "copy"])
def test_batch_norms_state_survives_another_save(batch_norm, again):
    layer = loaded(again(loaded(again(loaded(saved(batch_norm))))))
    assert_next_batch_has_share_alpha(layer, batch_norm)


def test_batch_norms_state_survives_a_copy_and_a_cast(batch_norm):
    layer = copy.deepcopy(loaded(batch_norm.state_dict())).half().float()
    layer.weight.data.copy_(batch_norm.weight)
    layer.bias.data.copy_(batch_norm.bias)
    assert_next_batch_has_share_alpha(layer, batch_norm)


def test_batch_norms_state_without_a_count_of_batches_loads(batch_norm):
    state = dict(batch_norm.state_dict())
    del state["num_batches_tracked"]
    assert_next_batch_has_share_alpha(loaded(state), batch_norm)


def test_fresh_batch_norms_state_counts_for_nothing():
    layer, x = loaded(nn.BatchNorm2d(3).state_dict()), torch.randn(4, 3, 4, 4) + 5
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    assert layer.num_samples_tracked == 4


def test_loading_leaves_the_given_state_alone(batch_norm):
    state = batch_norm.state_dict()
    keys = list(state)
    loaded(state)
    assert list(state) == keys


def test_own_state_after_batch_norms_replaces_it(batch_norm):
    layer = loaded(batch_norm.state_dict())
    own = batches(LessonRunningNorm2d(3), 8)
    layer.load_state_dict(own.state_dict())
    x = torch.randn(4, 3, 2, 2)
    assert torch.equal(layer(x), own(x))
    assert_same_state(layer, own)


def test_own_state_loads_into_batch_norm():
    layer, batch_norm = batches(LessonRunningNorm2d(3), 32), nn.BatchNorm2d(3)
    result = batch_norm.load_state_dict(layer.state_dict(), strict=False)
    assert not result.missing_keys
    assert set(result.unexpected_keys) == {"count", "num_samples_tracked"}
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), batch_norm.eval()(x))


def test_own_state_goes_on_where_it_was():
    torch.manual_seed(0)
    layer = batches(LessonRunningNorm2d(3), 2, 3)
    other = loaded(saved(layer))
    x = torch.randn(2, 3, 4, 4) * 0.01
    assert torch.equal(layer(x), other(x))
    assert_same_state(layer, other)


def test_deep_copy_after_a_step():
    layer = LessonRunningNorm2d(3)
    layer(torch.randn(4, 3, 2, 2, requires_grad=True)).sum().backward()
    other, x = copy.deepcopy(layer), torch.randn(4, 3, 2, 2)
    assert torch.equal(other(x), layer(x))
    assert_same_state(other, layer)


@pytest.mark.parametrize("from_batch_norm", [True, False])
def test_reset_forgets_everything(batch_norm, from_batch_norm):
    layer = loaded(batch_norm.state_dict()) if from_batch_norm else batches(LessonRunningNorm2d(3), 8)
    layer.reset_running_stats()
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert layer.count == layer.num_batches_tracked == layer.num_samples_tracked == 0
    x = torch.randn(4, 3, 2, 2)
    layer(x)
    torch.testing.assert_close(layer.running_mean, x.mean((0, 2, 3)))
    assert layer.num_samples_tracked == 4


# --- precision --------------------------------------------------------------------------------------------------------

HALF = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("cast", [lambda layer, dtype: layer.to(dtype), lambda layer, dtype: layer.to(dtype).to("cpu")])
def test_cast_to_half_keeps_statistics(dtype, cast):
    torch.manual_seed(0)
    layer = batches(LessonRunningNorm2d(3), 8)
    before = [getattr(layer, name).clone() for name in STATISTICS]
    cast(layer, dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    for name, value in zip(STATISTICS, before, strict=True):
        assert getattr(layer, name).dtype == torch.float32
        assert torch.equal(getattr(layer, name), value)
    assert set(layer.state_dict()) == set(LessonRunningNorm2d(3).state_dict())


@pytest.mark.parametrize("dtype", HALF)
def test_built_in_half_is_cast_to_half(dtype):
    layer = LessonRunningNorm2d(3, dtype=dtype)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == layer.count.dtype == torch.float32
    assert layer(torch.randn(2, 3, 4, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    "make", [lambda: LessonRunningNorm2d(3, dtype=torch.float64), lambda: LessonRunningNorm2d(3).double()]
)
def test_double_is_double_throughout(make):
    layer = make()
    assert layer(torch.randn(2, 3, 4, 4).double()).dtype == torch.float64
    assert {value.dtype for value in layer.state_dict().values()} == {torch.float64, torch.int64}


@pytest.mark.parametrize("dtype", HALF)
def test_large_sums_do_not_overflow(dtype):
    """Sums of 3e8, squares of 9e8 a value: both out of the range of float16."""
    torch.manual_seed(0)
    layer = LessonRunningNorm2d(2).to(dtype)
    x = (torch.randn(8, 2, 32, 32) * 5000 + 30_000).clamp(max=6e4).to(dtype)
    for _ in range(3):
        y, grad_x, *_ = step(layer, x, torch.randn_like(x))
    mean, var = reference.channel_moments(x.double())
    assert_close([layer.running_mean / mean, layer.running_var / var], [torch.ones(2)] * 2, 1e-5)
    expected = reference.normalize(x.double(), mean, var, None, None, 1e-5)
    assert_close([y], [expected], TOLERANCE[dtype])
    assert_close([layer.eval()(x)], [expected], TOLERANCE[dtype])
    assert grad_x.isfinite().all()


def test_under_autocast():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), LessonRunningNorm2d(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(100 + torch.randn(8, 1, 6, 6))
        assert y.dtype == torch.bfloat16
        assert model.eval()(torch.randn(2, 1, 6, 6)).dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert model[1].running_mean.dtype == torch.float32


# --- use --------------------------------------------------------------------------------------------------------------


def test_two_forwards_before_a_backward():
    torch.manual_seed(0)
    together, apart = (LessonRunningNorm2d(3, affine=False) for _ in range(2))
    first, second = (torch.randn(4, 3, 2, 2, requires_grad=True) for _ in range(2))
    a, b = together(first), together(second)
    (a.pow(3).sum() + b.pow(3).sum()).backward()
    for x in (first, second):
        alone = x.detach().requires_grad_()
        apart(alone).pow(3).sum().backward()
        assert torch.equal(alone.grad, x.grad)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_no_synchronisation(dims, batch_norm):
    """Reading a value of a meta tensor raises, as reading one of a GPU's would wait for it."""
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.zeros((), device="meta"))
    fresh, settled = LAYERS[dims](3), LAYERS[dims](3)
    settled.load_state_dict(batch_norm.state_dict())
    for layer in (fresh.to("meta"), settled.to("meta")):
        for size in (1, 4):
            x = torch.randn(size, 3, *[2] * dims, device="meta", requires_grad=True)
            layer.train()(x).sum().backward()
            layer.eval()(x).sum().backward()


def test_compiles_into_one_graph():
    torch.manual_seed(0)
    layer, x, grad = with_drawn_parameters(LessonRunningNorm2d(3)), torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    for training in (True, False):
        layer.train(training), compiled.train(training)
        assert_close(step(compiled, x, grad), step(layer, x, grad), 1e-6)
    assert_same_state(other, layer)


def test_empty_batch_changes_nothing():
    layer = batches(LessonRunningNorm2d(3), 4)
    before = copy.deepcopy(layer)
    x = torch.randn(0, 3, 2, 2, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
    assert_same_state(layer, before)


@pytest.mark.parametrize(
    ("options", "named"),
    [({"num_features": 0}, "num_features=0"), ({"momentum": 0.0}, "momentum=0.0"), ({"momentum": 1.5}, "momentum=1.5")],
)
def test_argument_out_of_range(options, named):
    """Momentum 0 would give the first batch of one or two images the weight 0/0."""
    with pytest.raises(InputError, match=named):
        LessonRunningNorm2d(**{"num_features": 3, **options})


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("dims", "shape", "accepted"),
    [
        (1, (2, 3, 4, 4), r"\(N, 3\) or \(N, 3, L\), got \(2, 3, 4, 4\)"),
        (2, (2, 3, 4), r"\(N, 3, H, W\), got \(2, 3, 4\)"),
        (2, (3,), r"\(N, 3, H, W\), got \(3,\)"),
        (2, (2, 4, 4, 4), r"\(N, 3, H, W\), got \(2, 4, 4, 4\)"),
        (2, (1, 1, 1, 1), r"\(N, 3, H, W\), got \(1, 1, 1, 1\)"),
        (3, (2, 3, 4, 4), r"\(N, 3, D, H, W\), got \(2, 3, 4, 4\)"),
    ],
)
def test_other_shapes_are_refused(dims, shape, accepted, training):
    layer = LAYERS[dims](3).train(training)
    with pytest.raises(InputError, match=accepted) as error:
        layer(torch.randn(shape))
    assert str(shape) in str(error.value)
    assert_same_state(layer, LAYERS[dims](3))

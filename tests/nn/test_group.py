"""Group, layer, instance and RMS norm equal their formula in float64, image by image."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import reference
from checks import assert_close, composed, double, dtypes, gradients, layouts, step, with_drawn_parameters
from normlab.errors import InputError
from normlab.nn.group import ChannelLayerNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # of `assert_close`
FAMILY = {
    "group": lambda channels, **options: GroupNorm(channels, 2, **options),
    "layer": LayerNorm,
    "instance": InstanceNorm,
}
OF_POSITIONS = {"layer over channels": ChannelLayerNorm, "rms": RMSNorm}
EVERY = FAMILY | OF_POSITIONS


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_equals_its_formula_in_float64(data):
    """Over shapes, types, layouts and modes; groups of a single value too."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    channels = data.draw(st.sampled_from([1, 2, 4, 6]))
    space = data.draw(st.lists(st.integers(1, 5), max_size=3))
    layer, groups = data.draw(
        st.sampled_from(
            [
                (LayerNorm(channels, eps=1.0), 1),
                (InstanceNorm(channels, eps=1.0), channels),
                (GroupNorm(channels, math.gcd(2, channels), eps=1.0), math.gcd(2, channels)),
            ]
        )
    )
    dtype = data.draw(dtypes)
    with_drawn_parameters(layer).train(data.draw(st.booleans()))
    if data.draw(st.booleans()) or dtype == torch.float64:
        layer.to(dtype)
    shape = (data.draw(st.integers(1, 4)), channels, *space)
    x = data.draw(layouts)(torch.randn(shape).to(dtype))
    grad = torch.randn(shape).to(dtype)

    actual = step(layer, x, grad)
    assert [actual[0].dtype, actual[1].dtype] == [dtype] * 2
    expected = gradients(
        lambda x, weight, bias: reference.group_norm(x, weight, bias, groups, 1.0),
        *double([grad, x, *layer.parameters()]),
    )
    assert_close(actual, expected, TOLERANCE[dtype])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_norms_of_positions_equal_their_formula_in_float64(data):
    """Over shapes, types, layouts and modes; a single channel too."""
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    channels = data.draw(st.integers(1, 6))
    space = data.draw(st.lists(st.integers(1, 4), max_size=3))
    layer = data.draw(st.sampled_from(list(OF_POSITIONS.values())))(channels, eps=0.5)
    dtype = data.draw(dtypes)
    with_drawn_parameters(layer).train(data.draw(st.booleans()))
    if data.draw(st.booleans()) or dtype == torch.float64:
        layer.to(dtype)
    shape = (data.draw(st.integers(1, 4)), channels, *space)
    x = data.draw(layouts)(torch.randn(shape).to(dtype))
    grad = torch.randn(shape).to(dtype)

    actual = step(layer, x, grad)
    assert [actual[0].dtype, actual[1].dtype] == [dtype] * 2
    formula = reference.rms_norm if isinstance(layer, RMSNorm) else reference.channel_layer_norm
    expected = gradients(lambda *inputs: formula(*inputs, eps=0.5), *double([grad, x, *layer.parameters()]))
    assert_close(actual, expected, TOLERANCE[dtype])


def test_is_torchs_layer_norm_and_rms_norm_of_the_last_dimension():
    x = torch.randn(2, 6, 3, 4)
    for ours, torchs in ((ChannelLayerNorm(6), nn.LayerNorm(6)), (RMSNorm(6), nn.RMSNorm(6, eps=1e-5))):
        ours.load_state_dict(with_drawn_parameters(torchs).state_dict())
        torch.testing.assert_close(ours(x), torchs(x.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("name", OF_POSITIONS)
def test_a_position_does_not_depend_on_the_others(name):
    layer, x = OF_POSITIONS[name](4), torch.randn(2, 4, 3, 3)
    before = layer(x)[:, :, 1, 2]
    torch.testing.assert_close(layer(x[:, :, 1, 2]), before)


def test_scale_and_shift_of_the_input():
    """Both norms of positions drop its scale; layer norm its shift too."""
    x = torch.randn(2, 4, 3, 3).double()
    for layer in (RMSNorm(4, eps=0), ChannelLayerNorm(4, eps=0)):
        torch.testing.assert_close(layer(3 * x), layer(x), rtol=0, atol=1e-9)
    layer = ChannelLayerNorm(4)
    torch.testing.assert_close(layer(x + 5), layer(x), rtol=0, atol=1e-9)
    assert (RMSNorm(4)(x + 5) - RMSNorm(4)(x)).abs().max() > 0.1


def test_rms_norm_has_no_bias():
    assert [name for name, _ in RMSNorm(4).named_parameters()] == ["weight"]
    assert RMSNorm(4)(torch.zeros(2, 4, 3)).abs().max() == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_is_torchs_group_norm(groups):
    torch.manual_seed(0)
    torchs, ours = with_drawn_parameters(nn.GroupNorm(groups, 4)), GroupNorm(4, groups)
    ours.load_state_dict(torchs.state_dict())
    x = torch.randn(3, 4, 5, 5)
    assert_close([ours(x)], [torchs(x)], 1e-6)
    with composed():
        assert torch.equal(ours(x), torchs(x))


@pytest.mark.parametrize("name", EVERY)
def test_an_image_does_not_depend_on_the_others(name):
    layer, x = EVERY[name](4), torch.randn(5, 4, 3, 3)
    before = layer(x)[0]
    x[1:] = 1e4 * torch.randn(4, 4, 3, 3)
    assert torch.equal(layer(x)[0], before)
    torch.testing.assert_close(layer(x[:1])[0], before)


@pytest.mark.parametrize("name", EVERY)
def test_evaluation_is_training(name):
    layer, x = EVERY[name](4), torch.randn(5, 4, 3, 3)
    assert torch.equal(layer(x), layer.eval()(x))


@pytest.mark.parametrize("name", FAMILY)
def test_mean_1000_and_deviation_a_tenth(name):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 9) * 0.1 + 1000
    groups = {"group": 2, "layer": 1, "instance": 4}[name]
    expected = reference.group_norm(x.double(), None, None, groups, 1e-5)
    assert (FAMILY[name](4)(x) - expected).abs().max() < 5e-3


LAST = {2: torch.channels_last, 3: torch.channels_last_3d}
GROUPS = {"group": 2, "layer": 1, "instance": 4}
with_and_without_kernels = pytest.mark.parametrize("kernels", [nullcontext, composed])


def laid_out(x, layout):
    """`x` with its channels last in memory; "bare": and the strides of its dimensions of size 1 as they come."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "bare" else x.contiguous(memory_format=layout)


@with_and_without_kernels
@pytest.mark.parametrize("layout", ["channels last", "bare"])
@pytest.mark.parametrize("shape", [(4, 4, 8, 8), (1, 4, 9, 7), (3, 4, 1, 40), (2, 4, 3, 4, 5)])
@pytest.mark.parametrize("name", FAMILY)
def test_channels_last_images_far_from_0_are_as_precise_as_others(name, shape, layout, kernels):
    """At a mean of a thousand deviations; outputs and gradients lose three digits of seven, not all."""
    torch.manual_seed(0)
    layer, grad = with_drawn_parameters(FAMILY[name](4)), torch.randn(shape)
    x = laid_out(torch.randn(shape) + 1000, LAST[len(shape) - 2] if layout == "channels last" else layout)
    with kernels():
        actual = step(layer, x, grad)
    assert actual[0].stride() == x.stride() or 1 in shape
    expected = gradients(
        lambda x, weight, bias: reference.group_norm(x, weight, bias, GROUPS[name], 1e-5),
        *double([grad, x, *layer.parameters()]),
    )
    assert_close(actual, expected, 2e-3)


@with_and_without_kernels
@pytest.mark.parametrize("wanted", ["weight", "bias"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 4, 9, 9), (2, 4, 7, 1), (2, 4, 3, 4, 5)])
@pytest.mark.parametrize("name", FAMILY)
def test_a_first_layer_trains_on_channels_last_images(name, shape, dtype, wanted, kernels):
    """The images want no gradient, and γ or β may be frozen: torch's own layer ends the process."""
    torch.manual_seed(0)
    layer, grad = with_drawn_parameters(FAMILY[name](4)), torch.randn(shape).to(dtype)
    layer.to(torch.float64 if dtype is torch.float64 else torch.float32)
    x = torch.randn(shape).to(dtype).contiguous(memory_format=LAST[len(shape) - 2])
    (layer.bias if wanted == "weight" else layer.weight).requires_grad_(False)
    with kernels():
        layer(x).backward(grad)
    _, *found = gradients(
        lambda weight, bias: reference.group_norm(x.double(), weight, bias, GROUPS[name], 1e-5),
        *double([grad, *layer.parameters()]),
    )
    assert_close([getattr(layer, wanted).grad], [found[wanted == "bias"]], TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_first_layer_trains_on_channels_last_images(backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer, grad = GroupNorm(4, 2), torch.randn(2, 4, 9, 9)
    x = (torch.randn(2, 4, 9, 9) + 300).contiguous(memory_format=torch.channels_last)
    y = torch.compile(layer, fullgraph=True, backend=backend)(x)
    y.backward(grad)
    expected = reference.group_norm(x.double(), None, None, 2, 1e-5)
    assert_close([y], [expected], 1e-3)
    assert_close([layer.weight.grad], [(expected * grad).sum((0, 2, 3))], 1e-3)


@pytest.mark.parametrize("dims", [{0: torch.export.Dim("batch")}, {2: torch.export.Dim("h"), 3: torch.export.Dim("w")}])
def test_exported_it_takes_any_number_of_images_of_any_size(dims):
    layer = with_drawn_parameters(GroupNorm(4, 2)).eval()
    program = torch.export.export(layer, (torch.randn(2, 4, 8, 9),), dynamic_shapes=(dims,))
    for x in (torch.randn(2, 4, 8, 9), torch.randn(*[(300, 4, 8, 9), (2, 4, 50, 30)][2 in dims])):
        assert_close([program.module()(x)], [layer(x)], 1e-6)
        assert_close([program.module()(laid_out(x + 300, "bare"))], [layer(x + 300)], 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILY)
def test_large_sums_do_not_overflow_in_half_precision(name, dtype):
    x = (torch.randn(2, 4, 32, 32) * 5000 + 30_000).clamp(max=6e4).to(dtype)
    groups = {"group": 2, "layer": 1, "instance": 4}[name]
    expected = reference.group_norm(x.double(), None, None, groups, 1e-5)
    y = FAMILY[name](4).to(dtype)(x)
    assert y.dtype == dtype
    # torch multiplies x by 1/σ first, so an error of 1/σ in its last digit counts mean/σ times.
    assert (y - expected).abs().max() < 3 * TOLERANCE[dtype]


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_groups_of_one_value_give_beta(size):
    """To the last digit, and with no gradient to the input."""
    layer, x = with_drawn_parameters(InstanceNorm(3)), size * torch.randn(2, 3, 1, 1)
    y, grad, *_ = step(layer, x, torch.randn(2, 3, 1, 1))
    assert torch.equal(y.flatten(1), layer.bias.detach().expand(2, 3))
    assert grad.abs().max() < 1e-4
    assert InstanceNorm(3, affine=False)(x).abs().max() == 0


@pytest.mark.parametrize("name", EVERY)
def test_without_affine(name):
    x = torch.randn(2, 4, 3, 3)
    plain = EVERY[name](4, affine=False)
    assert not list(plain.parameters())
    assert not plain.state_dict()
    torch.testing.assert_close(plain(x), EVERY[name](4)(x))


@pytest.mark.parametrize("name", EVERY)
def test_empty_batch(name):
    assert EVERY[name](4)(torch.randn(0, 4, 3, 3)).shape == (0, 4, 3, 3)


def test_channels_may_come_in_any_order_within_their_group():
    x, order = torch.randn(2, 4, 3, 3).double(), torch.tensor([1, 0, 3, 2])
    layer = GroupNorm(4, 2, affine=False)
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("num_features", "num_groups"), [(6, 4), (6, 0), (6, -1), (4, 8)])
def test_groups_that_do_not_divide(num_features, num_groups):
    with pytest.raises(InputError, match=f"num_groups={num_groups} .* a divisor of num_features={num_features}"):
        GroupNorm(num_features, num_groups)


@pytest.mark.parametrize("name", EVERY)
def test_no_channels(name):
    with pytest.raises(InputError, match="num_features=0"):
        EVERY[name](0)


@pytest.mark.parametrize("name", EVERY)
def test_other_channels_are_refused(name):
    for affine in (True, False):
        with pytest.raises(InputError, match=r"\(4\): expected input \(N, 4, \*space\), got \(2, 8, 3, 3\)"):
            EVERY[name](4, affine=affine)(torch.randn(2, 8, 3, 3))


def test_repr_says_what_it_is():
    assert repr(GroupNorm(8, 4)) == "GroupNorm(8, num_groups=4, eps=1e-05, affine=True)"
    assert repr(RMSNorm(8, eps=0.1)) == "RMSNorm(8, affine=True, eps=0.1)"
    assert repr(LayerNorm(8, eps=0.1)) == "LayerNorm(8, num_groups=1, eps=0.1, affine=True)"

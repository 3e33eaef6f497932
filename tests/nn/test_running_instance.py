"""Running instance norm: a mixture of running batch norm and instance norm, and its two ends."""

import copy

import pytest
import torch
from torch import nn

import normlab
from normlab.nn import InstanceNorm, RunningBatchNorm2d, RunningInstanceNorm2d, build_norm
from normlab.nn.running_instance import FIRST_SHARE, GATE_SPEED, VALUES

C, LR = 6, 0.05


def layer(share=None, **options):
    """A layer in float64 whose γ and β are drawn, with this share in a map without end, or the first one."""
    torch.manual_seed(0)
    norm = RunningInstanceNorm2d(C, **options).double()
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
        norm.bias.normal_()
        if share is not None:
            norm.gate.fill_(share / GATE_SPEED)
    return norm


def running_like(norm):
    """Running batch norm with the same parameters."""
    other = RunningBatchNorm2d(C).double()
    other.load_state_dict(norm.state_dict(), strict=False)
    return other


def images(n=2, side=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    contrast = torch.rand(n, 1, 1, 1, generator=generator) * 3 + 0.5
    return (contrast * torch.randn(n, C, side, side, generator=generator) + contrast).double()


def trained(norm, steps=5, side=8):
    """Outputs and gradients of some steps of plain gradient descent."""
    found = []
    for step in range(steps):
        x = images(side=side, seed=step).requires_grad_()
        y = norm(x)
        (y * images(side=side, seed=100 + step)).sum().backward()
        named = dict(norm.named_parameters())
        found.append([y.detach(), x.grad, named["weight"].grad.clone(), named["bias"].grad.clone()])
        with torch.no_grad():
            for name, part in named.items():
                if name != "gate":
                    part -= LR * part.grad
        norm.zero_grad()
    return found


def assert_alike(found, expected):
    for one, other in zip(found, expected, strict=True):
        for part, like in zip(one, other, strict=True):
            torch.testing.assert_close(part, like, rtol=1e-9, atol=1e-11)


def test_without_a_share_it_is_running_batch_norm():
    norm = layer(0.0)
    other = running_like(norm)
    assert_alike(trained(norm), trained(other))
    x = images(seed=9)
    torch.testing.assert_close(norm.eval()(x), other.eval()(x), rtol=1e-12, atol=1e-12)


def test_maps_of_one_value_are_running_batch_norms():
    norm = layer(1.0)
    other = running_like(norm)
    assert_alike(trained(norm, side=1), trained(other, side=1))
    x = images(side=1, seed=9)
    torch.testing.assert_close(norm.eval()(x), other.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_the_mixture_of_both(training):
    norm = layer(0.8).train(training)
    other = running_like(norm).train(training)
    x = images()
    known = 64 / (64 + VALUES)
    running, own = other(x), InstanceNorm(C).double()(x)
    own = own * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    torch.testing.assert_close(norm(x), torch.lerp(running, own, 0.8 * known), rtol=1e-9, atol=1e-11)
    assert norm.instance_share(8, 8).tolist() == pytest.approx([0.8 * known] * C)


def test_gradients_without_memory_are_those_of_autograd():
    """They are exact, but for those of γ and β in training, which have the rate of small batches."""
    for training, rate in ((False, 1.0), (True, (2 / 64) ** 0.5)):
        norm = layer(0.6, step_bound=None).train(training)
        plain = copy.deepcopy(norm)
        x = images(seed=1)
        (norm(x) * images(seed=2)).sum().backward()
        if training:
            mean, var = norm.running_mean, norm.running_var
        else:
            mean, var = plain.running_mean, plain.running_var
        share = (plain.gate * GATE_SPEED * 0.5).view(-1, 1, 1)
        x_hat = (x - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + norm.eps).sqrt()
        of_image = nn.functional.instance_norm(x, eps=norm.eps)
        y = plain.weight.view(-1, 1, 1) * ((1 - share) * x_hat + share * of_image) + plain.bias.view(-1, 1, 1)
        (y * images(seed=2)).sum().backward()
        assert torch.allclose(norm.weight.grad, plain.weight.grad * rate)
        assert torch.allclose(norm.bias.grad, plain.bias.grad * rate)
        assert torch.allclose(norm.gate.grad, plain.gate.grad)


def test_an_images_gradient_through_its_own_statistics_is_exact():
    """With s = 1, without its part of running batch norm, the gradient of x is instance norm's."""
    norm = layer(1.0, step_bound=None)
    x, like = images(side=128, seed=3).requires_grad_(), images(side=128, seed=3).requires_grad_()
    share = norm.instance_share(128, 128).view(-1, 1, 1)
    given = images(side=128, seed=4)
    (norm(x) * given).sum().backward()
    other = running_like(layer(1.0))
    with torch.no_grad():
        other.weight.mul_(1 - share.flatten())
    other.step_bound = None
    y = other(like) + nn.functional.instance_norm(like, eps=norm.eps) * share * norm.weight.view(-1, 1, 1)
    (y * given).sum().backward()
    torch.testing.assert_close(x.grad, like.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("end", "inwards"), [(0.0, -1.0), (1.0, 1.0)])
def test_a_share_at_an_end_leaves_it_only_inwards(end, inwards):
    """The loss wants less of the image's own statistics, or more."""
    for sign in (-1.0, 1.0):
        norm = layer(end, step_bound=None)
        x = images(seed=5)
        own = nn.functional.instance_norm(x)
        running = running_like(norm)(x)
        difference = (own * norm.weight.view(-1, 1, 1) - running + norm.bias.view(-1, 1, 1)).detach()
        (sign * norm(x) * difference).sum().backward()
        assert torch.equal(norm.gate.grad != 0, torch.full((C,), sign == inwards))


def test_a_loss_that_knows_contrast_as_a_nuisance_raises_the_share():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, C, 3, padding=1), RunningInstanceNorm2d(C), nn.ReLU(), nn.Conv2d(C, 1, 1))
    optimizer = torch.optim.AdamW(net.parameters(), 0.01)
    before = net[1].instance_share(16, 16).mean()
    for _ in range(150):
        shape = torch.randn(2, 1, 16, 16)
        x = shape * (torch.rand(2, 1, 1, 1) * 4 + 0.2) + torch.randn(2, 1, 1, 1) * 3
        loss = nn.functional.mse_loss(net(x), shape)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert net[1].instance_share(16, 16).mean() > before + 0.1


def trained_net():
    net = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C), nn.ReLU())
    for seed in range(3):
        net(images(4, seed=seed).float()[:, :3])
    return net.eval()


def test_the_state_of_a_trained_batch_norm_gives_in_evaluation_what_it_gave():
    net, norm, x = trained_net(), RunningInstanceNorm2d(C), images(4, seed=9).float()
    norm.load_state_dict(net[1].state_dict())
    torch.testing.assert_close(norm.eval()(x), net[1](x))
    assert norm.instance_share(6, 6).tolist() == [0.0] * C


def test_a_converted_batch_norm_begins_with_the_share_of_a_new_layer_and_its_own_statistics():
    net = trained_net()
    new, report = normlab.convert(net, "running_instance")
    assert new[1].gate.tolist() == [FIRST_SHARE / GATE_SPEED] * C
    assert torch.equal(new[1].running_var, net[1].running_var)
    assert "another function, with the same γ and β" in report.rows[0].note
    with torch.no_grad():
        new[1].gate.zero_()
    x = images(4, seed=9).float()[:, :3]
    torch.testing.assert_close(new(x), net(x))


def test_the_state_of_running_batch_norm_loads():
    other = RunningBatchNorm2d(C)
    other(images().float())
    norm = RunningInstanceNorm2d(C)
    norm.load_state_dict(other.state_dict())
    x = images(seed=9).float()
    torch.testing.assert_close(norm.eval()(x), other.eval()(x))


def test_an_untrained_net_gets_new_layers():
    new = normlab.convert(nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)), "running_instance").model
    assert new[1].gate.tolist() == [FIRST_SHARE / GATE_SPEED] * C


@pytest.mark.parametrize(("share", "folds"), [(0.0, True), (0.4, False)])
def test_it_folds_where_it_is_a_scale_and_shift(share, folds):
    net = nn.Sequential(nn.Conv2d(3, C, 3), build_norm("running_instance", C))
    net(images().float()[:, :3])
    with torch.no_grad():
        net[1].gate.fill_(share / GATE_SPEED)
    folded = normlab.fold(net.eval(), images().float()[:, :3])
    assert isinstance(folded.model[1], nn.Identity) == folds


def steps_of(norm, dtype, side, layout, residual):
    """Outputs, gradients and the state over four steps, in which one image has a gradient that meets the bound."""
    found = []
    for step in range(4):
        x, grad = images(3, side, step), images(3, side, 50 + step)
        grad[0] *= 8 if step == 2 else 1
        x, grad = (part.to(dtype).contiguous(memory_format=layout) for part in (x, grad))
        x.requires_grad_()
        more = {"residual": images(3, side, 9).to(dtype).contiguous(memory_format=layout)} if residual else {}
        y = norm(x, **more)
        y.backward(grad)
        found += [y.detach(), x.grad]
        with torch.no_grad():
            for part in norm.parameters():
                found.append(part.grad.clone())
                part -= LR * part.grad
                part.grad = None
    return [part.double() for part in (*found, *norm.buffers())]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"activation": "relu"}, {"bias": False}, {"affine": False}, {"step_bound": None}]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("side", [1, 2, 9, 20])
def test_the_kernel_is_the_reference_in_float64(side, layout, options, residual):
    torch.manual_seed(0)
    fast = RunningInstanceNorm2d(C, **options)
    with torch.no_grad():
        for part, (low, high) in zip(fast.parameters(), ((0.5, 2), (-1, 1), (0, 1 / GATE_SPEED)), strict=False):
            part.uniform_(low, high)
        fast.gate.uniform_(0, 1 / GATE_SPEED)
    exact = copy.deepcopy(fast).double()
    found = steps_of(fast, torch.float32, side, layout, residual)
    expected = steps_of(exact, torch.float64, side, layout, residual)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_the_norm_of_the_rounded_values(dtype):
    fast = layer(0.7).float()
    exact = copy.deepcopy(fast).double()
    x = images(3).to(dtype)
    y, like = fast(x), exact(x.double())
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), like, rtol=2e-2, atol=2e-2)
    for name, part in fast.named_buffers():
        torch.testing.assert_close(part.double(), dict(exact.named_buffers())[name].double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_gate_that_is_no_float32_is_taken_all_the_same(dtype, affine, training):
    fast = RunningInstanceNorm2d(C, affine=affine).train(training)  # its gate, 1/8, is exact in every type
    other = copy.deepcopy(fast)
    other.gate.data = other.gate.data.to(dtype)
    x = images().float()
    torch.testing.assert_close(fast(x), other(x), check_dtype=False, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(0, C, 4, 4), (0, C, 1, 1), (2, C, 1, 1), (2, C, 5, 5)])
def test_the_gate_takes_part_in_every_batch(shape):
    """Else processes that share their gradients would wait for it."""
    norm = RunningInstanceNorm2d(C)
    norm(torch.randn(shape)).square().sum().backward()
    assert norm.gate.grad is not None
    assert norm.gate.grad.any() == (shape == (2, C, 5, 5))

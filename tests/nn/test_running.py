"""Running batch norm equals its formula in float64, step by step, and what its formula promises holds."""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from checks import assert_close, assert_same_state, composed, layouts, with_drawn_parameters
from normlab.errors import InputError
from normlab.kernels import cpu
from normlab.kernels.running import State
from normlab.nn import BatchNorm2d, RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d
from normlab.nn import functional as F
from running_formula import Formula

LAYERS = {1: RunningBatchNorm1d, 2: RunningBatchNorm2d, 3: RunningBatchNorm3d}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
SPACES = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_steps_equal_the_formula_in_float64(data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    momentum, lr = data.draw(st.sampled_from([0.1, 0.5])), data.draw(st.sampled_from([0.01, 1.0]))
    clip, inertia = data.draw(st.sampled_from([1e9, 0.5])), data.draw(st.sampled_from([0.0, 0.9]))
    bound = data.draw(st.sampled_from([None, 0.01, 0.1]))
    kernels = data.draw(st.sampled_from([nullcontext, composed]))
    layer = LAYERS[dims](channels, 0.1, momentum, step_bound=bound)
    with_drawn_parameters(layer)
    if dtype == torch.float64:
        layer.double()
    formula = Formula(channels, momentum, 0.1, bound)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=inertia)
    for _ in range(6):
        jump = data.draw(st.sampled_from([1.0, 1.0, 6.0]))  # the layers below have moved
        x = (torch.randn(data.draw(st.integers(1, 4)), channels, *SPACES[dims]) * jump + 0.5).to(dtype)
        x = data.draw(layouts)(x).requires_grad_()
        grad = torch.randn_like(x)
        expected = formula.step(*(value.detach().double() for value in (x, grad, layer.weight, layer.bias)))
        optimizer.zero_grad()
        with kernels():
            y = layer(x)
        y.backward(grad)
        assert_close([y.detach(), x.grad, layer.weight.grad, layer.bias.grad], expected, TOLERANCE[dtype])
        assert_close([layer.running_mean, layer.running_var], formula.running, TOLERANCE[dtype])
        assert layer.share.item() == pytest.approx(formula.share, rel=TOLERANCE[dtype])
        assert layer.gradient_share.item() == pytest.approx(formula.gradient_share, rel=TOLERANCE[dtype])
        nn.utils.clip_grad_norm_(layer.parameters(), clip)
        optimizer.step()
    parameters = (layer.weight.double(), layer.bias.double())
    expected = reference.normalize(x.detach().double(), *formula.running, *parameters, 0.1)
    assert_close([layer.eval()(x)], [expected], TOLERANCE[dtype])


def test_the_first_batch_is_batch_norms():
    torch.manual_seed(0)
    x, grad = torch.randn(256, 3, 2, 2).double() * 2 + 1, torch.randn(256, 3, 2, 2).double() / 1e4
    layer, batch = RunningBatchNorm2d(3, momentum=0.9).double(), BatchNorm2d(3).double()
    results = []
    for norm in (layer, batch):
        inputs = x.clone().requires_grad_()
        y = norm(inputs)
        y.backward(grad)
        results.append([y.detach(), inputs.grad])
    assert_close(*results, tolerance=1e-9)


def test_the_first_batch_is_all_there_is():
    x = torch.randn(3, 3, 2, 2).double() * 5 + 100
    layer = RunningBatchNorm2d(3).double()
    layer(x)
    assert_close([layer.running_mean, layer.running_var], reference.channel_moments(x), 1e-12)


def share_after(batches: list[Tensor]) -> float:
    layer = RunningBatchNorm1d(16)
    for x in batches:
        layer(x)
    return layer.share.item()


def test_the_share_falls_where_nothing_moves_and_the_more_the_noisier_a_batch():
    """Towards a mean over many batches; its least is a thousandth."""
    torch.manual_seed(0)
    assert share_after([torch.randn(2, 16) for _ in range(3000)]) < 0.005
    assert share_after([torch.randn(2, 16) * 0 + 1] * 50) == 1  # no noise: nothing to fall for


def test_the_share_grows_with_the_speed_of_what_it_follows_and_with_the_size_of_the_batch():
    """It is close to the gain that is best for a random walk seen through noise.

    That is (√(r² + 4r) − r) / 2, with r the variance of the walk's steps over the noise's.
    """
    torch.manual_seed(0)
    for size, step in ((2, 0.02), (2, 0.2), (32, 0.2)):
        walk = torch.zeros(16)
        shares, layer = [], RunningBatchNorm1d(16)
        for number in range(3000):
            walk = walk + step * torch.randn(16)
            layer(walk + torch.randn(size, 16))
            if number > 1000:
                shares.append(layer.share.item())
        r = step**2 * size
        best = (math.sqrt(r * r + 4 * r) - r) / 2
        assert math.exp(sum(map(math.log, shares)) / len(shares)) == pytest.approx(best, rel=0.3)


def gradient_share_above_a_linear_layer(lr: float, mean: float, inputs: int = 2) -> float:
    """The geometric mean over the last 300 of 600 steps, each of some noisy inputs of this mean."""
    torch.manual_seed(0)
    weight, targets = torch.randn(32, 8), torch.randn(8, 32)
    norm, logarithms = RunningBatchNorm1d(32, step_bound=None), []
    for _ in range(600):
        weight = (weight / weight.norm(dim=1, keepdim=True)).requires_grad_()  # else it grows, and steps mean less
        noise = torch.randn(inputs, 8)
        loss = (norm((noise + mean) @ weight.T) - noise @ targets).square().mean()
        weight = weight.detach() - lr * torch.autograd.grad(loss, weight)[0]
        logarithms.append(norm.gradient_share.log().item())
    return math.exp(sum(logarithms[300:]) / 300)


@pytest.mark.parametrize("kernels", [nullcontext, composed])
def test_a_batch_has_a_small_share_in_the_averages_of_gradients_unless_its_drift_shows(kernels):
    """A drift moves the mean of the norm's input by the squared length of the linear layer's mean input, 0 or 72."""
    with kernels():
        assert gradient_share_above_a_linear_layer(lr=1.0, mean=0.0) < 0.02
        assert gradient_share_above_a_linear_layer(lr=0.01, mean=3.0) < 0.2
        assert gradient_share_above_a_linear_layer(lr=1.0, mean=3.0) > 0.5
        assert gradient_share_above_a_linear_layer(lr=0.01, mean=3.0, inputs=128) > 0.5


@pytest.mark.parametrize("kernels", [nullcontext, composed])
def test_where_statistics_move_fast_the_backward_pass_is_batch_norms(kernels):
    """Averages of gradients that are older than the statistics let an adaptive optimizer move them ever faster."""
    torch.manual_seed(0)
    layer, batch = RunningBatchNorm2d(3, momentum=1e-6, step_bound=None), BatchNorm2d(3)
    layer.load_state_dict(layer.state_dict() | {"num_batches_tracked": torch.tensor(10_000)})
    for share, equal in ((1.0, True), (0.01, False)):
        layer.share.fill_(share)
        layer.gradient_share.fill_(1e-3)
        x, grad, results = torch.randn(2, 3, 5, 5), torch.randn(2, 3, 5, 5), []
        for norm in (layer, batch):
            inputs = x.clone().requires_grad_()
            with kernels():
                norm(inputs).backward(grad)
            results.append(inputs.grad)
        assert torch.allclose(*results, atol=1e-4) == equal


@pytest.mark.parametrize("clipped", [True, False])
def test_what_is_subtracted_from_a_clipped_gradient_is_what_other_steps_add(clipped):
    """Every tenth gradient is ten times as long; over all steps, as long as they are, the mean of g cancels."""
    torch.manual_seed(0)
    layer = RunningBatchNorm1d(8, momentum=0.05, step_bound=None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
    total, size = 0.0, 0.0
    for number in range(2000):
        x = torch.randn(1, 8).requires_grad_()
        layer(x).backward(torch.full((1, 8), 1.0 if number % 10 else 10.0))
        length = nn.utils.clip_grad_norm_(layer.parameters(), 1.0 if clipped else math.inf)
        step = min(1.0, 1 / length.item()) if clipped else 1.0
        optimizer.step()
        optimizer.zero_grad()
        if number >= 500:
            total += step * x.grad.mean().item()
            size += step * x.grad.abs().mean().item()
    assert abs(total) < 0.1 * size


@pytest.mark.parametrize("lr", [0.01, 0.5, 10.0])
@pytest.mark.parametrize("loss_scale", [1.0, 65536.0])
def test_no_image_moves_the_parameters_further_than_the_bound(lr, loss_scale):
    """Whatever the learning rate and the scale of the loss, which the optimizer takes out again."""
    torch.manual_seed(0)
    layer = RunningBatchNorm2d(8, step_bound=0.01)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr / loss_scale)
    for number in range(12):
        before = torch.cat([layer.weight, layer.bias]).detach().clone()
        x = torch.randn(1, 8, 1, 1)
        optimizer.zero_grad()
        (layer(x) * torch.randn(1, 8, 1, 1) * loss_scale).sum().backward()
        optimizer.step()
        moved = torch.cat([layer.weight, layer.bias]).detach() - before
        along = moved @ before / (before @ before)  # what the pull takes away is in here
        if number >= 1 or lr == 0.5:  # the rate is measured by the first step
            assert -0.11 < along < 0.01
            # An eighth of the bound, for this is one image; γ moves by x̂ times as much as β.
            assert (moved - along * before).norm() <= 0.003 * before.norm() * (1 + x.abs().max() * 2) * 0.6
    if lr == 10.0:
        assert torch.cat([layer.weight, layer.bias]).isfinite().all()


def test_the_learning_rate_is_measured_also_under_accumulation():
    torch.manual_seed(0)
    layer = RunningBatchNorm2d(4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.07)
    for _ in range(5):
        for _ in range(3):
            (layer(torch.randn(2, 4, 3, 3)) * torch.randn(2, 4, 3, 3) / 1000).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    layer(torch.randn(2, 4, 3, 3)).sum().backward()
    assert layer.log_learning_rate.exp().item() == pytest.approx(0.07, rel=1e-2)


def test_the_first_step_is_bounded_as_if_the_learning_rate_were_one():
    layer = RunningBatchNorm2d(8)
    layer(torch.randn(2, 8, 3, 3)).backward(torch.randn(2, 8, 3, 3) * 1000)
    pushed = torch.cat([layer.weight.grad, layer.bias.grad]).norm()
    # Two images, each bounded to .006 √8, their values summed over nine positions; √(2/64) of it, a pull of a tenth.
    assert pushed < 2 * 0.006 * 8**0.5 * 3 * 3 * (2 / 64) ** 0.5 + 0.1 * 8**0.5


def test_steps_that_were_clipped_do_not_hide_the_learning_rate():
    """One step in ten is a hundred times shorter than its gradient asks: the rate measured is the other nine's."""
    torch.manual_seed(0)
    layer = RunningBatchNorm2d(4)
    for number in range(100):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 if number % 10 else 0.001)
        optimizer.zero_grad()
        (layer(torch.randn(2, 4, 3, 3)) * torch.randn(2, 4, 3, 3) / 100).sum().backward()
        optimizer.step()
    assert 0.05 < layer.log_learning_rate.exp() < 0.1


def train_a_linear_classifier(norm: nn.Module, lr: float, steps: int = 300) -> float:
    """Mean loss of the last steps; two noisy images a step, 64 channels."""
    torch.manual_seed(0)
    linear = nn.Linear(64, 4)
    optimizer = torch.optim.SGD([*norm.parameters(), *linear.parameters()], lr=lr)
    centers, losses = torch.randn(4, 64), []
    for _ in range(steps):
        targets = torch.randint(4, (2,))
        loss = nn.functional.cross_entropy(linear(norm(centers[targets] + 3 * torch.randn(2, 64))), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-100:]) / 100


@pytest.mark.parametrize("kernels", [nullcontext, composed])
def test_an_image_of_much_contrast_does_not_turn_its_gradient_round(kernels):
    """Its x̂² is far above 1; what of the gradient lies along x̂ is removed as in batch norm, not overshot."""
    torch.manual_seed(0)
    layer = RunningBatchNorm2d(3, step_bound=None)
    layer.share.fill_(1e-3)
    layer.num_batches_tracked.fill_(1000)  # so that the share adapts slowly
    x = torch.randn(2, 3, 16, 16)
    x = (10 * (x - x.mean((0, 2, 3), keepdim=True))).requires_grad_()
    grad = torch.randn(2, 3, 16, 16) + x.detach() / 10
    with kernels():
        y = layer(x)
        y.backward(grad)
    assert y.square().mean() > 20
    along = (x.grad * x).sum((0, 2, 3)) / (x * x).sum((0, 2, 3)).sqrt() / grad.norm()
    assert along.abs().max() < 1e-4
    assert x.grad.norm() < grad.norm()


def test_an_output_that_overshoots_is_pulled_in():
    free, pulled = RunningBatchNorm1d(64, step_bound=None), RunningBatchNorm1d(64)
    losses = [train_a_linear_classifier(norm, lr=1.0) for norm in (free, pulled)]
    assert pulled.weight.norm() < 0.6 * free.weight.norm()
    assert losses[1] < 0.6 * losses[0]


def test_at_a_low_learning_rate_nothing_is_pulled():
    """ηH is below N: γ and β move as their own gradient says, √(2/64) of batch norm's."""
    layer = RunningBatchNorm1d(64)
    train_a_linear_classifier(layer, lr=0.01)
    assert layer.weight.norm().item() == pytest.approx(8, rel=0.02)


@pytest.mark.parametrize(("images", "share"), [(1, 1 / 8), (4, 1 / 4), (64, 1), (100, 1)])
def test_parameters_learn_at_a_share_that_grows_with_the_batch(images, share):
    x, grad = torch.randn(images, 3, 2, 2), torch.randn(images, 3, 2, 2)
    grads = []
    for norm in (RunningBatchNorm2d(3, step_bound=None), BatchNorm2d(3)):
        norm(x).backward(grad)
        grads.append(torch.stack([norm.weight.grad, norm.bias.grad]))
    torch.testing.assert_close(grads[0], grads[1] * share)


def test_parameters_that_are_frozen_bound_nothing():
    free, frozen = RunningBatchNorm2d(4, step_bound=1e-6), RunningBatchNorm2d(4, step_bound=None)
    for parameter in free.parameters():
        parameter.requires_grad_(False)
    for _ in range(3):
        x, grad = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3) * 100
        results = []
        for layer in (free, frozen):
            inputs = x.clone().requires_grad_()
            layer(inputs).backward(grad)
            results.append(inputs.grad)
        torch.testing.assert_close(*results)


def test_batch_norms_state_loads_and_comes_back():
    torch.manual_seed(0)
    batch = with_drawn_parameters(nn.BatchNorm2d(3))
    batch(torch.randn(8, 3, 4, 4) * 3 + 1)
    layer = RunningBatchNorm2d(3)
    layer.load_state_dict(batch.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(layer.eval()(x), batch.eval()(x))
    other = nn.BatchNorm2d(3)
    other.load_state_dict(layer.state_dict(), strict=False)
    assert_same_state(other, batch)


def test_a_state_without_a_count_of_batches_has_seen_some():
    state = nn.BatchNorm2d(2).state_dict()
    del state["num_batches_tracked"]
    layer = RunningBatchNorm2d(2)
    layer.load_state_dict({**state, "running_mean": torch.ones(2)})
    layer(torch.zeros(1, 2, 1, 1))
    assert layer.running_mean.min() > 0.89  # not thrown away by the first batch


# That of a layer after three steps, from before the buffers had the names of `State`; only `share` is put in.
OLD_STATE = {
    "weight": [0.9991774559020996, 0.99726402759552],
    "bias": [0.00019071309361606836, -0.002042425097897649],
    "running_mean": [1.818437099456787, 1.4639307260513306],
    "running_var": [0.2406867891550064, 1.2391303777694702],
    "num_batches_tracked": 3,
    "share": 0.05,
    "innovation": [2.0737204551696777, 0.7452776432037354],
    "gradient_share": 0.6888319849967957,
    "gradient_average": [
        [0.00010959571227431297, 0.0020886606071144342],
        [0.00019985857943538576, 0.0010234167566522956],
    ],
    "gradient_latest": [
        [0.0008486759033985436, -9.5741605036892e-05],
        [-0.0006962156039662659, 0.0007748200441710651],
    ],
    "gradient_parameters": [
        [0.9997775554656982, 0.9971963167190552],
        [-0.00030158564914017916, -0.001494544674642384],
    ],
    "gradient_push": [
        [0.001200208906084299, -0.0001353990810457617],
        [-0.000984597485512495, 0.0010957609629258513],
    ],
    "gradient_measured": [-0.693146824836731, 2.0, 0.22298015654087067, 0.5000003576278687, 0.6888319849967957],
}


@pytest.mark.parametrize("prefix", ["", "0."])
def test_a_state_with_names_of_before_loads_and_goes_on(prefix):
    """As the code of then did: its next step is here as that gave it."""
    state = {prefix + name: torch.tensor(value) for name, value in OLD_STATE.items()}
    layer = RunningBatchNorm2d(2)
    (nn.Sequential(layer) if prefix else layer).load_state_dict(state)
    average, latest = (torch.tensor(OLD_STATE[name]) for name in ("gradient_average", "gradient_latest"))
    assert torch.equal(layer.gradient_average, average.flip(0))
    assert torch.equal(layer.gradient_latest, latest.flip(0))
    assert torch.equal(layer.parameters_before, torch.tensor(OLD_STATE["gradient_parameters"]))
    assert torch.equal(layer.parameters_gradient, torch.tensor(OLD_STATE["gradient_push"]))
    names = ("log_learning_rate", "learning_rate_steps", "output_square", "step_length", "latest_gradient_share")
    for name, value in zip(names, OLD_STATE["gradient_measured"], strict=True):
        assert torch.equal(getattr(layer, name), torch.tensor(value))
    assert prefix + "gradient_measured" in state  # the caller's own is as it was
    x = (torch.arange(8.0).view(1, 2, 2, 2) / 4).requires_grad_()
    y = layer(x)
    y.backward(torch.tensor([1.0, -1, 2, 0, 0.5, 1, 0, -2]).view(1, 2, 2, 2))
    expected = [
        [
            *(-3.144792318344116, -2.6984477043151855, -2.252102851867676, -1.8057581186294556),
            *(-0.42231178283691406, -0.19411489367485046, 0.034081995487213135, 0.26227888464927673),
        ],
        [
            *(0.0032814638689160347, -0.014244340360164642, 0.013396797701716423, -0.004129005596041679),
            *(0.0021011438220739365, 0.004476462956517935, -7.579212979180738e-05, -0.009246430359780788),
        ],
        [0.07332067936658859, 0.07571776211261749],
        [0.0012795047368854284, -0.00047250912757590413],
    ]
    found = [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]
    assert_close([part.flatten() for part in found], [torch.tensor(part) for part in expected], 1e-5)


@pytest.mark.parametrize("kernels", [nullcontext, composed])
def test_other_constants_are_used_inside_and_forgotten_after(kernels):
    x, grad = torch.randn(16, 3, 2, 2), torch.randn(16, 3, 2, 2)

    def weight_grad():
        layer = RunningBatchNorm2d(3, step_bound=None)
        layer(x).backward(grad)
        return layer.weight.grad

    with kernels():
        usual = weight_grad()
        with cpu.use_constants(steady_images=16):
            torch.testing.assert_close(weight_grad(), 2 * usual)
        assert torch.equal(weight_grad(), usual)


@pytest.mark.parametrize("kernels", [nullcontext, composed])
def test_the_plain_function_is_the_layer(kernels):
    layer = with_drawn_parameters(RunningBatchNorm2d(3))
    weight, bias = (part.detach().clone().requires_grad_() for part in (layer.weight, layer.bias))
    state = State.empty(3)
    for _ in range(3):
        x, grad = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
        one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        with kernels():
            y = layer(one)
        y.backward(grad)
        before = State._make(part.clone() for part in state)
        found, new = F.running_batch_norm(other, state, weight, bias)
        found.backward(grad)
        assert all(map(torch.equal, state, before))
        state = new
        assert_close([found.detach(), other.grad], [y.detach(), one.grad], 1e-5)
    assert_close(list(state), [getattr(layer, name) for name in State._fields], 1e-4)


def test_representation():
    text = "RunningBatchNorm2d(3, eps=1e-05, momentum=0.1, affine=True, step_bound=None)"
    assert repr(RunningBatchNorm2d(3, step_bound=None)) == text


def test_reset_forgets_everything():
    layer = RunningBatchNorm2d(3)
    layer(torch.randn(2, 3, 2, 2)).square().sum().backward()
    layer.reset_running_stats()
    assert_same_state(layer, RunningBatchNorm2d(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_features": 0}, "num_features=0"),
        ({"momentum": 0}, "momentum=0"),
        ({"momentum": 1.0}, r"momentum=1.0 .* below 1"),
        ({"step_bound": 0}, "step_bound=0"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(InputError, match=message):
        RunningBatchNorm2d(**{"num_features": 2, **options})


@pytest.mark.parametrize("dims", LAYERS)
def test_wrong_shape_is_refused(dims):
    with pytest.raises(InputError, match=r"RunningBatchNorm.d\(4\): expected input \(N, 4"):
        LAYERS[dims](4)(torch.randn(2, 5, *SPACES[dims]))

"""Running batch norm equals its formula in float64, step by step, and what its formula promises holds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from checks import assert_close, assert_same_state, layouts, with_drawn_parameters
from normlab.errors import InputError
from normlab.nn import BatchNorm2d, RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d

LAYERS = {1: RunningBatchNorm1d, 2: RunningBatchNorm2d, 3: RunningBatchNorm3d}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
SPACES = {1: (5,), 2: (3, 4), 3: (2, 3, 2)}


class Formula:
    """The rule as the docstrings have it, written out for float64, with plain numbers where there is one."""

    def __init__(self, channels: int, momentum: float, eps: float, bound: float | None):
        self.recent = self.running = (torch.zeros(channels).double(), torch.ones(channels).double())
        self.t, self.length = 0, 0.0
        self.a, self.b = torch.zeros(channels).double(), torch.zeros(channels).double()
        self.momentum, self.eps, self.bound = momentum, eps, bound
        self.before: Tensor | None = None
        self.push = torch.zeros(2 * channels).double()
        self.rates: list[float] = []
        self.lr = 1.0

    def step(self, x: Tensor, grad: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Output, and the gradients of x, γ and β."""
        self.t += 1
        n = x.numel() / x.shape[1]
        rate, slow = (max(1 - (1 - self.momentum) ** size, 1 / self.t) for size in (n / 20, len(x) / 100))
        moments = reference.channel_moments(x)
        self.recent = self.mixed(*self.recent, *moments, max(rate, self.disagreement(*moments)))
        self.running = self.mixed(*self.running, *moments, slow)
        x_hat = reference.normalize(x, *self.recent, None, None, self.eps)
        y, now = reference.scale(x_hat, weight, bias), torch.cat([weight, bias])
        self.measure(now)
        squares = y.flatten(2).mean(2).square().sum(1).mean().item() if x.dim() > 2 else y.square().sum(1).mean().item()
        self.length += rate * (squares - self.length)
        factors = self.factors(grad, now)
        grad = grad * reference.per_image(factors, x)
        dims = [0, *range(2, x.dim())]
        sum_weight, sum_bias = (grad * x_hat).sum(dims), grad.sum(dims)
        self.a = (1 - rate) * self.a + rate * sum_bias / n
        self.b = (1 - rate) * self.b + rate * sum_weight / n
        pulled = grad - reference.per_channel(self.a, x) - x_hat * reference.per_channel(self.b, x)
        grad_x = pulled * reference.per_channel(weight / (self.recent[1] + self.eps).sqrt(), x)
        k = 0.0
        if self.bound is not None and self.lr * self.length > len(x):
            met = sum(factor < 1 for factor in factors) / len(factors)
            k = met / (10 * self.lr) * (1 - len(x) / (self.lr * self.length))
        grad_weight, grad_bias = sum_weight / 10 + k * weight, sum_bias / 10 + k * bias
        self.push = self.push + torch.cat([grad_weight, grad_bias])
        return [y, grad_x, grad_weight, grad_bias]

    def mixed(self, mean: Tensor, var: Tensor, m: Tensor, v: Tensor, share: float) -> tuple[Tensor, Tensor]:
        distance = m - mean
        return mean + share * distance, (1 - share) * var + share * v + share * (1 - share) * distance**2

    def disagreement(self, m: Tensor, v: Tensor) -> float:
        mean, var = self.recent
        squares = [min(16.0, q) for q in ((v + (m - mean) ** 2) / (var + self.eps)).tolist()]
        q = sum(squares) / len(squares)
        return (q / 2.5 - 1) / (q - 1) if q > 2.5 else 0.0

    def measure(self, now: Tensor) -> None:
        """The learning rate, if γ and β have moved."""
        if self.before is not None and not torch.equal(now, self.before):
            self.rates.append((now - self.before).norm().item() / self.push.norm().item())
            self.lr = math.prod(self.rates) ** (1 / len(self.rates))
            self.push = torch.zeros_like(self.push)
        self.before = now.clone()

    def factors(self, grad: Tensor, now: Tensor) -> list[float]:
        """What the gradient of each image is multiplied by."""
        if self.bound is None:
            return [1.0] * len(grad)
        size = max(now.norm().item(), math.sqrt(len(now) / 2))
        return [min(1.0, self.bound * size / (self.lr * g.norm().item())) for g in grad]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_steps_equal_the_formula_in_float64(data):
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    dims, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    momentum, lr = data.draw(st.sampled_from([0.1, 0.5])), data.draw(st.sampled_from([0.01, 1.0]))
    bound = data.draw(st.sampled_from([None, 0.01, 0.1]))
    layer = LAYERS[dims](channels, 0.1, momentum, step_bound=bound)
    with_drawn_parameters(layer)
    if dtype == torch.float64:
        layer.double()
    formula = Formula(channels, momentum, 0.1, bound)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr)
    for _ in range(6):
        jump = data.draw(st.sampled_from([1.0, 1.0, 6.0]))  # the layers below have moved: statistics disagree
        x = (torch.randn(data.draw(st.integers(1, 4)), channels, *SPACES[dims]) * jump + 0.5).to(dtype)
        x = data.draw(layouts)(x).requires_grad_()
        grad = torch.randn_like(x)
        expected = formula.step(*(value.detach().double() for value in (x, grad, layer.weight, layer.bias)))
        optimizer.zero_grad()
        y = layer(x)
        y.backward(grad)
        assert_close([y.detach(), x.grad, layer.weight.grad, layer.bias.grad], expected, TOLERANCE[dtype])
        assert_close([layer.recent_mean, layer.recent_var], formula.recent, TOLERANCE[dtype])
        assert_close([layer.running_mean, layer.running_var], formula.running, TOLERANCE[dtype])
        optimizer.step()
    parameters = (layer.weight.double(), layer.bias.double())
    expected = reference.normalize(x.detach().double(), *formula.running, *parameters, 0.1)
    assert_close([layer.eval()(x)], [expected], TOLERANCE[dtype])


def test_a_large_batch_is_batch_norm():
    torch.manual_seed(0)
    x, grad = torch.randn(256, 3, 2, 2).double() * 2 + 1, torch.randn(256, 3, 2, 2).double() / 1e4
    layer, batch = RunningBatchNorm2d(3, momentum=0.9).double(), BatchNorm2d(3).double()
    results = []
    for norm in (layer, batch):
        norm(torch.randn(256, 3, 2, 2).double())
        inputs = x.clone().requires_grad_()
        y = norm(inputs)
        y.backward(grad)
        results.append([y.detach(), inputs.grad])
    assert_close(*results, tolerance=1e-9)


def test_statistics_of_the_first_batches_are_their_mean():
    x = torch.randn(12, 3, 2, 2).double()
    layer = RunningBatchNorm2d(3, momentum=0.01).double()
    for part in x.split(3):
        layer(part)
    mean, var = reference.channel_moments(x)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)


def test_the_same_images_in_smaller_batches_are_forgotten_at_the_same_rate():
    """After the start, what is left of old statistics depends on the number of values, or of images, alone."""
    recent, running = [], []
    for size in (1, 2, 4):
        layer = RunningBatchNorm2d(2).double()
        layer.load_state_dict(BatchNorm2d(2).double().state_dict() | {"num_batches_tracked": torch.tensor(10**6)})
        with torch.no_grad():
            layer.running_mean.fill_(0.5)
            layer.recent_mean.fill_(0.5)
        for _ in range(8 // size):
            layer(torch.tensor([1.0, -1.0] * 4 * size).double().view(size, 2, 2, 2))
        recent.append(layer.recent_mean[0].item())
        running.append(layer.running_mean[0].item())
    assert recent == pytest.approx([0.5 * 0.9**1.6] * 3)
    assert running == pytest.approx([0.5 * 0.9**0.08] * 3)


def test_a_disagreeing_batch_is_brought_back():
    """Statistics of activations several times smaller: the mean square of the output is 2.5 at most."""
    layer = RunningBatchNorm2d(16)
    for _ in range(50):
        layer(torch.randn(2, 16, 4, 4))
    for scale in (2.0, 3.0):
        y = layer(torch.randn(2, 16, 4, 4) * scale)
        assert 1.0 < y.square().mean() < 2.6
    assert layer(torch.randn(2, 16, 4, 4) * 9).square().mean() < 2.6


def test_a_channel_that_comes_to_life_is_no_disagreement():
    torch.manual_seed(0)
    layer = RunningBatchNorm2d(64)
    x = torch.randn(2, 64, 4, 4)
    x[:, 0] = 0
    for _ in range(50):
        layer(x)
    before = layer.recent_var[1:].clone()
    x[:, 0] = 100 * torch.randn(2, 4, 4)
    layer(x)
    torch.testing.assert_close(layer.recent_var[1:], before)


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
            # A tenth of the bound; γ moves by x̂ times as much as β.
            assert (moved - along * before).norm() <= 0.001 * before.norm() * (1 + x.abs().max() * 2) * 1.5
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
    assert layer.gradient_measured[0].exp().item() == pytest.approx(0.07, rel=1e-2)


def test_the_first_step_is_bounded_as_if_the_learning_rate_were_one():
    layer = RunningBatchNorm2d(8)
    layer(torch.randn(2, 8, 3, 3)).backward(torch.randn(2, 8, 3, 3) * 1000)
    pushed = torch.cat([layer.weight.grad, layer.bias.grad]).norm()
    # Two images, each bounded to .006 √8, their values summed over nine positions; a tenth, and a pull of a tenth.
    assert pushed < 2 * 0.006 * 8**0.5 * 3 * 3 / 10 + 0.1 * 8**0.5


def test_steps_that_were_clipped_do_not_hide_the_learning_rate():
    """One step in ten is a hundred times shorter than its gradient asks: the rate measured is the other nine's."""
    torch.manual_seed(0)
    layer = RunningBatchNorm2d(4)
    for number in range(100):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 if number % 10 else 0.001)
        optimizer.zero_grad()
        (layer(torch.randn(2, 4, 3, 3)) * torch.randn(2, 4, 3, 3) / 100).sum().backward()
        optimizer.step()
    assert 0.05 < layer.gradient_measured[0].exp() < 0.1


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


def test_an_output_that_overshoots_is_pulled_in():
    free, pulled = RunningBatchNorm1d(64, step_bound=None), RunningBatchNorm1d(64)
    losses = [train_a_linear_classifier(norm, lr=1.0) for norm in (free, pulled)]
    assert pulled.weight.norm() < 0.6 * free.weight.norm()
    assert losses[1] < 0.6 * losses[0]


def test_at_a_low_learning_rate_nothing_is_pulled():
    """ηH is below N: γ and β move as their own gradient says, a tenth of batch norm's."""
    layer = RunningBatchNorm1d(64)
    train_a_linear_classifier(layer, lr=0.01)
    assert layer.weight.norm().item() == pytest.approx(8, rel=0.02)


def test_parameters_learn_at_a_tenth():
    x, grad = torch.randn(8, 3, 2, 2), torch.randn(8, 3, 2, 2)
    grads = []
    for norm in (RunningBatchNorm2d(3, step_bound=None), BatchNorm2d(3)):
        norm(x).backward(grad)
        grads.append(torch.stack([norm.weight.grad, norm.bias.grad]))
    torch.testing.assert_close(grads[0], grads[1] / 10)


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
    assert layer.recent_mean.min() == 1
    layer(torch.zeros(1, 2, 1, 1))
    assert min(layer.running_mean.min(), layer.recent_mean.min()) > 0.4  # not thrown away by the first batch


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
    with pytest.raises(InputError, match=r"x.shape=.* the second of 4 channels"):
        LAYERS[dims](4)(torch.randn(2, 5, *SPACES[dims]))

"""Mixed precision: what is computed in which type, and what a step that overflows leaves behind."""

import copy

import pytest
import torch
from keeping import KEEPING
from torch import nn

from normlab.data import TensorBatches
from normlab.errors import InputError
from normlab.nn import RunningBatchNorm1d, build_norm
from normlab.training import Callback, ClipGradients, Learner


def net(norm="batch", seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), build_norm(norm, 8, 1), nn.ReLU(), nn.Linear(8, 3))


def data(samples=24):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 6, generator=generator), torch.randint(3, (samples,), generator=generator)


def small_loss(output, targets):
    """So small that no gradient overflows at the first scale, 65536."""
    return nn.functional.cross_entropy(output, targets) / 100


def learner(model, *callbacks, optimizer=None, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    batches = TensorBatches(*data(), batch_size=4)
    return Learner(model, batches, loss_func=small_loss, optimizer=optimizer, callbacks=callbacks, **options)


class Look(Callback):
    def __init__(self):
        self.outputs, self.gradients, self.weights = [], [], []

    def after_pred(self):
        self.outputs.append(self.learner.output.dtype)

    def begin_step(self):
        self.gradients.append(self.learner.model[0].weight.grad.clone())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_outputs_are_narrow_and_parameters_wide(name):
    look, model = Look(), net()
    one = learner(model, look, precision=name)
    one.fit(1)
    assert set(look.outputs) == {getattr(torch, name)}
    assert all(part.dtype is torch.float32 for part in model.parameters())


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_gradients_are_those_of_the_loss_itself(name):
    looks = []
    for precision in ("float32", name):
        look = Look()
        learner(net(), look, precision=precision).fit(1)
        looks.append(look.gradients)
    first, narrow = (gradients[0] for gradients in looks)
    assert (first - narrow).norm() < 0.05 * first.norm()


class Overflow(Callback):
    """Makes the loss of one batch so large that its gradient overflows in float16."""

    order = -1

    def __init__(self, at):
        self.at, self.batches = at, 0

    def after_loss(self):
        if self.learner.training:
            if self.batches == self.at:
                self.learner.loss = self.learner.loss * 1e30
            self.batches += 1


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("norm", KEEPING)
def test_a_step_that_overflows_is_left_out_and_tells_nothing_to_statistics(norm, accumulate):
    """What norms remember of gradients is compared without the scale, which has changed."""
    model, before, after = net(norm), [], []

    def state():
        copied, scaler = copy.deepcopy(model), one.precision._scaler
        if scaler is not None and hasattr(copied[1], "rescale_gradients"):
            copied[1].rescale_gradients(1 / scaler.get_scale())
        return list(copied.state_dict().values())

    class Snapshot(Callback):
        order = -2

        def begin_batch(self):
            if self.learner.batch % accumulate == 0:
                before.append(state())

        def after_batch(self):
            if (self.learner.batch + 1) % accumulate == 0:
                after.append(state())

    one = learner(model, Snapshot(), Overflow(accumulate), precision="float16", accumulate=accumulate)
    one.fit(1)
    same = [all(map(torch.allclose, *pair)) for pair in zip(before, after, strict=True)]
    assert same == [False, True, *[False] * (len(same) - 2)]
    assert one.step == len(same) - 1


def test_clipping_sees_the_gradient_without_the_scale():
    look, model = Look(), net()
    learner(model, ClipGradients(1e-5), look, precision="float16").fit(1)
    assert all(gradient.norm() <= 1.001e-5 for gradient in look.gradients)


def test_statistics_stay_wide():
    model = net("running")
    learner(model, precision="bfloat16").fit(1)
    assert isinstance(model[1], RunningBatchNorm1d)
    assert model[1].running_mean.dtype is torch.float32
    assert model[1].running_mean.abs().max() > 0


def test_another_name_is_refused():
    with pytest.raises(InputError, match=r"precision='bf16' is unknown\. .*Accepted: float32, bfloat16, float16"):
        learner(net(), precision="bf16")


def test_what_does_not_go_together_is_refused():
    with pytest.raises(InputError, match=r"compile=True is not usable\. Accepted: False with a step_func, and with fl"):
        learner(net(), precision="float16", compile=True)
    model = net()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(
        InputError, match=r"precision='float16' is not usable\. Accepted: float32 or bfloat16 with LBFGS"
    ):
        learner(model, optimizer=lbfgs, precision="float16").fit(1)

"""The moving average of weights and statistics, against float64 step by step."""

import pytest
import torch
from torch import nn

import normlab
from learners import classifier, samples, sees
from normlab.errors import InputError
from normlab.nn import RunningBatchNorm1d
from normlab.training import EMA, Callback, Checkpoint, Metrics


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), RunningBatchNorm1d(4), nn.GroupNorm(2, 4), nn.Linear(4, 3)
    return nn.Sequential(*layers)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: part.detach().clone() for name, part in (*model.named_parameters(), *model.named_buffers())}


def averaged(after_steps: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    """In float64."""
    mean = {name: part.double() for name, part in after_steps[0].items()}
    for step in after_steps[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * part.double() for name, part in step.items()}
    return mean


@pytest.mark.parametrize("options", [{}, {"accumulate": 3}, {"precision": "bfloat16"}, {"precision": "float16"}])
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_weights_and_statistics_are_averaged_after_each_step(decay, options):
    ema, seen, model = EMA(decay), sees(lambda it: tensors(it.model), "after_step"), net()
    learner = classifier(ema, seen, model=model, n=46, **options)
    learner.fit(2)
    assert len(seen.seen) == learner.step
    expected = averaged(seen.seen, decay)
    for name, part in tensors(ema.model).items():
        if part.is_floating_point():
            torch.testing.assert_close(part.double(), expected[name], rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(part, seen.seen[-1][name]), f"{name}: a counter is that of the model"
    assert learner.model is model
    assert not any(part.requires_grad for part in ema.model.parameters())


def test_a_step_that_is_left_out_is_not_counted():
    class Overflows(Callback):
        order = 1

        def after_pred(self) -> None:
            if self.learner.training and self.learner.batch == 3:
                self.learner.output = self.learner.output * float("inf")

    ema, seen = EMA(0.5), sees(lambda it: tensors(it.model), "after_step")
    classifier(Overflows(), ema, seen, model=net(), n=24, precision="float16").fit(1)
    assert len(seen.seen) == int(ema.average.n_averaged) == 5
    expected = averaged(seen.seen, 0.5)
    weight = tensors(ema.model)["0.weight"]
    torch.testing.assert_close(weight.double(), expected["0.weight"], rtol=1e-5, atol=1e-6)


def test_the_average_is_validated_and_the_model_goes_on_training():
    ema, model = EMA(0.9), net()
    models = sees(lambda it: (it.training, it.model is model, it.model.training), "begin_batch", order=30)
    after = sees(lambda it: it.model is model, "after_epoch", order=100)
    history = classifier(ema, models, after, Metrics(), model=model, n=12, valid=7).fit(3)
    assert models.seen == ([(True, True, True)] * 3 + [(False, False, False)] * 2) * 3
    assert after.seen == [True] * 3
    x, y = samples(7, 1)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(ema.model(x), y)
    assert history[-1]["valid"]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_the_model_itself_may_be_validated():
    model = net()
    models = sees(lambda it: it.model is model)
    classifier(EMA(0.9, validate=False), models, model=model).fit(1)
    assert all(models.seen)


def test_statistics_are_measured_by_a_function():
    batches, model = [samples(64, seed=9)[0]], net()
    ema = EMA(0.9, statistics=lambda average: normlab.recalibrate(average, batches))
    learner = classifier(ema, model=model, n=40, valid=0)
    learner.fit(1)
    x = batches[0]
    with torch.no_grad():
        given = ema.model[0](x).double()
    torch.testing.assert_close(ema.model[1].running_mean.double(), given.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ema.model[1].running_var.double(), given.var(0), rtol=1e-5, atol=1e-6)
    assert not torch.equal(ema.model[1].running_mean, model[1].running_mean)


def test_after_a_failure_the_model_is_back():
    class Fails(Callback):
        def after_pred(self) -> None:
            if not self.learner.training:
                raise KeyboardInterrupt

    model = net()
    learner = classifier(EMA(0.9), Fails(), model=model)
    with pytest.raises(KeyboardInterrupt):
        learner.fit(1)
    assert learner.model is model


class Ends(Callback):
    def __init__(self, step: int):
        self.at = step

    def after_step(self) -> None:
        if self.learner.step == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 11, 14])
def test_it_goes_on_from_a_checkpoint_bit_by_bit(tmp_path, step):
    whole = EMA(0.9)
    classifier(whole, model=net(), n=40).fit(2)
    checkpoint = Checkpoint(tmp_path / "a.ckpt", batches=2)
    with pytest.raises(KeyboardInterrupt):
        classifier(EMA(0.9), checkpoint, Ends(step), model=net(), n=40).fit(2)
    again = EMA(0.9)
    learner = classifier(again, checkpoint, model=net(), n=40)
    assert checkpoint.resume(learner)
    learner.fit(2)
    found, expected = tensors(again.model), tensors(whole.model)
    assert all(torch.equal(found[name], part) for name, part in expected.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": 1}, "decay=1 is not usable. Accepted: a number from 0, below 1"),
        ({"decay": "0.9"}, "decay='0.9' is not usable"),
        ({"statistics": "recalibrate"}, "statistics='recalibrate' .* Accepted: 'average', or a function of the model"),
        ({"statistics": nn.BatchNorm1d}, "statistics=.* Accepted: 'average'"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        EMA(**options)


def test_before_a_fit_there_is_no_average():
    with pytest.raises(InputError, match=r"EMA: there is no average before a fit"):
        _ = EMA().model


def test_a_model_whose_parameters_are_not_made_is_refused():
    learner = classifier(EMA(), model=nn.LazyLinear(3))
    with pytest.raises(InputError, match=r"weight, bias.*run a batch"):
        learner.fit(1)

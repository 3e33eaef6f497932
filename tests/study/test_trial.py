"""Single runs, on real MNIST."""

import json

import pytest
import torch

from normlab.errors import InputError
from normlab.study.plan import Trial
from normlab.study.record import Record
from normlab.study.schedules import SCHEDULES
from normlab.study.trial import build_learner, quick_convolutions, run_trial, thin
from normlab.training import Callback


def small(**settings) -> Trial:
    return Trial(**{"norm": "batch", "batch_size": 64, "lr": 0.2, "images": 4000, **settings})


def test_a_run_learns_and_its_record_says_all_about_it():
    record = run_trial(small())
    assert record.status == "finished"
    assert record.settings == small().to_dict()
    assert record.steps == record.curve["step"][-1] == 63
    assert record.parameters == 62_274
    assert record.versions["torch"] == torch.__version__
    assert record.machine["threads"] == torch.get_num_threads()
    (epoch,) = record.epochs
    assert epoch["valid"]["accuracy"] > 0.85
    assert epoch["train"]["loss"] == pytest.approx(sum(record.curve["loss"]) / 63, rel=0.1)
    json.dumps(record.to_json())


def test_equal_trials_give_equal_runs_and_another_seed_another_one():
    runs = [run_trial(small(images=640, seed=seed)) for seed in (0, 0, 1)]
    curves = [run.curve["loss"] for run in runs]
    assert curves[0] == curves[1] != curves[2]


def test_a_run_that_diverges_is_a_result_that_says_where():
    record = run_trial(Trial(norm="none", batch_size=2, lr=5.0, images=2000))
    assert record.status == "diverged"
    losses = record.curve["loss"]
    step = record.diverged_at_step
    assert 1 <= step <= record.steps < 1000
    assert torch.tensor(losses[: (step - 1) // -(-record.steps // 100)]).isfinite().all()


def test_the_step_of_divergence_is_the_first_loss_that_is_not_finite():
    losses = []

    class Note(Callback):
        def after_backward(self):
            losses.append(float(self.learner.loss))

    record = run_trial(Trial(norm="none", batch_size=2, lr=5.0, images=2000), None, (Note(),))
    finite = torch.tensor(losses).isfinite().tolist()
    assert record.diverged_at_step == finite.index(False) + 1


def test_images_and_clip_reach_the_run():
    learner = build_learner(small(images=100, batch_size=10, clip=0.5))
    assert learner.train.num_samples == 100
    seen = []

    class Norms(Callback):
        order = 5

        def begin_step(self):
            grads = [p.grad.flatten() for p in self.learner.model.parameters()]
            seen.append(torch.cat(grads).norm().item())

    learner.callbacks.append(Norms())
    learner.fit(1)
    assert max(seen) <= 0.5001


def test_an_unknown_norm_is_named():
    with pytest.raises(InputError, match=r"norm='grup' is unknown\. Did you mean 'group'"):
        run_trial(small(norm="grup"))


@pytest.mark.parametrize(
    ("name", "start", "end"), [("constant", 0.4, 0.4), ("linear", 0.4, 0.08), ("one-cycle", 0.04, 0.0)]
)
def test_schedules_begin_and_end_where_the_plan_says(name, start, end):
    schedule = SCHEDULES[name](0.4)
    assert schedule(0.0) == pytest.approx(start)
    assert schedule(1.0) == pytest.approx(end)


def test_one_cycle_peaks_after_a_quarter():
    assert SCHEDULES["one-cycle"](0.4)(0.25) == pytest.approx(0.4)


def test_a_curve_keeps_its_mean_and_its_last_step():
    losses = [float(i) for i in range(1, 1008)]
    curve = thin(losses)
    assert len(curve["step"]) == len(curve["loss"]) <= 100
    assert curve["step"][-1] == 1007
    sizes = [b - a for a, b in zip([0, *curve["step"][:-1]], curve["step"], strict=True)]
    assert sum(s * v for s, v in zip(sizes, curve["loss"], strict=True)) == pytest.approx(sum(losses))
    assert thin([]) == {"step": [], "loss": []}


def test_the_quick_convolutions_give_the_same_numbers_and_leave_no_trace():
    conv, x = torch.nn.Conv2d(8, 16, 3, 2, 1), torch.randn(2, 8, 14, 14)
    usual = conv(x)
    before = torch.backends.mkldnn.is_available(), torch.backends.mkldnn.enabled
    with quick_convolutions("convnet", 2):
        assert not torch.backends.mkldnn.enabled
        torch.testing.assert_close(conv(x), usual)
    assert (torch.backends.mkldnn.is_available(), torch.backends.mkldnn.enabled) == before
    for model, size in (("convnet", 512), ("resnet", 2)):
        with quick_convolutions(model, size):
            assert torch.backends.mkldnn.enabled == before[1]


def test_a_record_has_the_activations_of_each_layer_at_ten_looks():
    record = run_trial(Trial(norm="batch", batch_size=50, images=1000, epochs=2))
    looked = record.more["activations"]
    assert len(looked["step"]) == 10
    assert looked["step"][0] == 1
    for figure in ("mean", "deviation"):
        assert {len(values) for values in looked[figure].values()} == {10}
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record

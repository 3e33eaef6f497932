"""The lesson's training: its runner, its callbacks, its schedules."""

import math
import re
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normlab import lesson
from normlab.errors import InputError
from normlab.lesson import (
    AvgStatsCallback,
    BatchTransformXCallback,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelTrainException,
    CudaCallback,
    DataBunch,
    Dataset,
    Learner,
    LR_Find,
    ParamScheduler,
    Recorder,
    Runner,
    accuracy,
    combine_scheds,
    conv_layer,
    cos_1cycle_anneal,
    get_data,
    get_dls,
    get_learn_run,
    get_runner,
    normalize_to,
    sched_cos,
    sched_exp,
    sched_lin,
    sched_no,
    view_tfm,
)

NFS = [8, 16, 32, 64, 64]


def images(n: int = 11, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset(torch.randn(n, 784, generator=generator), torch.arange(n) % 10)


def bunch(n: int = 11, valid: int = 7, bs: int = 4) -> DataBunch:
    return DataBunch(*get_dls(images(n), images(valid, 1), bs), 10)


def runs(*cbs, n: int = 11, valid: int = 7, lr: float = 0.1, **options) -> tuple[Learner, Runner]:
    """A linear classifier of flat images, batches of 4 and of 8."""
    torch.manual_seed(0)
    return get_runner(
        nn.Linear(784, 10), bunch(n, valid), lr=lr, cbs=[partial(lambda cb: cb, cb) for cb in cbs], **options
    )


def at(event: str, f, **attributes) -> Callback:
    """A callback of the lesson's kind that calls `f(self)` at one event."""
    return type("At", (Callback,), {event: f, **attributes})()


# --- runner ---------------------------------------------------------------------------------------------------------

TRAIN_BATCH = ["begin_batch", "after_pred", "after_loss", "after_backward", "after_step", "after_batch"]
VALID_BATCH = ["begin_batch", "after_pred", "after_loss", "after_batch"]


class Trace(Callback):
    def __init__(self, error: type[Exception] | None = None):
        self.error, self.events = error, []

    def after_loss(self):
        self.events.append("after_loss")
        if self.error:
            error, self.error = self.error, None
            raise error()


def note(event: str):
    return lambda self: self.events.append(event)


for name in {*TRAIN_BATCH, "begin_fit", "begin_epoch", "begin_validate", "after_epoch", "after_fit"} - {"after_loss"}:
    setattr(Trace, name, note(name))
for name in ("after_cancel_batch", "after_cancel_epoch", "after_cancel_train"):
    setattr(Trace, name, note(name))

REST = ["begin_validate", *VALID_BATCH, "after_epoch", "after_fit"]
CUT = TRAIN_BATCH[:3]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (None, [*TRAIN_BATCH * 3, *REST]),
        (CancelBatchException, [*CUT, "after_cancel_batch", "after_batch", *TRAIN_BATCH * 2, *REST]),
        (CancelEpochException, [*CUT, "after_batch", "after_cancel_epoch", *REST]),
        (CancelTrainException, [*CUT, "after_batch", "after_cancel_train", "after_fit"]),
    ],
)
def test_events_and_cancelling(error, expected):
    trace = Trace(error)
    learn, run = runs(trace)
    assert run.fit(1, learn) is None  # a cell that ends with it shows nothing
    assert trace.events == ["begin_fit", "begin_epoch", *expected]


def test_after_fit_comes_after_a_failure():
    trace = Trace(ZeroDivisionError)
    learn, run = runs(trace)
    with pytest.raises(ZeroDivisionError):
        run.fit(1, learn)
    assert trace.events[-2:] == ["after_batch", "after_fit"]


def test_callbacks_become_attributes_under_their_own_names():
    cbs = [Recorder, partial(AvgStatsCallback, accuracy), CudaCallback, LR_Find, MyOwnThing]
    cbs += [partial(BatchTransformXCallback, lambda x: x), partial(ParamScheduler, "lr", sched_lin(1.0, 0.0))]
    run = Runner(cb_funcs=cbs)
    assert isinstance(run.recorder, Recorder)
    assert isinstance(run.avg_stats, AvgStatsCallback)
    assert isinstance(run.cuda, CudaCallback)
    assert isinstance(run.lr_find, LR_Find)
    assert isinstance(run.my_own_thing, MyOwnThing)
    assert isinstance(run.batch_transform_x, BatchTransformXCallback)
    assert isinstance(run.param_scheduler, ParamScheduler)
    assert isinstance(run.train_eval, lesson.TrainEvalCallback)
    assert len(run.cbs) == 8
    assert run.recorder.name == "recorder"


class MyOwnThing(Callback):
    pass


def test_callbacks_that_are_built_already_and_a_single_one():
    recorder = Recorder()
    assert Runner(recorder).recorder is Runner(cbs=[recorder]).recorder is recorder
    assert isinstance(Runner(cb_funcs=Recorder).recorder, Recorder)
    assert [type(cb).__name__ for cb in Runner().cbs] == ["TrainEvalCallback"]


def test_callbacks_run_by_order_equal_ones_as_given():
    calls = []
    orders = [("c", 1), ("a", 0), ("e", 2), ("d", 1), ("b", 0)]
    run_cbs = [at("begin_epoch", lambda self, n=n: calls.append(n), _order=o) for n, o in orders]
    learn, run = runs(*run_cbs)
    run.fit(1, learn)
    assert calls == ["a", "b", "c", "d", "e"]
    assert (ParamScheduler._order, LR_Find._order, BatchTransformXCallback._order) == (1, 1, 2)
    assert Recorder._order == AvgStatsCallback._order == CudaCallback._order == 0


def test_a_callback_reads_the_state_as_its_own():
    seen = []

    def look(self) -> None:
        counters = self.epoch, self.epochs, self.iters, self.n_iter, self.in_train, self.n_epochs
        seen.append(counters)
        assert self.xb.shape == (len(self.yb), 784)
        assert self.pred.shape == (len(self.yb), 10)
        assert torch.equal(self.loss.detach(), F.cross_entropy(self.pred, self.yb).detach())
        assert self.model is self.run.model is self.learn.model
        assert self.opt is self.learn.opt
        assert self.loss_func is F.cross_entropy
        assert self.data is self.learn.data

    learn, run = runs(at("after_loss", look))
    run.fit(2, learn)
    assert run.learn is learn
    first = [(0, 2, 3, i, True, pytest.approx(i / 3)) for i in range(3)] + [(0, 2, 1, 3, False, 1)]
    second = [(1, 2, 3, 3 + i, True, pytest.approx(1 + i / 3)) for i in range(3)] + [(1, 2, 1, 6, False, 2)]
    assert seen == first + second


def test_a_callback_changes_the_state_of_its_runner():
    def no_input(self) -> None:
        self.run.xb = self.xb * 0

    def look(self) -> None:
        outputs.append(torch.equal(self.pred, self.model.bias.expand_as(self.pred)))

    outputs = []
    learn, run = runs(at("begin_batch", no_input), at("after_pred", look))
    run.fit(1, learn)
    assert outputs == [True] * 4


def test_state_asked_before_a_fit_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Recorder is not part of a runner that has begun to fit"):
        Recorder().xb  # noqa: B018
    assert not hasattr(Recorder(), "run")


def test_the_mode_of_the_model():
    modes = []
    learn, run = runs(at("after_pred", lambda self: modes.append((self.model.training, torch.is_grad_enabled()))))
    run.fit(1, learn)
    assert modes == [(True, True)] * 3 + [(False, False)]


# --- callbacks ------------------------------------------------------------------------------------------------------


def test_avg_stats_are_weighted_by_batch_size(capsys):
    class Batches(Callback):
        def begin_fit(self):
            self.seen = {True: [], False: []}

        def after_loss(self):
            self.seen[self.in_train].append((self.pred.detach().double(), self.yb))

    batches = Batches()
    learn, run = runs(partial(AvgStatsCallback, accuracy)(), batches, n=11, valid=13)
    run.fit(1, learn)
    lines = capsys.readouterr().out.splitlines()
    for part, line in zip((True, False), lines, strict=True):
        assert [len(yb) for _, yb in batches.seen[part]] == ([4, 4, 3] if part else [8, 5])
        pred, yb = (torch.cat(tensors) for tensors in zip(*batches.seen[part], strict=True))
        expected = [float(F.cross_entropy(pred, yb)), float((pred.argmax(1) == yb).double().mean())]
        name, figures = re.fullmatch(r"(train|valid): \[(.*)\]", line).groups()
        assert name == ("train" if part else "valid")
        assert [float(figure) for figure in figures.split(", ")] == pytest.approx(expected, rel=1e-5)


def top(out, yb):
    return out.max()


@pytest.mark.parametrize(
    ("metrics", "count"), [([], 1), (accuracy, 2), ([accuracy, top], 3), ([lambda o, y: o.max()] * 2, 3)]
)
def test_any_number_of_metrics(metrics, count, capsys):
    learn, run = runs(AvgStatsCallback(metrics))
    run.fit(2, learn)
    lines = capsys.readouterr().out.splitlines()
    assert [line[:7] for line in lines] == ["train: ", "valid: "] * 2
    assert all(line.count(",") == count - 1 for line in lines)


def test_accuracy():
    out = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.6, 0.4], [0.0, 1.0]])
    assert accuracy(out, torch.tensor([1, 0, 1, 1])) == 0.75


@pytest.fixture
def axes():
    """A new figure of pyplot's; its lines as (x, y)."""
    figure = plt.figure()
    yield lambda: [(list(line.get_xdata()), list(line.get_ydata())) for line in plt.gca().lines]
    plt.close(figure)


def test_the_recorder_and_its_plots(axes):
    learn, run = runs(Recorder(), ParamScheduler("lr", sched_lin(0.6, 0.0)))
    run.fit(2, learn)
    lrs, losses = run.recorder.lrs[-1], run.recorder.losses
    assert lrs == pytest.approx([0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert len(losses) == 6
    steps = [1, 2, 3, 4, 5, 6]
    run.recorder.plot_lr()
    assert axes() == [(steps, lrs)]
    plt.clf()
    run.recorder.plot_loss()
    run.recorder.plot_loss(skip_last=2)
    assert axes() == [(steps, losses), (steps[:4], losses[:4])]
    plt.clf()
    run.recorder.plot(skip_last=1)
    assert axes() == [(lrs[:5], losses[:5])]
    assert plt.gca().get_xscale() == "log"


def test_the_recorder_plots_the_group_that_is_asked_for(axes):
    def opt_func(parameters, lr):
        weight, bias = parameters
        return torch.optim.SGD([{"params": [weight], "lr": lr}, {"params": [bias], "lr": lr / 2}])

    learn, run = runs(Recorder(), lr=0.4, opt_func=opt_func)
    run.fit(1, learn)
    assert run.recorder.lrs == [[0.4] * 3, [0.2] * 3]
    run.recorder.plot_lr()
    run.recorder.plot_lr(pgid=0)
    assert [y for _, y in axes()] == [[0.2] * 3, [0.4] * 3]
    plt.clf()
    run.recorder.plot(pgid=0)
    assert [x for x, _ in axes()] == [[0.4] * 3]


@pytest.mark.parametrize(("available", "device"), [(True, "cuda"), (False, "cpu")])
def test_cuda_where_there_is_one(monkeypatch, available, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert CudaCallback().device.type == device


def test_batches_are_transformed_and_views_made():
    shapes = []
    learn, run = runs(at("after_pred", lambda self: shapes.append(tuple(self.xb.shape))), n=4, valid=4)
    run.callbacks.append(BatchTransformXCallback(view_tfm(1, 28, 28)))
    learn.model = nn.Sequential(nn.Flatten(), learn.model)
    run.fit(1, learn)
    assert shapes == [(4, 1, 28, 28)] * 2
    assert view_tfm(2, 3)(torch.zeros(5, 6)).shape == (5, 2, 3)


def test_the_rate_finder_sweeps_and_stops():
    learn, run = runs(Recorder(), LR_Find(max_iter=10, min_lr=1e-6, max_lr=1e-1), n=8)
    run.fit(100, learn)
    assert run.recorder.lrs[0] == pytest.approx([1e-6 * 10 ** (i / 2) for i in range(10)])
    learn, run = runs(Recorder(), LR_Find(max_lr=1e4), n=200)
    run.fit(100, learn)
    losses = run.recorder.losses
    assert len(losses) < 100
    assert losses[-1] > 10 * min(losses)
    assert all(loss <= 10 * min(losses[: i + 1]) for i, loss in enumerate(losses[:-1]))


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (sched_lin(0.6, 2.0), [0.6, 0.95, 2.0]),
        (sched_cos(0.6, 2.0), [0.6, 0.6 + 1.4 * (1 - math.sqrt(0.5)) / 2, 2.0]),
        (sched_no(0.6, 2.0), [0.6, 0.6, 0.6]),
        (sched_exp(1.0, 16.0), [1.0, 2.0, 16.0]),
    ],
)
def test_schedules(schedule, values):
    assert [schedule(p) for p in (0, 0.25, 1)] == pytest.approx(values)


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
def test_combined_schedules_include_position_1(kind):
    schedule = combine_scheds(kind([0.3, 0.7]), [sched_lin(0.6, 2.0), sched_lin(2.0, 0.1)])
    expected = {0: 0.6, 0.15: 1.3, 0.3: 2.0, 0.65: 1.05, 1: 0.1}
    assert {p: schedule(p) for p in expected} == pytest.approx(expected, rel=1e-5)
    assert float(schedule(torch.tensor(1.0))) == pytest.approx(0.1)
    assert [float(schedule(p)) for p in torch.linspace(0, 1, 3)] == pytest.approx([schedule(p) for p in (0, 0.5, 1)])


def test_shares_have_to_sum_to_1():
    with pytest.raises(InputError, match="numbers that sum to 1"):
        combine_scheds([0.3, 0.6], [sched_lin(0, 1), sched_lin(1, 0)])


def test_the_1cycle():
    schedule = combine_scheds([0.5, 0.5], cos_1cycle_anneal(0.2, 0.6, 0.1))
    quarter = (1 - math.sqrt(0.5)) / 2  # of the way after a quarter of the time
    expected = {0: 0.2, 0.125: 0.2 + 0.4 * quarter, 0.25: 0.4, 0.5: 0.6, 0.625: 0.6 - 0.5 * quarter, 0.75: 0.35, 1: 0.1}
    assert {p: schedule(p) for p in expected} == pytest.approx(expected)


def test_a_scheduler_takes_a_schedule_for_each_group_and_refuses_unknown_names():
    def opt_func(parameters, lr):
        return torch.optim.SGD([{"params": [p]} for p in parameters], lr=lr, momentum=0.9)

    learn, run = runs(Recorder(), ParamScheduler("lr", [sched_no(1.0, 0.0), sched_lin(0.3, 0.0)]), opt_func=opt_func)
    run.fit(1, learn)
    assert run.recorder.lrs == [pytest.approx([1, 1, 1]), pytest.approx([0.3, 0.2, 0.1])]
    learn, run = runs(ParamScheduler("mom", sched_no(1.0, 0.0)))
    with pytest.raises(InputError, match=r"name='mom' is unknown.*momentum"):
        run.fit(1, learn)


# --- all together ---------------------------------------------------------------------------------------------------


def test_it_trains(capsys):
    x_train, y_train, x_valid, y_valid = get_data()
    x_train, x_valid = normalize_to(x_train[:5000], x_valid[:2000])
    torch.manual_seed(1)
    data = DataBunch(*get_dls(Dataset(x_train, y_train[:5000]), Dataset(x_valid, y_valid[:2000]), 64), 10)
    cbfs = [
        Recorder,
        partial(AvgStatsCallback, accuracy),
        CudaCallback,
        partial(BatchTransformXCallback, view_tfm(1, 28, 28)),
    ]
    sched = combine_scheds([0.3, 0.7], [sched_lin(0.2, 0.6), sched_lin(0.6, 0.1)])
    learn, run = get_learn_run(
        NFS, data, 0.9, partial(conv_layer, bn=True), cbs=[*cbfs, partial(ParamScheduler, "lr", sched)]
    )
    run.fit(1, learn)
    valid = capsys.readouterr().out.splitlines()[1]
    assert float(valid.split(", ")[1].rstrip("]")) > 0.9
    assert run.recorder.lrs[0][0] == pytest.approx(0.2)
    assert max(run.recorder.lrs[0]) == pytest.approx(0.6, rel=0.03)


def test_the_seed_decides_everything():
    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        view = partial(BatchTransformXCallback, view_tfm(1, 28, 28))
        learn, run = get_learn_run(NFS, bunch(40, 8, 8), 0.1, lesson.conv_rbn, cbs=[Recorder, view])
        run.fit(2, learn)
        return run.recorder.losses

    assert losses(1) == losses(1)
    assert losses(1) != losses(2)

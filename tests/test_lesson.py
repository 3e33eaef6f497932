"""The lesson's vocabulary, but for its norms and its training: names, signatures, data, net, hooks."""

import inspect
import math
import re
from functools import partial

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from normlab import lesson
from normlab.errors import InputError
from normlab.lesson import (
    DataBunch,
    Dataset,
    GeneralRelu,
    Hook,
    Hooks,
    Recorder,
    Runner,
    append_stats,
    conv_layer,
    get_cnn_layers,
    get_cnn_model,
    get_data,
    get_dls,
    get_learn_run,
    get_runner,
    init_cnn,
    normalize_to,
)

NFS = [8, 16, 32, 64, 64]


@pytest.fixture(scope="module")
def mnist():
    return get_data()


def images(n: int = 11, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    return Dataset(torch.randn(n, 784, generator=generator), torch.arange(n) % 10)


def bunch(n: int = 11, valid: int = 7, bs: int = 4) -> DataBunch:
    return DataBunch(*get_dls(images(n), images(valid, 1), bs), 10)


# --- the import -----------------------------------------------------------------------------------------------------


def test_the_star_import_brings_what_a_notebook_uses():
    notebook: dict = {}
    exec("from normlab.lesson import *", notebook)
    expected = {
        "torch": torch,
        "nn": nn,
        "F": F,
        "init": nn.init,
        "tensor": torch.tensor,
        "partial": partial,
        "plt": plt,
    }
    assert {name: notebook[name] for name in expected} == expected
    assert notebook["math"] is math
    assert notebook["Path"]("a").name == "a"
    assert {"np", "mpl", "optim", "re", "os", "json", "time", "random", "DataLoader"} <= set(notebook)


def test_the_star_import_hides_the_plumbing():
    names = set(lesson.__all__)
    assert not {"TensorBatches", "check", "schedules", "plots", "Any", "convnet", "load_dataset", "TensorPairs"} & names
    assert not any(name.startswith("_") for name in names)
    assert len(lesson.__all__) == len(names)


SIGNATURES = """
get_data()
normalize_to(train, valid)
Dataset(x, y)
get_dls(train_ds, valid_ds, bs, **kwargs)
DataBunch(train_dl, valid_dl, c=None)
Learner(model, opt, loss_func, data)
Runner(cbs=None, cb_funcs=None)
Runner.fit(self, epochs, learn)
AvgStatsCallback(metrics)
accuracy(out, yb)
Recorder()
Recorder.plot_lr(self, pgid=-1)
Recorder.plot_loss(self, skip_last=0)
Recorder.plot(self, skip_last=0, pgid=-1)
CudaCallback()
BatchTransformXCallback(tfm)
view_tfm(*size)
LR_Find(max_iter=100, min_lr=1e-06, max_lr=10)
sched_lin(start, end)
sched_cos(start, end)
sched_no(start, end)
sched_exp(start, end)
combine_scheds(pcts, scheds)
cos_1cycle_anneal(start, high, end)
ParamScheduler(pname, sched_funcs)
get_runner(model, data, lr=0.6, cbs=None, opt_func=None, loss_func=cross_entropy)
get_learn_run(nfs, data, lr, layer, cbs=None, opt_func=None, uniform=False, **kwargs)
GeneralRelu(leak=None, sub=None, maxv=None)
conv_layer(ni, nf, ks=3, stride=2, bn=False, **kwargs)
conv_bn(ni, nf, ks=3, stride=2, bn=True, **kwargs)
conv_ln(ni, nf, ks=3, stride=2, bn=True, **kwargs)
conv_in(ni, nf, ks=3, stride=2, bn=True, **kwargs)
conv_rbn(ni, nf, ks=3, stride=2, bn=True, **kwargs)
get_cnn_layers(data, nfs, layer, **kwargs)
get_cnn_model(data, nfs, layer, **kwargs)
init_cnn(m, uniform=False)
Hook(m, f)
Hooks(ms, f)
append_stats(hook, mod, inp, outp)
BatchNorm(nf, mom=0.1, eps=1e-05)
LayerNorm(eps=1e-05)
InstanceNorm(nf, eps=1.0)
RunningBatchNorm(nf, mom=0.1, eps=1e-05)
nb_auto_export(notebook=None)
"""

# Called by place, as the lesson does; under the names of their own rooms, the last of them may be left out.
OWN_NAMES = {"accuracy": "output, targets", "Hook": "module, f", "Hooks": "modules, f", "sched_no": "start, end=None"}


@pytest.mark.parametrize("line", SIGNATURES.strip().splitlines())
def test_signatures(line):
    name, expected = re.fullmatch(r"([\w.]+)\((.*)\)", line).groups()
    found = lesson
    for part in name.split("."):
        found = getattr(found, part)
    text = ", ".join(
        f"{'*' * (parameter.kind is parameter.VAR_POSITIONAL)}{'**' * (parameter.kind is parameter.VAR_KEYWORD)}"
        + parameter.name
        + (
            ""
            if parameter.default is parameter.empty
            else f"={getattr(parameter.default, '__name__', parameter.default)}"
        )
        for parameter in inspect.signature(found).parameters.values()
    )
    assert text == OWN_NAMES.get(name, expected)
    assert name.split(".")[0] in lesson.__all__


# --- data -----------------------------------------------------------------------------------------------------------


def test_mnist_as_the_lesson_has_it(mnist):
    x_train, y_train, x_valid, y_valid = mnist
    assert (x_train.shape, x_valid.shape) == ((50_000, 784), (10_000, 784))
    assert (y_train.shape, y_valid.shape) == ((50_000,), (10_000,))
    assert x_train.dtype == x_valid.dtype == torch.float32
    assert y_train.dtype == y_valid.dtype == torch.int64
    assert (float(x_train.min()), float(x_train.max())) == (0, 255 / 256)
    assert y_train[:5].tolist() == [5, 0, 4, 1, 9]  # the first of the training images
    assert y_valid[-3:].tolist() == [5, 6, 8]  # and the last
    assert float(x_train.mean()) == pytest.approx(0.1304, abs=5e-5)
    assert float(x_train.std()) == pytest.approx(0.3073, abs=5e-5)


def test_both_parts_are_normalised_by_the_training_images():
    train, valid = torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([[4.0, 9.0]])
    deviation = math.sqrt((9 + 1 + 1 + 9) / 3)
    expected = torch.tensor([[-3.0, -1.0], [1.0, 3.0]]) / deviation, torch.tensor([[0.0, 5.0]]) / deviation
    for found, wanted in zip(normalize_to(train, valid), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    assert train.tolist() == [[1, 3], [5, 7]]


def test_a_data_set_is_indexed_by_number_slice_and_list():
    ds = Dataset(torch.arange(10) * 10, torch.arange(10))
    assert len(ds) == 10
    assert ds[3] == (30, 3)
    for index, expected in ((slice(2, 5), [2, 3, 4]), ([7, 1], [7, 1])):
        x, y = ds[index]
        assert x.tolist() == [10 * i for i in expected]
        assert y.tolist() == expected
    assert len(ds.x) == len(ds.y) == 10


def test_a_data_set_of_unequal_parts_is_refused():
    with pytest.raises(InputError, match=r"y='2 items' is not usable. Accepted: as many as x: 3"):
        Dataset(torch.zeros(3), torch.zeros(2))


def order(dl) -> list[int]:
    return torch.cat([x[:, 0] for x, _ in dl]).int().tolist()


def numbered(n: int) -> Dataset:
    return Dataset(torch.arange(float(n)).reshape(n, 1), torch.arange(n))


@pytest.mark.parametrize("options", [{}, {"num_workers": 0}])
def test_the_loaders(options):
    train_dl, valid_dl = get_dls(numbered(11), numbered(20), 4, **options)
    assert isinstance(train_dl, DataLoader) == bool(options)
    assert [len(y) for _, y in train_dl] == [4, 4, 3]
    assert [len(y) for _, y in valid_dl] == [8, 8, 4]
    assert order(valid_dl) == list(range(20))
    first, second = order(train_dl), order(train_dl)
    assert sorted(first) == sorted(second) == list(range(11))
    assert len({tuple(first), tuple(second), tuple(range(11))}) == 3
    assert (len(train_dl), len(valid_dl)) == (3, 3)
    x, y = next(iter(train_dl))
    assert x[:, 0].int().tolist() == y.tolist()


def test_the_order_comes_from_the_seed():
    def drawn(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return [order(get_dls(numbered(30), numbered(3), 4)[0]) for _ in range(2)]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    assert drawn(1)[0] != drawn(1)[1]


class Negative(Dataset):
    def __getitem__(self, i):
        return -self.x[i], self.y[i]


@pytest.mark.parametrize("ds", [Negative(*numbered(5)[:]), [(-x, y) for x, y in zip(*numbered(5)[:], strict=True)]])
def test_a_data_set_of_ones_own_is_asked_for_its_items(ds):
    train_dl, valid_dl = get_dls(ds, ds, 2)
    assert order(valid_dl) == [0, -1, -2, -3, -4]
    assert sorted(order(train_dl)) == [-4, -3, -2, -1, 0]


@pytest.mark.parametrize("bs", [0, 12])
def test_a_batch_size_that_does_not_fit_is_refused(bs):
    with pytest.raises(InputError, match=rf"bs={bs} is not usable. Accepted: 1 to 11"):
        get_dls(numbered(11), numbered(3), bs)


def test_the_bunch():
    train_dl, valid_dl = get_dls(numbered(11), numbered(20), 4)
    data = DataBunch(train_dl, valid_dl, 10)
    assert data.train_dl is train_dl
    assert data.valid_dl is valid_dl
    assert (len(data.train_ds), len(data.valid_ds), data.c) == (11, 20, 10)
    assert data.train_ds.x.shape == (11, 1)
    assert DataBunch(train_dl, valid_dl).c == 11


# --- learner and net ------------------------------------------------------------------------------------------------


def test_the_default_optimiser_is_plain_sgd():
    learn, run = get_runner(nn.Linear(784, 10), bunch())
    group = learn.opt.param_groups[0]
    assert type(learn.opt) is torch.optim.SGD
    assert (group["lr"], group["momentum"], group["weight_decay"], group["nesterov"]) == (0.6, 0, 0, False)
    assert learn.loss_func is F.cross_entropy
    assert isinstance(run, Runner)


def test_another_optimiser_and_loss():
    learn, _ = get_runner(nn.Linear(784, 10), bunch(), 0.1, opt_func=torch.optim.Adam, loss_func=F.nll_loss)
    assert type(learn.opt) is torch.optim.Adam
    assert learn.loss_func is F.nll_loss


@pytest.mark.parametrize(
    ("layer", "options", "parameters"),
    [
        (conv_layer, {}, 62_090),
        (conv_layer, {"bn": True}, 62_274),
        (lesson.conv_bn, {}, 62_274),
        (lesson.conv_rbn, {}, 62_274),
        (lesson.conv_in, {}, 62_090 + 2 * sum(NFS)),
        (lesson.conv_ln, {}, 62_090 + 2 * len(NFS)),
        (lesson.conv_bn, {"bn": False}, 62_090),
        (lesson.conv_rbn, {"bn": False}, 62_090),
        (lesson.conv_in, {"bn": False}, 62_090),
        (lesson.conv_ln, {"bn": False}, 62_090),
    ],
)
def test_the_number_of_parameters(layer, options, parameters):
    assert sum(p.numel() for p in get_cnn_model(bunch(), NFS, layer, **options).parameters()) == parameters


def test_the_net():
    layers = get_cnn_layers(bunch(), NFS, conv_layer)
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Sequential"] * 5 + ["AdaptiveAvgPool2d", "Flatten", "Linear"]
    convolutions = [layer[0] for layer in layers[:5]]
    assert [(c.in_channels, c.out_channels, *c.kernel_size) for c in convolutions] == [
        *[(1, 8, 5, 5), (8, 16, 3, 3), (16, 32, 3, 3), (32, 64, 3, 3), (64, 64, 3, 3)]
    ]
    x, sizes = torch.zeros(2, 1, 28, 28), []
    for layer in layers:
        x = layer(x)
        sizes.append(x.shape[-1])
    assert sizes == [14, 7, 4, 2, 1, 1, 64, 10]


def test_the_order_within_a_layer_and_its_bias():
    plain, normed = conv_layer(2, 3), conv_layer(2, 3, 5, 1, bn=True, leak=0.1, sub=0.4, maxv=6.0)
    assert [type(m).__name__ for m in plain] == ["Conv2d", "GeneralRelu"]
    assert [type(m).__name__ for m in normed] == ["Conv2d", "GeneralRelu", "BatchNorm2d"]
    assert plain[0].bias is not None
    assert normed[0].bias is None
    assert (normed[0].padding, normed[0].stride) == ((2, 2), (1, 1))
    assert (normed[1].leak, normed[1].sub, normed[1].maxv) == (0.1, 0.4, 6.0)
    assert lesson.conv_ln(2, 3)[0].bias is not None
    assert lesson.conv_in(2, 3)[0].bias is not None


@pytest.mark.parametrize("maxv", [None, 1.5])
@pytest.mark.parametrize("sub", [None, 0.5])
@pytest.mark.parametrize("leak", [None, 0.1])
def test_every_activation_has_its_values_and_trains(leak, sub, maxv):
    x = torch.tensor([-2.0, -1.0, 0.5, 1.0, 3.0], requires_grad=True)
    y = GeneralRelu(leak, sub, maxv)(x)
    slopes = [leak or 0.0, leak or 0.0, 1.0, 1.0, 1.0 if maxv is None else 0.0]
    raw = [value * (leak or 0.0) if value < 0 else value for value in x.tolist()]
    assert y.tolist() == pytest.approx([min(r - (sub or 0.0), math.inf if maxv is None else maxv) for r in raw])
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx(slopes)


@pytest.mark.parametrize("uniform", [False, True])
def test_initialisation_reaches_every_convolution(uniform):
    torch.manual_seed(0)
    deep = nn.Sequential(nn.Sequential(nn.Sequential(nn.Conv2d(64, 128, 3), nn.ReLU())), nn.Conv2d(4, 1000, 5))
    init_cnn(deep, uniform)
    for conv, fan_in in ((deep[0][0][0], 64 * 9), (deep[1], 4 * 25)):
        deviation = math.sqrt(2 / (1 + 0.1**2) / fan_in)
        assert float(conv.weight.detach().std()) == pytest.approx(deviation, rel=0.02)
        largest = float(conv.weight.detach().abs().max()) / deviation
        assert (largest == pytest.approx(math.sqrt(3), rel=0.02)) if uniform else (largest > 3)
        assert float(conv.bias.detach().abs().max()) == 0


def test_a_learner_of_the_net_is_built_and_initialised():
    built = []

    def layer(ni, nf, ks, **kwargs):
        built.append((ni, nf, ks, kwargs))
        return conv_layer(ni, nf, ks, **kwargs)

    learn, run = get_learn_run(NFS, bunch(), 0.3, layer, cbs=[Recorder], opt_func=torch.optim.Adam, leak=0.2)
    assert built == [
        *[(1, 8, 5, {"leak": 0.2}), (8, 16, 3, {"leak": 0.2}), (16, 32, 3, {"leak": 0.2})],
        *[(32, 64, 3, {"leak": 0.2}), (64, 64, 3, {"leak": 0.2})],
    ]
    assert isinstance(learn.opt, torch.optim.Adam)
    assert learn.opt.param_groups[0]["lr"] == 0.3
    assert isinstance(run.recorder, Recorder)
    assert all(float(block[0].bias.detach().abs().sum()) == 0 for block in list(learn.model)[:5])
    assert sum(p.numel() for group in learn.opt.param_groups for p in group["params"]) == 62_090


def test_uniform_reaches_the_initialisation():
    def largest(uniform: bool) -> float:
        torch.manual_seed(0)
        learn, _ = get_learn_run(NFS, bunch(), 0.3, conv_layer, uniform=uniform)
        weight = learn.model[3][0].weight
        return float(weight.detach().abs().max() / weight.detach().std())

    assert largest(True) == pytest.approx(math.sqrt(3), rel=0.02)
    assert largest(False) > 3


# --- hooks ----------------------------------------------------------------------------------------------------------


def test_the_stats_of_hooks_are_of_training_batches():
    learn, run = get_runner(nn.Sequential(nn.Linear(784, 10), nn.ReLU()), bunch(), lr=0.1)
    outputs = []
    with Hooks(learn.model, append_stats) as hooks:
        Hook(
            learn.model[0],
            lambda hook, mod, inp, outp: outputs.append(outp.detach().double()) if mod.training else None,
        )
        run.fit(2, learn)
    assert len(outputs) == 6
    means, deviations = hooks[0].stats
    assert means == pytest.approx([float(out.mean()) for out in outputs], abs=1e-6)
    assert deviations == pytest.approx([float(out.std()) for out in outputs], rel=1e-5)
    assert [len(values) for values in hooks[1].stats] == [6, 6]
    assert all(isinstance(value, float) for value in means + deviations)
    assert len(learn.model[1]._forward_hooks) == 0

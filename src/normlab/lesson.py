"""The lesson's vocabulary: its names, signatures and formulas, on this package's systems.

A notebook of the lesson runs on `from normlab.lesson import *` in place of its first import. The import also brings
what such a notebook uses without importing it (`torch`, `nn`, `F`, `plt`, `partial`, …).

The formulas are the lesson's; its defects are gone. Where that changes a number, the docstring says so.
"""

import gzip
import json
import math
import operator
import os
import pickle
import random
import re
import time
from collections.abc import Callable as _Callable
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim, tensor
from torch.nn import init
from torch.utils.data import DataLoader

from . import nn as _norms
from . import training as _training
from .data import TensorBatches, TensorPairs, load_dataset
from .errors import check
from .models.convnet import GeneralRelu, convnet, init_convolutions
from .nn import functional as _formulas
from .notebook import export_notebook, running_notebook
from .observe import Hook, Hooks, plots
from .training import CancelBatch as CancelBatchException
from .training import CancelEpoch as CancelEpochException
from .training import CancelTrain as CancelTrainException
from .training import accuracy, schedules

# --- data -----------------------------------------------------------------------------------------------------------


def get_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """MNIST: x_train (50,000×784, float32 in 0..1), y_train (int64), x_valid (10,000×784), y_valid.

    As in the lesson's copy of the data the largest value of a pixel is 255/256: the mean is .1304, the deviation .3073.
    """
    mnist = load_dataset("mnist")
    x_train, x_valid = (x.flatten(1) * (255 / 256) for x in (mnist.x_train, mnist.x_valid))
    return x_train, mnist.y_train, x_valid, mnist.y_valid


def normalize_to(train: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Both, minus the mean of `train`, over its standard deviation: two numbers for all pixels."""
    mean, deviation = train.mean(), train.std()
    return (train - mean) / deviation, (valid - mean) / deviation


class Dataset:
    """Pairs `(x[i], y[i])`; `i` may be a number, a slice or a list."""

    def __init__(self, x: Any, y: Any):
        check(len(x) == len(y), "y", f"{len(y)} items", f"as many as x: {len(x)}")
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: Any) -> tuple[Any, Any]:
        return self.x[i], self.y[i]


def get_dls(train_ds: Any, valid_ds: Any, bs: int, **kwargs: Any) -> tuple[Any, Any]:
    """A shuffled train loader (its last batch may be smaller) and a valid loader of `2*bs`, in order.

    A `Dataset` of tensors is sliced directly, which is faster; anything else, or with `kwargs`, by torch's DataLoader.
    The order is drawn from torch's global generator.
    """
    check(1 <= bs <= len(train_ds), "bs", bs, f"1 to {len(train_ds)}, the number of training samples")
    if kwargs or not (_is_plain(train_ds) and _is_plain(valid_ds)):
        return DataLoader(train_ds, bs, shuffle=True, **kwargs), DataLoader(valid_ds, 2 * bs, **kwargs)
    seed = int(torch.randint(2**31, ()))
    train_dl = TensorBatches(train_ds.x, train_ds.y, bs, shuffle=True, seed=seed)
    return train_dl, TensorBatches(valid_ds.x, valid_ds.y, min(2 * bs, len(valid_ds)))


def _is_plain(ds: Any) -> bool:
    """Whether indexing `ds` is indexing two tensors; a subclass may do anything."""
    return type(ds) in (Dataset, TensorPairs) and isinstance(ds.x, Tensor) and isinstance(ds.y, Tensor)


class DataBunch:
    """A train and a valid loader, and the number of classes `c` (from the largest label if it is not given)."""

    def __init__(self, train_dl: Any, valid_dl: Any, c: int | None = None):
        self.train_dl, self.valid_dl = train_dl, valid_dl
        self.c = int(self.train_ds.y.max()) + 1 if c is None and hasattr(self.train_ds, "y") else c

    @property
    def train_ds(self) -> Any:
        return self.train_dl.dataset

    @property
    def valid_ds(self) -> Any:
        return self.valid_dl.dataset


# --- training -------------------------------------------------------------------------------------------------------


def listify(o: Any) -> list:
    """`o` as a list: nothing is empty, a string or a single thing is one element."""
    if o is None:
        return []
    return list(o) if isinstance(o, Iterable) and not isinstance(o, str | bytes | Tensor) else [o]


def camel2snake(name: str) -> str:
    """`AvgStats` → `avg_stats`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).replace("__", "_").lower()


class Learner:
    """Holds a model, its optimizer, a loss and the data; a `Runner` trains it."""

    def __init__(self, model: nn.Module, opt: optim.Optimizer, loss_func: _Callable[..., Tensor], data: DataBunch):
        self.model, self.opt, self.loss_func, self.data = model, opt, loss_func, data


class Callback(_training.Callback):
    """A callback that reads the runner's state (`self.model`, `self.xb`, `self.loss`, …) as its own attributes.

    Define a method for each event; to change the state, set it on `self.run`. Called by ascending `_order`.
    """

    _order: ClassVar[int] = 0
    order = property(lambda self: self._order)  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]
    run = property(lambda self: self.learner)

    @property
    def name(self) -> str:
        return _callback_name(self)

    def set_runner(self, run: "Runner") -> None:
        self.learner = run

    def __getattr__(self, name: str) -> Any:
        if name in ("learner", "run"):
            raise AttributeError(f"{type(self).__name__} is not part of a runner that has begun to fit")
        return getattr(self.learner, name)


def _callback_name(callback: Any) -> str:
    return camel2snake(re.sub(r"Callback$", "", type(callback).__name__) or "callback")


class TrainEvalCallback(Callback):
    """Always present, with nothing left to do: the loop itself sets the mode and counts `n_epochs` and `n_iter`."""


def _same_as(name: str) -> Any:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))


class Runner(_training.Learner):
    """Fits a `Learner`, telling its callbacks.

    Each callback also is an attribute of the runner, under its name in snake_case without "Callback".

    Args:
        cbs: callbacks.
        cb_funcs: functions without arguments that build callbacks.
    """

    xb, yb, pred = _same_as("inputs"), _same_as("targets"), _same_as("output")
    opt, epochs, in_train = _same_as("optimizer"), _same_as("num_epochs"), _same_as("training")
    iters, n_iter = _same_as("num_batches"), _same_as("step")
    n_epochs = property(lambda self: self.position)
    data = property(lambda self: self.learn.data)

    def __init__(self, cbs: Any = None, cb_funcs: Any = None):
        self.callbacks = [TrainEvalCallback(), *listify(cbs), *(build() for build in listify(cb_funcs))]
        for callback in self.callbacks:
            setattr(self, _callback_name(callback), callback)

    @property
    def cbs(self) -> list:
        return self.callbacks

    def fit(self, epochs: int, learn: Learner) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Train `learn` for so many epochs, each followed by a validation."""
        self.learn, data = learn, learn.data
        options = {"loss_func": learn.loss_func, "optimizer": learn.opt, "callbacks": self.callbacks}
        super().__init__(learn.model, data.train_dl, data.valid_dl, **options)
        super().fit(epochs)


class AvgStatsCallback(Callback, _training.Metrics):
    """After each epoch prints `train: [loss, metric…]` and `valid: […]`, every figure weighted by batch size.

    Args:
        metrics: a function of output and targets, or several.
    """

    def __init__(self, metrics: Any):
        named = {f"{getattr(m, '__name__', 'metric')}": m for m in listify(metrics)}
        if len(named) < len(listify(metrics)):  # lambdas share a name
            named = {f"metric{i}": m for i, m in enumerate(listify(metrics))}
        super().__init__(**named)

    def after_epoch(self) -> None:
        super().after_epoch()
        row = self.learner.history[-1]
        for part in ("train", "valid"):
            if part in row:
                print(f"{part}: [{', '.join(f'{value:.6g}' for value in row[part].values())}]")


class Recorder(Callback, _training.Recorder):
    """Learning rate per parameter group, and loss, of each training batch; plots them into the current axes."""

    def plot_lr(self, pgid: int = -1) -> None:
        plots.draw_rates(plt.gca(), self.lrs[pgid])

    def plot_loss(self, skip_last: int = 0) -> None:
        plots.draw_losses(plt.gca(), self.losses, skip_last)

    def plot(self, skip_last: int = 0, pgid: int = -1) -> None:
        plots.draw_loss_over_rate(plt.gca(), self.lrs[pgid], self.losses, skip_last)


class CudaCallback(Callback, _training.ToDevice):
    """Model and batches on the GPU; without one, where they are."""

    def __init__(self) -> None:
        super().__init__("cuda" if torch.cuda.is_available() else "cpu")


class BatchTransformXCallback(Callback, _training.TransformInputs):
    """`xb = tfm(xb)`."""

    _order = 2

    def __init__(self, tfm: _Callable[[Any], Any]):
        super().__init__(tfm)


def view_tfm(*size: int) -> _Callable[[Tensor], Tensor]:
    """A function that reshapes a batch to (-1, *size)."""
    return lambda x: x.view(-1, *size)


class LR_Find(Callback, _training.FindLearningRate):
    """Geometric sweep of the learning rate; stops at `max_iter` or when the loss passes 10× its best."""

    _order = 1

    def __init__(self, max_iter: int = 100, min_lr: float = 1e-6, max_lr: float = 10):
        super().__init__(max_iter, min_lr, max_lr)


class ParamScheduler(Callback, _training.ScheduleParameter):
    """Sets the hyper-parameter `pname` at each training batch, from one schedule, or one for each parameter group."""

    _order = 1

    def __init__(self, pname: str, sched_funcs: Any):
        super().__init__(pname, sched_funcs)


sched_lin = schedules.linear
sched_cos = schedules.cosine
sched_no = schedules.constant
sched_exp = schedules.exponential


def combine_scheds(pcts: Any, scheds: Any) -> schedules.Schedule:
    """Each schedule over its own share of the positions 0..1; the shares sum to 1; position 1 is included."""
    return schedules.combine([float(pct) for pct in pcts], scheds)


def cos_1cycle_anneal(start: float, high: float, end: float) -> list[schedules.Schedule]:
    """Half a cosine up, half a cosine down: two schedules for `combine_scheds`."""
    return [sched_cos(start, high), sched_cos(high, end)]


def get_runner(
    model: nn.Module,
    data: DataBunch,
    lr: float = 0.6,
    cbs: Any = None,
    opt_func: Any = None,
    loss_func: _Callable[..., Tensor] = F.cross_entropy,
) -> tuple[Learner, Runner]:
    """A learner of `model` on `data`, and the runner that trains it; plain SGD unless `opt_func` says otherwise."""
    opt = (opt_func or optim.SGD)(model.parameters(), lr=lr)
    return Learner(model, opt, loss_func, data), Runner(cb_funcs=listify(cbs))


def get_learn_run(
    nfs: list[int], data: DataBunch, lr: float, layer: Any, cbs: Any = None, opt_func: Any = None,
    uniform: bool = False, **kwargs: Any,
) -> tuple[Learner, Runner]:  # fmt: skip
    """The net with `nfs` channels of `layer` (which gets `kwargs`), initialised, with its learner and runner."""
    model = get_cnn_model(data, nfs, layer, **kwargs)
    init_cnn(model, uniform=uniform)
    return get_runner(model, data, lr=lr, cbs=cbs, opt_func=opt_func)


# --- model ----------------------------------------------------------------------------------------------------------


class Lambda(nn.Module):
    """A function as a module."""

    def __init__(self, func: _Callable[[Tensor], Tensor]):
        super().__init__()
        self.func = func

    def forward(self, x: Tensor) -> Tensor:
        return self.func(x)


def flatten(x: Tensor) -> Tensor:
    """(N, …) → (N, features)."""
    return x.flatten(1)


def _conv(ni: int, nf: int, ks: int, stride: int, bias: bool, norm: nn.Module | None, options: dict) -> nn.Sequential:
    conv = nn.Conv2d(ni, nf, ks, stride, padding=ks // 2, bias=bias)
    return nn.Sequential(conv, GeneralRelu(**options), *([norm] if norm is not None else []))


def conv_layer(ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = False, **kwargs: Any) -> nn.Sequential:
    """Convolution, `GeneralRelu(**kwargs)`, with `bn` the built-in batch norm (and then no bias)."""
    return _conv(ni, nf, ks, stride, not bn, nn.BatchNorm2d(nf) if bn else None, kwargs)


def conv_bn(ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = True, **kwargs: Any) -> nn.Sequential:
    """Convolution without bias, `GeneralRelu(**kwargs)`, the lesson's own `BatchNorm`."""
    return _conv(ni, nf, ks, stride, not bn, BatchNorm(nf) if bn else None, kwargs)


def conv_ln(ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = True, **kwargs: Any) -> nn.Sequential:
    """Convolution with bias, `GeneralRelu(**kwargs)`, `LayerNorm`."""
    return _conv(ni, nf, ks, stride, True, LayerNorm() if bn else None, kwargs)


def conv_in(ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = True, **kwargs: Any) -> nn.Sequential:
    """Convolution with bias, `GeneralRelu(**kwargs)`, `InstanceNorm`."""
    return _conv(ni, nf, ks, stride, True, InstanceNorm(nf) if bn else None, kwargs)


def conv_rbn(ni: int, nf: int, ks: int = 3, stride: int = 2, bn: bool = True, **kwargs: Any) -> nn.Sequential:
    """Convolution without bias, `GeneralRelu(**kwargs)`, `RunningBatchNorm`."""
    return _conv(ni, nf, ks, stride, not bn, RunningBatchNorm(nf) if bn else None, kwargs)


def get_cnn_layers(data: DataBunch, nfs: list[int], layer: Any, **kwargs: Any) -> list[nn.Module]:
    """`layer(ni, nf, ks, **kwargs)` from one channel through `nfs` (ks 5, then 3), average pool, linear to `data.c`."""
    return list(get_cnn_model(data, nfs, layer, **kwargs))


def get_cnn_model(data: DataBunch, nfs: list[int], layer: Any, **kwargs: Any) -> nn.Sequential:
    """The layers of `get_cnn_layers` in a row."""
    check(data.c is not None, "data.c", data.c, "the number of classes")
    return convnet(partial(layer, **kwargs), data.c, widths=nfs)  # pyright: ignore[reportArgumentType]


def init_cnn(m: nn.Module, uniform: bool = False) -> None:
    """Kaiming initialisation (`a=0.1`, fan-in, normal or uniform) of every convolution in `m`; biases zero."""
    init_convolutions(m, uniform)


def append_stats(hook: Hook, mod: nn.Module, inp: Any, outp: Tensor) -> None:
    """For `Hooks`: `hook.stats` gets the means and the standard deviations of the output, one a training batch."""
    if not hasattr(hook, "stats"):
        hook.stats = ([], [])
    if mod.training:
        means, deviations = hook.stats
        means.append(outp.detach().mean().item())
        deviations.append(outp.detach().std().item())


# --- norms ----------------------------------------------------------------------------------------------------------


def _unbiased_moments(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and variance over `dims`, divided by n − 1; the variance of a single value is 0, where torch gives nan."""
    mean, var = _formulas.moments(x, dims)
    n = math.prod(x.shape[dim] for dim in dims)
    return mean, var * (n / max(n - 1, 1))


class BatchNorm(nn.Module):
    """Batch norm: mults · (x − m) / √(v + eps) + adds, per channel over batch and space.

    v is the unbiased variance. The running `means` and `vars` follow by linear interpolation with the weight `mom` of
    the new batch, and are used in evaluation.

    Changed: the gradient flows through m and v (the original's does not, and is wrong); a single value a channel has
    the variance 0 and leaves `vars` as it is, where the original gives nan.
    """

    means: Tensor
    vars: Tensor

    def __init__(self, nf: int, mom: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.mom, self.eps = mom, eps
        self.mults = nn.Parameter(torch.ones(nf, 1, 1))
        self.adds = nn.Parameter(torch.zeros(nf, 1, 1))
        self.register_buffer("vars", torch.ones(1, nf, 1, 1))
        self.register_buffer("means", torch.zeros(1, nf, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return _formulas.normalize(x, self.means, self.vars, self.mults, self.adds, self.eps)
        m, v = _unbiased_moments(x, (0, 2, 3))
        self.means.lerp_(m.detach().to(self.means.dtype), self.mom)
        if x.numel() > x.shape[1]:
            self.vars.lerp_(v.detach().to(self.vars.dtype), self.mom)
        return _formulas.normalize(x, m, v, self.mults, self.adds, self.eps)


class LayerNorm(nn.Module):
    """Layer norm: mult · (x − m) / √(v + eps) + add, per image over channels and space.

    v is unbiased; `mult` and `add` are one number each.
    """

    def __init__(self, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.mult = nn.Parameter(tensor(1.0))
        self.add = nn.Parameter(tensor(0.0))

    def forward(self, x: Tensor) -> Tensor:
        m, v = _unbiased_moments(x, (1, 2, 3))
        return _formulas.normalize(x, m, v, self.mult, self.add, self.eps)


class InstanceNorm(nn.Module):
    """mults · (x − m) / √(v + eps) + adds, per image and channel over space; v is unbiased.

    Changed: on a 1×1 map v is 0 and the output `adds`, where the original gives nan.
    """

    def __init__(self, nf: int, eps: float = 1e-0):
        super().__init__()
        self.eps = eps
        self.mults = nn.Parameter(torch.ones(nf, 1, 1))
        self.adds = nn.Parameter(torch.zeros(nf, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        m, v = _unbiased_moments(x, (2, 3))
        return _formulas.normalize(x, m, v, self.mults, self.adds, self.eps)


class RunningBatchNorm(_norms.LessonRunningNorm2d):
    """Running batch norm: mults · (x − μ) / √(σ² + eps) + adds, in training and in evaluation.

    Per channel, for a batch of bs images with n values a channel, sum s and sum of squares q, all from zero:

        α = 1 − (1 − mom) / √(bs − 1)
        S ← (1−α)S + αs     Q ← (1−α)Q + αq     C ← (1−α)C + αn
        μ = S/C             σ² = Q/C − μ²       (at least 0.01 while fewer than 20 images were seen)

    It is computed as `normlab.nn.LessonRunningNorm2d` does, without the sums: `running_mean`, `running_var` and `count`
    are kept, `sums` and `sqrs` derived from them. The lesson's older form divides S, Q and C by the same de-bias
    term, which cancels.

    Changed: at batch 1, where the lesson divides by zero, α is `mom` as at batch 2; a fresh layer in evaluation has
    mean 0 and variance 1.
    """

    def __init__(self, nf: int, mom: float = 0.1, eps: float = 1e-5):
        super().__init__(nf, eps, mom, affine=False)
        self.mults = nn.Parameter(torch.ones(nf, 1, 1))
        self.adds = nn.Parameter(torch.zeros(nf, 1, 1))

    mom = property(lambda self: self.momentum)
    batch = property(lambda self: self.num_samples_tracked)

    @property
    def sums(self) -> Tensor:
        """S, (1, nf, 1, 1)."""
        return (self.running_mean * self.count).view(1, -1, 1, 1)

    @property
    def sqrs(self) -> Tensor:
        """Q, (1, nf, 1, 1)."""
        return ((self.running_var + self.running_mean**2) * self.count).view(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.mults + self.adds


# --- export ---------------------------------------------------------------------------------------------------------


def nb_auto_export(notebook: str | Path | None = None) -> None:
    """Write the cells of the running notebook (or of `notebook`) that are marked `#export` to `exp/nb_NN.py`."""
    path = Path(notebook) if notebook is not None else running_notebook()
    print(f"Converted {path.name} to {export_notebook(path).relative_to(path.parent)}")


_NOT_THE_LESSONS = {
    *("Any", "ClassVar", "TensorBatches", "check", "convnet", "export_notebook", "init_convolutions"),
    *("load_dataset", "plots", "running_notebook", "schedules", "TensorPairs"),
}
__all__ = [name for name in dir() if not name.startswith("_") and name not in _NOT_THE_LESSONS]  # pyright: ignore[reportUnsupportedDunderAll]

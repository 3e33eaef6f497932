"""What a norm is: frozen norms of other libraries, norms with activations, more arguments, other dimensions."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normlab
from normlab.nn import RunningBatchNorm2d
from situation import (
    assert_near,
    assert_statistics,
    by_hand,
    evaluated,
    numbers,
    operated,
    rows,
    situation,
    state_of,
    with_drawn_state,
)


class FrozenWithoutEps(nn.Module):
    """Frozen batch norm as transformers for detection have it: γ, β and statistics are buffers, eps is in the code."""

    EPS = 1e-5

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, mean, var = (part.reshape(1, -1, 1, 1) for part in self._buffers.values())
        scale = weight * (var + self.EPS).rsqrt()
        return x * scale + (bias - mean * scale)

    _parts = ("weight", "bias", "running_mean", "running_var")


class FrozenOfMaskRCNN(FrozenWithoutEps):
    """The same without any eps."""

    EPS = 0.0


@situation("open-mmlab/mmdetection#6752", "B", "unfreeze, convert, fold", "mended")
def test_a_frozen_batch_norm_whose_eps_is_in_its_code_can_be_unfrozen():
    """A frozen batch norm with its eps in its code, not as an attribute: unfreeze and convert find it by running it."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), FrozenWithoutEps(4)))
    with torch.no_grad():
        model[1].running_var[0] = 2e-5  # here eps counts
    x = numbers(2, 3, 5, 5)
    expected = by_hand(model[0](x), model[1], eps=1e-5)
    for verb in (normlab.unfreeze, normlab.convert):
        operation = operated(verb, model, x)
        (row,) = operation.report
        assert row.became is not None
        assert_near(evaluated(operation.model, x), expected)
    assert_near(evaluated(normlab.fold(model, x).model, x), expected)


@situation("facebookresearch/maskrcnn-benchmark#267", "B", "unfreeze", "mended")
def test_a_frozen_batch_norm_without_eps_is_unfrozen_as_it_is():
    """A frozen batch norm that divides by √σ² alone: unfrozen, it gives the same, and trains its statistics."""
    model = with_drawn_state(nn.Sequential(FrozenOfMaskRCNN(4)))
    with torch.no_grad():
        model[0].running_var[0] = 1e-5  # an eps of 1e-5 would be off by 1.4
    x = numbers(2, 4, 5, 5)
    operation = operated(normlab.unfreeze, model, x)
    assert_near(evaluated(operation.model, x), by_hand(x, model[0], eps=0.0))
    before = operation.model[0].running_mean.clone()
    operation.model.train()(x)
    assert not torch.equal(operation.model[0].running_mean, before)


@situation("tianzhi0549/FCOS#182", "R", "freeze, unfreeze", "held")
def test_frozen_norms_become_the_batch_norms_that_they_were():
    """A detector's batch norms are frozen, fine-tuned and unfrozen: the same modules, with γ and β as trained."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)))
    x = numbers(4, 3, 5, 5)
    frozen = operated(partial(normlab.freeze, affine=False), model, x).model.train()
    optimizer = torch.optim.SGD(frozen.parameters(), 0.1)
    frozen(x).square().mean().backward()
    optimizer.step()
    expected = evaluated(frozen, x)
    back = operated(normlab.unfreeze, frozen, x).model
    assert type(back[1]) is nn.BatchNorm2d
    assert (back[1].eps, back[1].momentum) == (1e-3, 0.03)
    assert_near(evaluated(back, x), expected)
    assert not torch.equal(back[1].weight, model[1].weight)


class Frozen(nn.Module):
    """Frozen batch norm with an eps of 0 for the models trained before it had one."""

    def __init__(self, channels: int, eps: float):
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


@situation("pytorch/vision#2599", "B", "unfreeze, convert", "mended")
def test_the_eps_of_a_frozen_batch_norm_is_kept():
    """Detection models were trained with a frozen batch norm of eps 0: another norm in its place has that eps too."""
    for eps in (0.0, 1e-3):
        model = with_drawn_state(nn.Sequential(Frozen(4, eps)))
        with torch.no_grad():
            model[0].running_var[1] = 1e-4
        x = numbers(2, 4, 3, 3)
        for verb in (normlab.unfreeze, partial(normlab.convert, to="batch")):
            operation = operated(verb, model, x)
            assert operation.model[0].eps == eps
            assert_near(evaluated(operation.model, x), by_hand(x, model[0]))


class Activated(nn.Module):
    """Batch norm and activation in one, by functions, as in-place activated batch norm has it in plain Python."""

    def __init__(self, channels: int, absolute: bool = False):
        super().__init__()
        self.eps, self.momentum, self.absolute = 1e-5, 0.1, absolute
        self.activation, self.activation_param = "leaky_relu", 0.01
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.abs() + self.eps if self.absolute else self.weight
        parts = self.running_mean, self.running_var, weight, self.bias, self.training, self.momentum, self.eps
        return F.leaky_relu(F.batch_norm(x, *parts), self.activation_param)


@situation("mapillary/inplace_abn#163", "B", "convert, fold, freeze", "mended")
def test_an_activated_batch_norm_never_loses_its_activation():
    """An activated batch norm has a row in every report, and its activation is in the model whatever is done."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4)))
    x = numbers(2, 3, 5, 5)
    expected = F.leaky_relu(by_hand(model[0](x), model[1]), 0.01)
    for verb in (normlab.convert, normlab.freeze):
        operation = operated(verb, model, x)
        assert [row.name for row in operation.report] == ["1"]
        assert_near(evaluated(operation.model, x), expected)
    folded, report = normlab.fold(model, x)
    assert [row.name for row in report] == ["1"]
    assert_near(evaluated(folded, x), expected)


@situation("mapillary/inplace_abn#92", "B", "convert, fold", "left and said")
def test_an_activated_batch_norm_that_takes_the_size_of_gamma_is_no_batch_norm():
    """A batch norm that multiplies by |γ| + eps: with a negative γ it is no batch norm, and is left with a reason."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), Activated(4, absolute=True)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, -2.0, 0.5, -0.1]))
    x = numbers(2, 3, 5, 5)
    assert [row.became for row in operated(normlab.convert, model, x).report] == [None]
    folded, report = normlab.fold(model, x)
    assert [row.became for row in report] == [None]
    assert_near(evaluated(folded, x), evaluated(model, x))


class Representative(nn.BatchNorm2d):
    """Batch norm with weights of its own before it and after."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.center_weight = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale_weight = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input + self.center_weight * input.mean((2, 3), keepdim=True))
        return y * (1 + self.scale_weight * y.mean((2, 3), keepdim=True)).sigmoid()


@situation("Shanghua-Gao/RBN#4", "B", "fold, convert", "held")
def test_a_batch_norm_with_weights_of_its_own_is_left():
    """Representative batch norm has weights that no fold knows: it is left, its row names them, and nothing changes."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), Representative(4)))
    x = numbers(2, 3, 5, 5)
    (row,) = operated(normlab.convert, model, x).report
    assert row.became is None
    assert "center_weight" in row.note
    folded, report = normlab.fold(model, x)
    assert [one.became for one in report] == [None]
    assert_near(evaluated(folded, x), evaluated(model, x))


class WithAct(nn.BatchNorm2d):
    """Batch norm with the activation as a module inside."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


@situation("huggingface/pytorch-image-models#1633", "B", "freeze", "left and said")
def test_freezing_a_batch_norm_with_an_activation_inside_keeps_the_activation():
    """Freezing meets batch norms with an activation inside: they are left with a reason, and never lose it."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), WithAct(4), nn.BatchNorm2d(4)))
    x = numbers(2, 3, 5, 5)
    operation = operated(normlab.freeze, model, x)
    report = rows(operation)
    assert report["1"].became is None
    assert "act" in report["1"].note
    assert report["2"].became is not None
    assert_near(evaluated(operation.model[:2], x), by_hand(model[0](x), model[1]).relu())


class Masked(nn.BatchNorm1d):
    """Batch norm of the values that a keyword-only mask says count."""

    def forward(self, input: Tensor, *, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.training:
            return super().forward(input)
        values = input.transpose(1, 2)[mask]
        mean, var = values.mean(0), values.var(0, correction=0)
        y = (input - mean[:, None]) / (var[:, None] + self.eps).sqrt()
        return y * self.weight[:, None] + self.bias[:, None]


@situation("ludvb/batchrenorm#2", "A", "convert, sync, freeze", "left and said")
def test_a_batch_norm_with_a_mask_of_its_own_keeps_it():
    """A batch norm that takes a mask by keyword is left where another could not take it, and still trains with it."""
    model = with_drawn_state(nn.ModuleDict({"norm": Masked(4)}))
    x, mask = numbers(3, 4, 6), torch.arange(6).expand(3, 6) < torch.tensor([[6], [3], [4]])
    expected = model.train()["norm"](x, mask=mask)
    for verb in (normlab.convert, normlab.sync, normlab.freeze):
        operation = operated(verb, model)
        (row,) = operation.report
        assert row.became is None
        assert "mask" in row.note
        assert torch.equal(operation.model.train()["norm"](x, mask=mask), expected)


class PaddedBatchNorm(nn.Module):
    """Batch norm of (N, L, C) with paddings, and a momentum that is the weight of the old statistics."""

    def __init__(self, channels: int):
        super().__init__()
        self.momentum, self.eps = 0.999, 1e-3
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, inputs: Tensor, paddings: Tensor) -> Tensor:
        counted = (1 - paddings)[:, :, None]
        mean, var = self.running_mean, self.running_var
        if self.training:
            total = counted.sum()
            mean = (inputs * counted).sum((0, 1)) / total
            var = (((inputs - mean) * counted) ** 2).sum((0, 1)) / total
            with torch.no_grad():
                self.running_mean.lerp_(mean, 1 - self.momentum)
                self.running_var.lerp_(var, 1 - self.momentum)
        return ((inputs - mean) * (var + self.eps).rsqrt() * self.weight + self.bias) * counted


class Recogniser(nn.Module):
    """Gives its norm the paddings."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = PaddedBatchNorm(channels)

    def forward(self, x: Tensor, paddings: Tensor) -> Tensor:
        return self.norm(x, paddings)


@situation("mlcommons/algorithmic-efficiency#783", "C", "convert, recalibrate", "mended")
def test_a_norm_of_padded_sequences_is_not_measured_along_the_wrong_dimension():
    """A speech norm of (N, L, C) with paddings: recalibrate leaves it or measures its frames, never L as channels."""
    torch.manual_seed(0)
    model = with_drawn_state(Recogniser(5))
    x = numbers(4, 5, 5) + 10 * torch.arange(5)  # as many frames as channels: dimension 1 fits too
    paddings = (torch.arange(5).expand(4, 5) >= torch.tensor([[5], [3], [4], [2]])).float()
    (row,) = operated(normlab.convert, model, x, paddings).report
    assert row.became is None
    before = model.norm.running_mean.clone()
    (row,) = normlab.recalibrate(model, [(x, paddings)], forward=lambda net, batch: net(*batch)).report
    if row.became is None:
        assert torch.equal(model.norm.running_mean, before)
    else:
        assert_near(model.norm.running_mean, x[paddings == 0].double().mean(0))


class TokensBatchNorm(nn.BatchNorm1d):
    """Batch norm of (N, L, C)."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.transpose(1, 2)).transpose(1, 2)


@situation("pytorch/pytorch#76613", "C", "convert, recalibrate, diagnose", "mended")
def test_a_batch_norm_of_tokens_is_not_taken_for_one_of_images():
    """A batch norm subclass for (N, L, C) with L = C: nobody converts it or measures it along the tokens."""
    model = with_drawn_state(nn.Sequential(TokensBatchNorm(4)))
    x = numbers(6, 4, 4) + torch.tensor([0.0, 10.0, 20.0, 30.0])
    assert [row.became for row in operated(normlab.convert, model, x).report] == [None]
    before = model[0].running_mean.clone()
    (row,) = normlab.recalibrate(model, [x]).report
    if row.became is None:
        assert torch.equal(model[0].running_mean, before)
    else:
        assert_statistics(model[0], x, dim=2)
    state = state_of(model)
    normlab.diagnose(model, [x])
    assert [torch.equal(value, state[f"{name}: value"]) for name, value in model.state_dict().items()] == [True] * 5


@situation("xieyulai/LSTM-for-Human-Activity-Recognition-using-2D-Pose_Pytorch#2", "C", "convert, fold", "held")
def test_a_batch_norm_between_transposes_is_converted_along_its_channels():
    """A recurrent net transposes to (N, C, L) for its batch norm and back: converted, left by fold, the same output."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.rnn = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.GRU(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2))[0]

    torch.manual_seed(0)
    model = with_drawn_state(Net())
    x = numbers(2, 4, 3)
    (row,) = operated(normlab.convert, model, x).report
    assert row.became is not None
    folded, report = normlab.fold(model, x)
    assert [one.became for one in report] == [None]
    assert_near(evaluated(folded, x), evaluated(model, x))


class ActNorm(nn.Module):
    """Scale and shift that are set by the first batch in training."""

    def __init__(self, channels: int):
        super().__init__()
        self.loc, self.scale = (nn.Parameter(torch.full((1, channels, 1, 1), value)) for value in (0.0, 1.0))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.initialized:
            with torch.no_grad():
                self.loc.copy_(-x.mean((0, 2, 3), keepdim=True))
                self.scale.copy_(1 / x.std((0, 2, 3), keepdim=True))
                self.initialized.fill_(True)
        return self.scale * (x + self.loc)


@situation("rosinality/glow-pytorch#6", "B", "convert, diagnose", "left and said")
def test_a_flows_act_norm_is_left_and_not_initialised_by_a_look():
    """A flow's act norm sets itself by its first batch: no verb converts it, and no look at it initialises it."""
    model = with_drawn_state(nn.Sequential(ActNorm(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = numbers(4, 3, 5, 5, mean=5.0)
    report = rows(operated(normlab.convert, model, x))
    assert report["0"].became is None
    assert report["2"].became is not None
    normlab.diagnose(model, [x, x])
    normlab.convert(model, batches=[x])
    assert not model[0].initialized
    assert not model[0].loc.any()


class RunningMeanStd(nn.Module):
    """Observations over the mean and deviation of all so far, value by value, as in reinforcement learning."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("running_var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        y = (x - self.running_mean.float()) / (self.running_var.float() + 1e-5).sqrt()
        return y.clamp(-5, 5)


@situation("HumanCompatibleAI/imitation#393", "B", "convert, recalibrate, freeze", "left and said")
def test_a_normaliser_of_observations_is_no_batch_norm():
    """An observation normaliser owns running statistics for each pixel: it is left by every verb, which says why."""
    model = with_drawn_state(nn.Sequential(RunningMeanStd((3, 4, 4)), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = numbers(8, 3, 4, 4, mean=2.0)
    for verb in (normlab.convert, normlab.freeze):
        report = rows(operated(verb, model, x))
        assert report["0"].became is None
        assert report["2"].became is not None
    report = rows(normlab.recalibrate(model, [x]))
    assert report["0"].became is None
    assert not model[0].running_mean.any()
    assert_statistics(model[2], model[1](model[0](x)))


@situation("junyanz/pytorch-CycleGAN-and-pix2pix#1005", "B", "convert", "held")
def test_instance_norms_without_parameters_become_what_their_report_says():
    """A generator's instance norms have neither γ, β nor statistics: to group norm, a row says another function."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.InstanceNorm2d(16), nn.ReLU())
    x = numbers(2, 3, 6, 6)
    (row,) = operated(partial(normlab.convert, to="group"), model, x).report
    assert "the same" not in row.note
    operation = normlab.convert(model, "instance", batches=[x])
    assert_near(evaluated(operation.model, x), evaluated(model, x))
    assert operation.report.change is not None
    assert operation.report.change < 1e-5
    assert not list(operation.model[1].parameters())


@situation("MIC-DKFZ/nnUNet#370", "F", "recalibrate, freeze", "held")
def test_instance_norms_without_statistics_are_named_as_such():
    """Instance norms do not track statistics: recalibrate and freeze name each one and change nothing."""
    model = nn.Sequential(nn.Conv3d(1, 4, 3), nn.InstanceNorm3d(4, affine=True))
    x = numbers(1, 1, 5, 5, 5)
    assert [row.became for row in operated(normlab.freeze, model, x).report] == [None]
    (row,) = normlab.recalibrate(model, [x]).report
    assert row.became is None
    assert "statistics" in row.note


@situation("pytorch/pytorch#58843", "F", "recalibrate, freeze, unfreeze", "mended")
def test_an_instance_norm_that_tracks_has_the_mean_of_the_images_statistics():
    """Instance norm that tracks statistics evaluates with them: recalibrated, they are means of the images' own."""
    model = with_drawn_state(nn.Sequential(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)))
    x = numbers(6, 4, 5, 5) * torch.arange(1, 7).view(6, 1, 1, 1) + torch.arange(6).view(6, 1, 1, 1)
    normlab.recalibrate(model, x.split(2))
    var, mean = torch.var_mean(x.double(), (2, 3))
    assert_near(model[0].running_mean, mean.mean(0))
    assert_near(model[0].running_var, var.mean(0))
    frozen = operated(normlab.freeze, model, x).model
    assert_near(evaluated(frozen, x), by_hand(x, model[0]))
    assert type(operated(normlab.unfreeze, frozen, x).model[0]) is nn.InstanceNorm2d


@situation("mapillary/inplace_abn#208", "D", "convert", "mended")
def test_a_norm_with_an_activation_exports_as_layers_of_torch():
    """For TorchScript and a server a norm with an activation becomes torch's batch norm and ReLU: the same output."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), RunningBatchNorm2d(4, activation="relu"))
    for seed in range(3):
        model(numbers(8, 3, 5, 5, seed=seed))
    x = numbers(2, 3, 5, 5)
    plain = operated(partial(normlab.convert, to="torch"), model, x).model.eval()
    assert all(type(module).__module__.startswith("torch.") for module in plain.modules())
    scripted: Any = torch.jit.script(plain)
    assert_near(scripted(x), by_hand(model[0](x), model[1]).relu())


@situation("open-mmlab/mmcv#1253", "A", "sync, unsync", "mended")
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_unsync_gives_a_batch_norm_for_what_the_sync_norm_was_given(dims):
    """SyncBatchNorm does not say how many dimensions it takes: after unsync the model takes what it took before."""
    model = with_drawn_state(nn.Sequential(nn.SyncBatchNorm(4)))
    x = numbers(6, 4, *[3] * dims)
    operation = operated(normlab.unsync, model)
    assert [row.became is not None for row in operation.report] == [True]
    assert_near(evaluated(operation.model, x), by_hand(x, model[0]))
    y = operation.model.train()(x)
    assert_near(y, F.batch_norm(x, None, None, model[0].weight, model[0].bias, training=True))

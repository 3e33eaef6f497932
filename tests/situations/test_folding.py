"""Norms folded into the layers before them."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import normlab
from normlab.errors import InputError
from situation import (
    assert_near,
    assert_same_as,
    by_hand,
    evaluated,
    numbers,
    rows,
    situation,
    state_of,
    with_drawn_state,
)


def folded(model: nn.Module, *inputs: Any) -> Any:
    """The folded model and its report, held to give what the model gives, which is untouched."""
    before = state_of(model)
    expected = evaluated(model, *inputs)
    operation = normlab.fold(model, *inputs)
    assert_same_as(before, model)
    y = evaluated(operation.model, *inputs)
    for one, other in zip(
        (y,) if torch.is_tensor(y) else y, (expected,) if torch.is_tensor(y) else expected, strict=True
    ):
        assert_near(one, other)
    return operation


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


class Reused(nn.Module):
    """One convolution on two paths, of which one has a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return self.bn(self.conv(x)), self.conv(y)


@situation("pytorch/pytorch#197539", "A", "fold", "held")
def test_a_convolution_that_another_path_uses_keeps_its_weight():
    """A convolution has a norm on one of its two paths only: fold leaves it, for the other path's sake."""
    model = with_drawn_state(Reused())
    (row,) = folded(model, numbers(2, 3, 5, 5), numbers(2, 3, 5, 5, seed=1)).report
    assert row.became is None
    assert "conv" in row.note


@situation("pytorch/pytorch#180995", "A", "fold", "held")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norms_after_grouped_transposed_convolutions_are_folded(groups, dims):
    """A grouped transposed convolution has its outputs in another dimension of the weight: folded, it is the same."""
    torch.manual_seed(0)
    conv: Any = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    norm: Any = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
    model = with_drawn_state(nn.Sequential(conv(4, 8, 3, stride=2, groups=groups, bias=False), norm(8)))
    operation = folded(model, numbers(2, 4, *[4] * dims))
    assert norms_in(operation.model) == 0
    assert len(operation.report.touched) == 1


@situation("pytorch/ao#4116", "A", "fold", "held")
def test_a_linear_layers_features_are_not_the_norms_channels():
    """A linear layer on (N, C, L) with as many features as channels: the norm after it is left, since L is not C."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    assert folded(model, numbers(3, 4)).report.rows[0].became is not None
    (row,) = folded(model, numbers(3, 4, 4)).report
    assert row.became is None


@situation("pytorch/pytorch#85744", "A", "fold", "held")
def test_a_gamma_of_zero_is_folded_to_a_constant_channel():
    """Some γ are 0: folded, these channels are β, and nothing is divided by them."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[1].weight[:2] = 0.0
    x = numbers(2, 3, 5, 5)
    y = evaluated(folded(model, x).model, x)
    assert_near(y[:, :2], model[1].bias[:2].detach().view(1, 2, 1, 1).expand(2, 2, 3, 3))


@situation("pytorch/pytorch#45474", "A", "fold", "held")
def test_a_norm_without_gamma_and_beta_is_folded():
    """Batch norm with `affine=False` after a convolution without bias: folded by its statistics alone."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=False)))
    x = numbers(2, 3, 5, 5)
    operation = folded(model, x)
    assert norms_in(operation.model) == 0
    assert_near(evaluated(operation.model, x), by_hand(model[0](x), model[1]))


class Block(nn.Module):
    """A residual block by attributes, with a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, groups=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_())) + self.shortcut(x)).relu()


@situation("HKUSTGZ-MICS-LYU/MiCo-python#2", "A", "fold", "held")
def test_norms_of_a_block_by_attributes_are_folded():
    """Convolutions and norms that are attributes, in no Sequential: all norms of a residual block are folded."""
    operation = folded(with_drawn_state(Block()), numbers(2, 3, 6, 6))
    assert norms_in(operation.model) == 0
    assert len(operation.report.touched) == 3


@situation("open-mmlab/mmcv#747", "A", "fold", "held")
def test_the_report_says_how_much_a_fold_changes():
    """How far is a folded net from its original? The report has the largest change, and it is as small as rounding."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 32, 3, 1, 1), nn.BatchNorm2d(32), nn.Conv2d(32, 2, 3)))
    x = numbers(2, 3, 16, 16)
    operation = folded(model, x)
    y, other = evaluated(model, x).double(), evaluated(operation.model, x).double()
    largest = ((y - other).abs().max() / y.abs().max()).item()
    assert operation.report.change == pytest.approx(largest, rel=0.1, abs=1e-9)
    assert operation.report.change < 1e-5


@situation("tensorflow/tflite-micro#1651", "A", "fold", "held")
def test_a_norm_after_the_activation_is_left():
    """Convolution, activation, norm: what the norm is given is no convolution's output, so it is left and named."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)))
    (row,) = folded(model, numbers(2, 3, 5, 5)).report
    assert row.became is None


@situation("chr5tphr/zennit#202", "B", "fold", "held")
def test_a_frozen_norm_of_another_library_is_folded():
    """A detection library's frozen batch norm, all buffers: it is folded into the convolution before it."""

    class FrozenBatchNorm2d(nn.Module):
        def __init__(self, channels: int):
            super().__init__()
            self.eps = 1e-5
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(channels))

        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]

    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4)))
    operation = folded(model, numbers(2, 3, 5, 5))
    assert [row.became is not None for row in operation.report] == [True]


class Conv(nn.Module):
    """Convolution, norm and an activation that all blocks share; `fuse` is the class's own."""

    act = nn.SiLU()

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


@situation("ultralytics/yolov3#807", "A", "fold, convert", "held")
def test_blocks_that_share_an_activation_of_their_class_are_folded():
    """Detector blocks share one activation, an attribute of their class: every norm folds, and the outputs agree."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(Conv(3, 4), Conv(4, 4), nn.Conv2d(4, 2, 1)))
    x = numbers(1, 3, 8, 8)
    assert norms_in(folded(model, x).model) == 0
    converted = normlab.convert(model, "running").model
    assert norms_in(folded(converted, x).model) == 0


@situation("pytorch/pytorch#28594", "G", "convert, fold", "mended")
def test_weight_normalised_models_are_operated_in_place():
    """Old weight norm cannot be copied: the error says so and names `inplace=True`, with which both verbs work."""
    with pytest.warns(FutureWarning):
        conv = nn.utils.weight_norm(nn.Conv2d(3, 4, 3))
    model = with_drawn_state(nn.Sequential(conv, nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    x = numbers(2, 3, 5, 5)
    expected = evaluated(model, x)
    model.eval()(x)  # its weight is made by a pass with gradients, and no leaf from then on
    for verb in (normlab.convert, lambda net, **options: normlab.fold(net, x, **options)):
        with pytest.raises(InputError, match="inplace=True"):
            verb(model)
    normlab.convert(model, inplace=True)
    assert_near(evaluated(model, x), expected)
    report = rows(normlab.fold(model, x, inplace=True))
    assert report["3"].became is not None
    assert_near(evaluated(model, x), expected)


@situation("brain-research/self-attention-gan#21", "G", "fold, diagnose, convert", "mended")
def test_norms_after_spectrally_normalised_layers_are_left_and_diagnosed():
    """A GAN's layers have spectral norm, its norms are batch norms: fold leaves them, diagnose and convert work."""
    torch.manual_seed(0)
    conv = nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3))
    model = with_drawn_state(nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3)))
    x = numbers(8, 3, 6, 6)
    assert [row.became for row in folded(model, x).report] == [None]
    assert normlab.convert(model, "running").report.touched
    before = state_of(model)
    optimizer = torch.optim.Adam(model.parameters())
    batches = [(x, numbers(8, 1, 2, 2)), (x.flip(0), numbers(8, 1, 2, 2, seed=1))]
    found = normlab.diagnose(model, batches, loss=nn.functional.mse_loss, optimizer=optimizer)
    assert len(found.layers) == 1
    assert_same_as(before, model)


@situation("pytorch/pytorch#63519", "G", "convert, fold, freeze", "left and said")
def test_a_pruned_gamma_is_left_with_the_cure():
    """A pruning mask lies on a norm's γ: the norm is left, and the row says what to remove first."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    prune.l1_unstructured(model[1], "weight", 0.5)
    x = numbers(2, 3, 5, 5)
    expected = evaluated(model, x)
    for operation in (normlab.convert(model, inplace=True), normlab.fold(model, x, inplace=True)):
        (row,) = operation.report
        assert row.became is None
        assert "weight" in row.note
    assert_near(evaluated(model, x), expected)
    prune.remove(model[1], "weight")
    assert normlab.convert(model).report.touched

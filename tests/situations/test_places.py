"""Where norms are and how models use them: lists, wrappers, branches, prefixes of names, parents that read tensors."""

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import normlab
from normlab.nn import FrozenBatchNorm2d, RunningBatchNorm1d, RunningBatchNorm2d
from situation import (
    assert_near,
    assert_statistics,
    by_hand,
    copied,
    evaluated,
    numbers,
    operated,
    rows,
    situation,
    with_drawn_state,
)


class ConditionalBatchNorm(nn.Module):
    """Chooses one of several batch norms, which are in a plain list, for the whole batch."""

    def __init__(self, channels: int, domains: int):
        super().__init__()
        self.bns = [nn.BatchNorm2d(channels) for _ in range(domains)]

    def forward(self, x: Tensor, domain: int) -> Tensor:
        return self.bns[domain](x)


@situation("pytorch/pytorch#8985", "A", "freeze", "left and said")
def test_norms_of_a_plain_list_are_frozen_or_named():
    """A conditional batch norm keeps its norms in a plain list: they are frozen, or the report says they are not."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    conditional = ConditionalBatchNorm(4, 2)
    with_drawn_state(nn.ModuleList(conditional.bns))
    model.add_module("conditional", conditional)
    report = normlab.freeze(model, inplace=True).report
    frozen_rows = [row for row in report if row.became is not None]
    assert "1" in [row.name for row in frozen_rows]
    beside = [row for row in report if "bns" in row.name]
    assert len(beside) == 2  # torch itself sees neither
    for domain, row in enumerate(beside):
        norm: Any = conditional.bns[domain]
        before = norm.running_mean.clone()
        conditional.train()(numbers(8, 4, 3, 3, mean=30.0), domain)
        assert torch.equal(norm.running_mean, before) == (row.became is not None)


class DomainBatchNorm(nn.Module):
    """One batch norm a domain; `domain` says which."""

    def __init__(self, channels: int):
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))
        self.domain = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.bns[self.domain](x)


def set_domain(model: nn.Module, domain: int) -> None:
    for module in model.modules():
        if isinstance(module, DomainBatchNorm):
            module.domain = domain


@situation("pytorch/pytorch#48929", "A", "convert", "held")
def test_every_domain_of_a_domain_specific_batch_norm_is_converted():
    """Batch norms in a ModuleList, one a domain: each is converted with its own statistics, whichever is chosen."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), DomainBatchNorm(4), nn.ReLU()))
    x = numbers(2, 3, 5, 5)
    operation = operated(normlab.convert, model, x)
    assert len(operation.report.touched) == 2
    for domain in (0, 1):
        set_domain(model, domain)
        set_domain(operation.model, domain)
        expected = by_hand(model[0](x), model[1].bns[domain]).relu()
        assert_near(evaluated(operation.model, x), expected)


@situation("pytorch/pytorch#48929", "F", "recalibrate", "held")
def test_recalibration_of_one_domain_leaves_the_other():
    """Recalibrated with images of one domain, the other domain's batch norm keeps its statistics, and a row says so."""
    model = with_drawn_state(nn.Sequential(DomainBatchNorm(4)))
    other = copied(model[0].bns[1])
    x = numbers(16, 4, 5, 5, mean=3.0, deviation=2.0)
    report = rows(normlab.recalibrate(model, x.split(4)))
    assert report["0.bns.0"].became is not None
    assert report["0.bns.1"].became is None
    assert_statistics(model[0].bns[0], x)
    assert torch.equal(model[0].bns[1].running_mean, other.running_mean)


class SplitBatchNorm(nn.BatchNorm2d):
    """In training the batch is split: the first part goes through itself, the others through norms of their own."""

    def __init__(self, channels: int, splits: int = 2):
        super().__init__(channels)
        self.splits = splits
        self.aux_bn = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(splits - 1))

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        first, *others = input.split(len(input) // self.splits)
        return torch.cat([super().forward(first), *(bn(x) for bn, x in zip(self.aux_bn, others, strict=True))])


@situation("huggingface/pytorch-image-models#118", "A", "convert", "held")
def test_a_split_batch_norm_keeps_its_second_set_of_statistics():
    """Split batch norm for adversarial images is a plain one in evaluation only: it is left, and keeps its split."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), SplitBatchNorm(4)))
    x = numbers(8, 3, 5, 5)
    operation = operated(normlab.convert, model, x)
    assert rows(operation)["1"].became is None
    assert isinstance(operation.model[1], SplitBatchNorm)
    y = operation.model.train()(x)
    halves = operation.model[0](x).split(4)
    expected = torch.cat([F.batch_norm(half, None, None, training=True) for half in halves])
    norms = model[1], model[1].aux_bn[0]
    scale, shift = (torch.stack([getattr(norm, name) for norm in norms]) for name in ("weight", "bias"))
    spread = (expected.unflatten(0, (2, 4)) * scale.view(2, 1, 4, 1, 1) + shift.view(2, 1, 4, 1, 1)).flatten(0, 1)
    assert_near(y[:4], spread[:4])


class MixedBatchNorm(nn.BatchNorm2d):
    """`kind` says whether the images are clean, attacked or both; the attacked have a batch norm of their own."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.aux_bn = nn.BatchNorm2d(channels)
        self.kind = "clean"

    def forward(self, input: Tensor) -> Tensor:
        return self.aux_bn(input) if self.kind == "attacked" else super().forward(input)


@situation("tingxueronghua/pytorch-classification-advprop#5", "A", "sync", "held")
def test_a_batch_norm_with_an_auxiliary_one_still_chooses_after_sync():
    """A batch norm that sends attacked images through an auxiliary one goes on doing so after sync."""
    model = with_drawn_state(nn.Sequential(MixedBatchNorm(4)))
    x = numbers(4, 4, 3, 3)
    operation = operated(normlab.sync, model, x)
    operation.model[0].kind = "attacked"
    assert_near(evaluated(operation.model, x), by_hand(x, model[0].aux_bn))


class SparseTensor(NamedTuple):
    """Features of the points that there are, and where they are."""

    features: Tensor
    coordinates: Tensor


class SparseBatchNorm(nn.BatchNorm1d):
    """Normalises the features of a sparse tensor."""

    def forward(self, input: Any) -> Any:
        return input._replace(features=super().forward(input.features))


@situation("mit-han-lab/torchsparse#107", "A", "sync, convert", "left and said")
def test_a_batch_norm_of_sparse_tensors_is_left_with_a_reason():
    """A batch norm subclass that takes sparse tensors is left alone: another norm could not take them."""
    model = with_drawn_state(nn.Sequential(SparseBatchNorm(4)))
    points = SparseTensor(numbers(20, 4), torch.arange(20))
    for verb in (normlab.sync, normlab.convert):
        operation = operated(verb, model)
        assert [row.became for row in operation.report] == [None]
        y = evaluated(operation.model, points)
        assert_near(y.features, by_hand(points.features, model[0]))
        assert torch.equal(y.coordinates, points.coordinates)


class SparseWrapper(nn.Module):
    """Holds a batch norm, and gives it the features of a sparse tensor."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm1d(channels)

    def forward(self, input: SparseTensor) -> SparseTensor:
        return input._replace(features=self.bn(input.features))


@situation("NVIDIA/MinkowskiEngine#64", "A", "convert, sync, unsync", "held")
def test_the_batch_norm_inside_a_sparse_wrapper_is_converted():
    """A wrapper that gives its batch norm the features of points: the norm inside is converted, and there and back."""
    model = with_drawn_state(nn.Sequential(SparseWrapper(4)))
    points = SparseTensor(numbers(20, 4, mean=2.0), torch.arange(20))
    expected = by_hand(points.features, model[0].bn)
    operation = operated(normlab.convert, model)
    assert isinstance(operation.model[0].bn, RunningBatchNorm1d)
    assert_near(evaluated(operation.model, points).features, expected)
    back = normlab.unsync(normlab.sync(model).model).model
    assert_near(evaluated(back, points).features, expected)
    assert back[0].bn(points.features).shape == (20, 4)


class NodesBatchNorm(nn.Module):
    """Node features (graphs · nodes, C), seen as (graphs, C, nodes) by a batch norm."""

    def __init__(self, channels: int, nodes: int):
        super().__init__()
        self.nodes, self.bn = nodes, nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x.view(-1, self.nodes, x.shape[1]).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape)


@situation("pyg-team/pytorch_geometric#2394", "F", "convert, recalibrate", "held")
def test_statistics_of_graph_nodes_are_those_of_all_nodes():
    """A graph net reshapes nodes for speed: the norm inside is converted, and measures the statistics of all nodes."""
    model = with_drawn_state(nn.Sequential(nn.Linear(3, 4), NodesBatchNorm(4, 5)))
    x = numbers(40, 3, mean=1.0)
    operation = operated(normlab.convert, model, x)
    assert len(operation.report.touched) == 1
    normlab.recalibrate(operation.model, [x[:15], x[15:]])
    assert_statistics(operation.model[1].bn, model[0](x))


class GhostBatchNorm(nn.Module):
    """A batch norm for each chunk of so many rows, as tabular nets have it."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size, self.bn = size, nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.bn(part) for part in x.split(self.size)])


@situation("dreamquark-ai/tabnet#384", "A", "convert, diagnose", "held")
def test_a_last_chunk_of_one_row_trains_after_conversion():
    """A ghost batch norm whose last chunk is one row: diagnose names it, and after conversion it trains."""
    model = with_drawn_state(nn.Sequential(nn.Linear(3, 4), GhostBatchNorm(4, 10)))
    x = numbers(101, 3)
    with pytest.raises(ValueError, match="more than 1 value"):
        model.train()(x)
    found = normlab.diagnose(model, [x])
    assert any("1.bn" in finding.modules for finding in found.findings if finding.fault == "single value")
    operation = operated(normlab.convert, model, x)
    operation.model.train()(x).sum().backward()
    assert operation.model[1].bn.weight.grad.isfinite().all()


class RepBlock(nn.Module):
    """Convolutions of 3 and 1 and the identity, each with its norm; `deployed` is a convolution with their weights."""

    def __init__(self, channels: int):
        super().__init__()
        self.dense = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))
        self.point = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x) + self.point(x) + self.identity(x)

    def _parts(self, kernel: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return kernel * scale.view(-1, 1, 1, 1), norm.bias - norm.running_mean * scale

    def deployed(self) -> nn.Conv2d:
        channels = len(self.identity.running_mean)
        kernels: list[Any] = [self.dense[0].weight, F.pad(self.point[0].weight, [1] * 4)]
        kernels.append(F.pad(torch.eye(channels).view(channels, channels, 1, 1), [1] * 4))
        norms = self.dense[1], self.point[1], self.identity
        parts = [self._parts(kernel, norm) for kernel, norm in zip(kernels, norms, strict=True)]
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        conv.weight = nn.Parameter(sum(weight for weight, _ in parts))
        conv.bias = nn.Parameter(sum(bias for _, bias in parts))
        return conv


@situation("DingXiaoH/RepVGG#9", "A", "convert", "held")
def test_a_block_that_reads_its_norms_statistics_still_deploys():
    """A re-parametrised block reads its norms' statistics when it deploys: after conversion it still gives the same."""
    block = with_drawn_state(RepBlock(4))
    x = numbers(2, 4, 6, 6)
    converted = operated(normlab.convert, block, x).model
    assert_near(converted.deployed()(x), evaluated(block, x))
    trained = converted.train()
    for seed in range(3):
        trained(numbers(8, 4, 6, 6, seed=seed, mean=1.0))
    assert_near(trained.deployed()(x), evaluated(trained, x))


@situation("DingXiaoH/RepVGG#35", "A", "convert", "mended")
def test_a_conversion_that_takes_statistics_from_a_reader_says_so():
    """Group norm has no statistics for a block that reads them: the norm is left, or the report names the reader."""
    block = with_drawn_state(RepBlock(4))
    operation = normlab.convert(block, "group")
    for row in operation.report:
        assert row.became is None or "RepBlock" in row.note
    if not operation.report.touched:
        assert_near(operation.model.deployed()(numbers(1, 4, 5, 5)), evaluated(block, numbers(1, 4, 5, 5)))


class Functional(nn.Module):
    """Never calls its batch norm: only its statistics are used."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3, affine=False)
        self.weight, self.bias = nn.Parameter(numbers(3, seed=1)), nn.Parameter(numbers(3, seed=2))

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.bn.running_mean, self.bn.running_var
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training)


@situation("pytorch/pytorch#100970", "A", "freeze, convert", "mended")
def test_a_norm_that_is_never_called_is_not_reported_as_frozen():
    """A model calls F.batch_norm on its norm's buffers: what converting the module cannot do is not claimed."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(2, 3, 1), Functional()))
    operation = normlab.freeze(model)
    before = operation.model[1].bn.running_mean.clone()
    operation.model.train()(numbers(8, 2, 4, 4, mean=9.0))
    moved = not torch.equal(operation.model[1].bn.running_mean, before)
    (row,) = operation.report
    assert not moved or row.became is None or "Functional" in row.note
    x = numbers(2, 2, 4, 4)
    (row,) = normlab.convert(model, "group", batches=[x]).report
    assert row.became is None
    assert "batch_norm" in row.note


class NamedNorm(nn.Module):
    """Registers its norm under a name that a configuration gives, and reaches it by a property."""

    def __init__(self, name: str):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.norm_name = name
        self.add_module(name, nn.BatchNorm2d(4))

    @property
    def norm(self) -> nn.Module:
        return getattr(self, self.norm_name)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


@situation("open-mmlab/mmdetection#437", "A", "convert, freeze", "held")
def test_a_norm_behind_a_property_is_the_one_that_is_used():
    """A norm registered under a configured name and reached by a property: what the property gives is the new norm."""
    model = with_drawn_state(nn.Sequential(NamedNorm("bn1")))
    x = numbers(2, 3, 5, 5)
    assert isinstance(operated(normlab.convert, model, x).model[0].norm, RunningBatchNorm2d)
    frozen = operated(normlab.freeze, model, x).model.train()
    assert_near(frozen(x), by_hand(model[0].conv(x), model[0].norm).relu())


class ConvWithNorm(nn.Conv2d):
    """A convolution with its norm inside, as detection libraries have it."""

    def __init__(self, *args: Any, norm: nn.Module, **options: Any):
        super().__init__(*args, **options)
        self.norm = norm

    def forward(self, input: Tensor) -> Tensor:
        return self.norm(F.conv2d(input, self.weight, self.bias, self.stride, self.padding))


@situation("facebookresearch/detectron2#2022", "A", "fold, sync", "held")
def test_norms_inside_convolutions_are_chosen_by_stage_and_folded_or_left():
    """Convolutions that hold their norm: sync reaches the chosen stages only, and fold gives the same model."""
    torch.manual_seed(0)
    stages = {name: ConvWithNorm(3, 3, 3, padding=1, bias=False, norm=nn.BatchNorm2d(3)) for name in ("res2", "res3")}
    model = with_drawn_state(nn.Sequential(*[nn.Sequential(stage) for stage in stages.values()]))
    x = numbers(2, 3, 6, 6)
    operation = operated(partial(normlab.sync, only="1.*"), model, x)
    assert [row.became is None for row in operation.report] == [True, False]
    folded, report = normlab.fold(model, x)
    assert len(report) == 2
    assert all(row.note for row in report)
    assert_near(evaluated(folded, x), evaluated(model, x))


class Twice(nn.Module):
    """One batch norm after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.conv2, self.bn = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv2(self.bn(self.conv1(x)).relu()))


@situation("kanezaki/pytorch-unsupervised-segmentation#1", "A", "convert, fold", "held")
def test_a_norm_that_runs_twice_is_converted_but_not_folded():
    """One batch norm used twice in a pass: it converts, and fold leaves it and says why."""
    model = with_drawn_state(Twice())
    x = numbers(2, 3, 5, 5)
    operated(normlab.convert, model, x)
    folded, report = normlab.fold(model, x)
    assert [row.became for row in report] == [None]
    assert_near(evaluated(folded, x), evaluated(model, x))


class Siamese(nn.Module):
    """One encoder for two views."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))

    def forward(self, one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return self.encoder(one), self.encoder(other)


@situation("PatrickHua/SimSiam#1", "F", "recalibrate", "held")
def test_recalibration_of_a_siamese_net_pools_both_views():
    """A siamese net runs its encoder once a view: recalibrated statistics are those of both views together."""
    model = Siamese()
    one, other = numbers(30, 4, mean=2.0), numbers(30, 4, seed=1, mean=-1.0, deviation=3.0)
    batches = [(one[i : i + 10], other[i : i + 10]) for i in range(0, 30, 10)]
    normlab.recalibrate(model, batches, forward=lambda net, views: net(*views))
    assert_statistics(model.encoder[0], torch.cat([one, other]))


class ModulesToSave(nn.Module):
    """The module of before and a copy that is trained in its place, chosen by name."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.original_module = module
        self.modules_to_save = nn.ModuleDict({"default": copied(module)})
        self.active = "default"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module = self.modules_to_save[self.active] if self.active else self.original_module
        return module(*args, **kwargs)


@situation("huggingface/peft#551", "A", "convert", "held")
def test_a_wrapped_norm_and_its_original_are_converted_apart():
    """A fine-tuning wrapper keeps the norm of before and a trained copy: each is converted with its own statistics."""
    model = nn.Sequential(ModulesToSave(nn.BatchNorm2d(4)))
    with_drawn_state(model[0].original_module, seed=1)
    with_drawn_state(model[0].modules_to_save, seed=2)
    x = numbers(2, 4, 3, 3)
    converted = operated(normlab.convert, model, x).model
    assert_near(evaluated(converted, x), by_hand(x, model[0].modules_to_save["default"]))
    converted[0].active = ""
    assert_near(evaluated(converted, x), by_hand(x, model[0].original_module))


class ElasticBatchNorm(nn.BatchNorm2d):
    """Takes fewer channels than it has: the first ones."""

    def forward(self, input: Tensor) -> Tensor:
        parts = (part[: input.shape[1]] for part in (self.running_mean, self.running_var, self.weight, self.bias))
        return F.batch_norm(input, *parts, self.training, self.momentum or 0.0, self.eps)


@situation("JiahuiYu/slimmable_networks#22", "A", "convert, freeze", "mended")
def test_a_batch_norm_that_takes_fewer_channels_still_does():
    """A slimmable net gives a batch norm fewer channels than it has: no verb takes that away while it says nothing."""
    model = with_drawn_state(nn.Sequential(ElasticBatchNorm(6)))
    x = numbers(2, 4, 3, 3)
    expected = evaluated(model, x)
    for verb in (normlab.convert, normlab.freeze):
        operation = operated(verb, model, numbers(2, 6, 3, 3))
        assert [row.became for row in operation.report] == [None]
        assert_near(evaluated(operation.model, x), expected)


class SubnetBatchNorm(nn.Module):
    """Holds a batch norm, and reads its tensors where it is given fewer channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] == self.bn.num_features:
            return self.bn(x)
        mean, var, weight, bias = (
            part[: x.shape[1]] for part in (self.bn.running_mean, self.bn.running_var, self.bn.weight, self.bn.bias)
        )
        return F.batch_norm(x, mean, var, weight, bias, self.bn.training, self.bn.momentum, self.bn.eps)


@situation("mit-han-lab/gan-compression#65", "A", "convert", "mended")
def test_a_holder_that_slices_its_norm_finds_what_it_reads():
    """A sub-network slices its norm's tensors: after conversion it finds them, or the report names who reads them."""
    model = with_drawn_state(nn.Sequential(SubnetBatchNorm(6)))
    small, full = numbers(2, 4, 3, 3), numbers(2, 6, 3, 3)
    operation = operated(normlab.convert, model, full)
    assert_near(evaluated(operation.model, small), evaluated(model, small))
    assert "SubnetBatchNorm" in operation.report.rows[0].note
    (row,) = normlab.convert(model, "group").report
    assert row.became is None or "SubnetBatchNorm" in row.note


@situation("VainF/Torch-Pruning#466", "A", "convert, fold", "mended")
def test_a_pruned_norm_is_converted_with_the_channels_it_has():
    """A pruned norm has fewer channels than `num_features` says: those of its tensors count, and the row says so."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))
    keep = torch.tensor([0, 2, 5])
    model[0].weight = nn.Parameter(model[0].weight.detach()[keep])
    norm: Any = model[1]
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(getattr(norm, name).detach()[keep]))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[keep])
    x = numbers(2, 3, 6, 6)
    operation = operated(normlab.convert, model, x)
    (row,) = operation.report
    assert row.became is not None
    assert "3 channels" in row.note
    operation.model.train()(x).sum().backward()
    assert_near(evaluated(normlab.fold(model, x).model, x), evaluated(model, x))


class Residual(nn.Module):
    """Two convolutions and their norms, by attributes."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.bn1, self.bn2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


class Nested(nn.Module):
    """Blocks two levels down."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Residual(8), Residual(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer1(self.bn1(self.conv1(x)).relu()).mean((2, 3))


@situation("pytorch/vision#2391", "A", "convert", "held")
def test_norms_of_nested_blocks_all_become_group_norms():
    """All norms of a residual net become group norms, nested ones too, and γ and β fitted to images change it least."""
    model = with_drawn_state(Nested())
    x = numbers(16, 3, 8, 8)
    operation = operated(partial(normlab.convert, to="group"), model, x)
    assert len(operation.report.touched) == 5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in operation.model.modules())
    plain, fitted = (normlab.convert(model, "group", batches=[x], fit=fit) for fit in (False, True))
    for one, other in zip(plain.report, fitted.report, strict=True):
        assert other.change <= one.change * 1.001


@situation("lukemelas/EfficientNet-PyTorch#197", "H", "convert", "mended")
def test_eps_and_momentum_of_a_batch_norm_survive_the_way_over_group_norm():
    """Batch norm with eps 0.001 and momentum 0.01 becomes group norm and batch norm again: both numbers are there."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8, eps=1e-3, momentum=0.01)))
    group = operated(partial(normlab.convert, to="group"), model).model
    assert group[1].eps == 1e-3
    back = normlab.convert(group, "batch").model
    assert back[1].eps == 1e-3
    assert back[1].momentum == 0.01


class GroupNormByChannels(nn.GroupNorm):
    """Group norm whose first argument is the channels, so that it goes where batch norm goes."""

    def __init__(self, num_channels: int, num_groups: int = 4, **options: Any):
        super().__init__(num_groups, num_channels, **options)


@situation("pytorch/vision#1072", "B", "convert", "held")
def test_a_group_norm_with_arguments_in_another_order_is_known():
    """A group norm subclass whose constructor takes the channels first: it is converted to batch norm, and undone."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 8, 1), GroupNormByChannels(8)))
    x = numbers(2, 3, 5, 5)
    (row,) = operated(partial(normlab.convert, to="batch"), model).report
    assert row.became is not None
    assert "another function" in row.note
    same = operated(partial(normlab.convert, to="group", num_groups=4), model, x)
    assert_near(evaluated(same.model, x), evaluated(model, x))


@situation("pytorch/pytorch#9176", "E", "convert, freeze", "mended")
def test_names_are_understood_behind_the_prefix_of_data_parallel():
    """A model inside DataParallel: patterns of names mean the same norms with and without `module.`."""
    inner = with_drawn_state(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    )
    model = nn.DataParallel(inner)
    for pattern in ("1", "module.1"):
        operation = operated(partial(normlab.freeze, only=pattern), model)
        assert [type(operation.model.module[i]) is FrozenBatchNorm2d for i in (1, 3)] == [True, False]
    with pytest.raises(normlab.errors.InputError, match="bn9"):
        normlab.freeze(model, only="bn9")


@situation("pytorch/pytorch#122414", "0b", "convert, freeze, sync, fold", "held")
def test_no_verb_changes_the_modes_inside_a_compiled_model():
    """A compiled model says it trains though what it wraps does not: no verb moves either flag."""
    inner = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).eval()
    model: Any = torch.compile(inner, backend="eager")
    x = numbers(2, 3, 4, 4)
    modes = model.training, inner.training
    for verb in (partial(normlab.convert, batches=[x]), partial(normlab.freeze, only="1"), normlab.sync):
        operation = operated(verb, model, x)
        assert (operation.model.training, operation.model._orig_mod.training) == modes
        assert len(operation.report.touched) == 1
    folded = normlab.fold(model, x)
    assert (model.training, inner.training) == modes
    assert len(folded.report.touched) == 1
    assert_near(evaluated(folded.model, x), evaluated(inner, x))


class Levit(nn.Sequential):
    """A linear layer and its norm on all tokens; unpacks its modules, and so needs exactly two."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("c", nn.Linear(3, 4, bias=False))
        self.add_module("bn", nn.BatchNorm1d(4))

    def forward(self, input: Tensor) -> Tensor:
        linear, norm = self._modules.values()
        y = linear(input)
        return norm(y.flatten(0, 1)).reshape_as(y)


@situation("facebookresearch/LeViT#22", "A", "convert, fold", "held")
def test_a_block_that_unpacks_its_modules_still_has_two():
    """A block that unpacks `_modules` into a layer and a norm: after convert and fold it still has two."""
    model = with_drawn_state(nn.Sequential(Levit()))
    tokens = numbers(2, 5, 3)
    operated(normlab.convert, model, tokens)
    folded, report = normlab.fold(model, tokens)
    assert len(report) == 1
    assert len(folded[0]._modules) == 2
    assert_near(evaluated(folded, tokens), evaluated(model, tokens))

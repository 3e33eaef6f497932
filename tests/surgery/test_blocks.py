"""Surgery of nets built as those of torchvision, timm and segmentation_models are (`blocks.py`)."""

import copy
import re

import pytest
import torch
from torch import nn

from normlab import convert, diagnose, fold, freeze, unfreeze
from surgery.blocks import BLOCKS, C, RepVGGBlock
from surgery.laws import Photo, evaluate, far

IMAGES = [torch.randn(4, C, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
EXACT = 1e-5


def trained(name: str) -> nn.Module:
    """With γ, β and statistics that have seen batches."""
    torch.manual_seed(0)
    model = BLOCKS[name]()
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            offset = 1.0 if parameter_name.endswith("weight") else 0.0
            nn.init.normal_(parameter, offset, 0.2)
    for _ in range(5):
        for x in IMAGES:
            model.train()(x)
    return model.eval()


def statistics(model: nn.Module) -> list[str]:
    """Norms that have running mean and variance."""
    return [name for name, module in model.named_modules() if "running_mean" in module._buffers]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_converted_and_back(name):
    model = trained(name)
    photo, before = Photo(model), evaluate(model, IMAGES)
    there = convert(model, "running", batches=IMAGES)
    if all(row.note.startswith("the same in evaluation") for row in there.report.touched):
        assert far(before, evaluate(there.model, IMAGES)) <= EXACT
        assert there.report.change <= EXACT
    back = convert(there.model, "torch", batches=IMAGES)
    for one in model.state_dict():
        if one.rsplit(".", 1)[0] in {row.name for row in there.report.touched}:
            now = back.model.state_dict()
            assert one not in now or torch.equal(now[one], model.state_dict()[one]) or "num_batches" in one, one
    named = {one for row in there.report for one in row.name.split(", ")}
    assert set(statistics(model)) <= named
    photo.check_same("a copy was converted")
    photo.check_like(there.undo(), "undone")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_folded_exactly_or_says_why_not(name):
    model = trained(name)
    photo, before = Photo(model), evaluate(model, IMAGES[:1])
    operation = fold(model, IMAGES[0])
    assert far(before, evaluate(operation.model, IMAGES[:1])) <= EXACT
    left = {one for row in operation.report.skipped for one in row.name.split(", ")}
    assert set(statistics(operation.model)) <= left
    assert all(row.note for row in operation.report)
    photo.check_same("a copy was folded")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_frozen_and_unfrozen_bit_by_bit(name):
    model = trained(name).train()
    photo, before = Photo(model), evaluate(model, IMAGES)
    frozen = freeze(model, inplace=True)
    assert far(before, evaluate(model, IMAGES)) <= EXACT
    if not any("Frozen" in type(module).__name__ for module in copy.deepcopy(photo.looks) or ()):
        touched = {row.name for row in frozen.report.touched}
        back = unfreeze(model, inplace=True)
        assert touched <= {row.name for row in back.report.touched}
        back.undo()
    frozen.undo()
    photo.check_same("unfrozen")


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_is_diagnosed(name):
    model = trained(name)
    photo = Photo(model)
    found = diagnose(model, IMAGES)
    assert set(statistics(model)) <= {one for layer in found.layers for one in re.split(", ", layer.name)}
    photo.check_same("diagnosed")


def test_every_norm_of_a_plain_block_is_folded():
    for name in ("torchvision resnet.BasicBlock", "torchvision vgg_bn", "smp linknet: TransposeX2"):
        assert not fold(trained(name), IMAGES[0]).report.skipped, name


def test_repvgg_reparameterizes_itself_after_the_way_back():
    model = trained("timm repvgg and mobileone: three branches, one of a norm alone")
    assert isinstance(model, RepVGGBlock)
    back = convert(convert(model, "running").model, "batch").model
    model.reparameterize()
    back.reparameterize()
    assert torch.equal(back.reparam_conv.weight, model.reparam_conv.weight)

"""A report in a terminal of 80 columns: no two rows read alike."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from torch import nn

import normlab

PARTS = "encoder_backbone_of_the_left_branch", "residual_block_with_squeeze_and_excitation"


def deep() -> nn.Module:
    """Four norms whose names differ in the last letters alone."""
    model: nn.Module = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)) for _ in range(4)))
    for part in reversed(PARTS):
        inner, model = model, nn.Sequential()
        model.add_module(part, inner)
    return model


def shown(what, width: int = 80) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(what, highlight=False)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    "work",
    [
        lambda model, batches: normlab.convert(model, "running").report,
        lambda model, batches: normlab.convert(model, "group", batches=batches).report,
        lambda model, batches: normlab.diagnose(model, batches),
    ],
)
def test_names_are_whole_in_80_columns(work):
    model, batches = deep(), [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))]
    text = shown(work(model, batches))
    assert "…" not in text
    first = [line.split(" ")[0] for line in text.split("4 changed")[0].split("\n\n")[0].splitlines()]
    for number in range(4):
        assert ".".join((*PARTS, str(number), "1")) in "".join(first)


def test_names_are_not_read_as_markup():
    model = nn.Sequential()
    model.add_module("[red]", nn.BatchNorm2d(3))
    assert "[red]" in shown(normlab.convert(model, "running").report)

"""Plots: the right numbers in the right axes, and a picture that is not blank."""

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from normlab.observe import ActivationStats, plot_activations, plot_losses, plot_training
from normlab.observe.plots import draw_loss_over_rate, draw_losses, draw_rates, save

LOSSES = [3.0, 2.0, 1.5, 1.2, 1.1]
RATES = [0.1, 0.2, 0.3, 0.4, 0.5]


def lines(axis) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def count(n: int) -> list[int]:
    return list(range(1, n + 1))


def activations() -> ActivationStats:
    model = nn.Identity()
    with ActivationStats({"first": model, "second": model}) as stats:
        for i in range(15):
            model(torch.tensor([i - 1.0, i + 1.0]))
    return stats


def test_activations_over_the_first_ten_and_over_all_batches():
    figure = plot_activations(activations())
    assert [axis.get_title() for axis in figure.axes] == [
        *("mean, first 10 batches", "mean, all batches"),
        *("standard deviation, first 10 batches", "standard deviation, all batches"),
    ]
    means, all_means, deviations, all_deviations = (lines(axis) for axis in figure.axes)
    assert means == [(count(10), list(range(10)))] * 2
    assert all_means == [(count(15), list(range(15)))] * 2
    assert deviations == [(count(10), [1.0] * 10)] * 2
    assert all_deviations == [(count(15), [1.0] * 15)] * 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]
    assert all(axis.get_xlabel() and axis.get_ylabel() for axis in figure.axes)


@pytest.mark.parametrize(("skip_last", "kept"), [(0, 5), (2, 3)])
def test_losses(skip_last, kept):
    axis = plot_losses(LOSSES, skip_last).axes[0]
    assert lines(axis) == [(count(kept), LOSSES[:kept])]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("training batch", "loss")


def test_losses_beside_rates():
    left, right = plot_training(LOSSES, RATES).axes
    assert lines(left) == [(count(5), LOSSES)]
    assert lines(right) == [(count(5), RATES)]
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss", "learning rate")


@pytest.mark.parametrize(("skip_last", "kept"), [(0, 5), (2, 3)])
def test_loss_over_rate_on_a_log_scale(skip_last, kept):
    axis = Figure().subplots()
    draw_loss_over_rate(axis, RATES, LOSSES, skip_last)
    assert lines(axis) == [(RATES[:kept], LOSSES[:kept])]
    assert axis.get_xscale() == "log"
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("learning rate", "loss")


def test_two_curves_may_share_an_axis():
    axis = Figure().subplots()
    draw_losses(axis, LOSSES)
    draw_losses(axis, LOSSES[:2])
    draw_rates(axis, RATES)
    assert [len(x) for x, _ in lines(axis)] == [5, 2, 5]


FIGURES = {
    "activations": lambda: plot_activations(activations()),
    "losses": lambda: plot_losses(LOSSES),
    "losses that diverge": lambda: plot_losses([*LOSSES, math.inf, math.nan]),
    "training": lambda: plot_training(LOSSES, RATES),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_saved_picture_is_not_blank(name, tmp_path):
    path = tmp_path / "new folder" / "figure.png"
    figure = FIGURES[name]()
    save(figure, path, dpi=50)
    assert [file.name for file in path.parent.iterdir()] == ["figure.png"]
    pixels = matplotlib.image.imread(path)
    height, width = pixels.shape[:2]
    assert (width, height) == tuple(figure.get_size_inches() * 50)
    for axis in figure.axes:  # a coloured line in each
        left, bottom, right, top = axis.get_position().extents
        rows = slice(int((1 - top) * height), int((1 - bottom) * height))
        inside = pixels[rows, int(left * width) : int(right * width), :3]
        assert np.ptp(inside, axis=2).max() > 0.3


def test_a_picture_that_is_not_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    path.write_bytes(b"old")
    figure = plot_losses(LOSSES)

    def full_disk(file, **options) -> None:
        Path(file).write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(figure, "savefig", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save(figure, path)
    assert path.read_bytes() == b"old"

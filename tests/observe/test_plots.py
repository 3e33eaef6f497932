"""Plots: the right numbers in the right axes, and a picture that is not blank."""

import math
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from normlab.errors import InputError
from normlab.observe import (
    ActivationStats,
    plot_activations,
    plot_histograms,
    plot_losses,
    plot_near_zero,
    plot_training,
)
from normlab.observe.plots import draw_loss_over_rate, draw_losses, draw_rates, save

LOSSES = [3.0, 2.0, 1.5, 1.2, 1.1]
RATES = [0.1, 0.2, 0.3, 0.4, 0.5]


def lines(axis) -> list[tuple[list, list]]:
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines]


def count(n: int) -> list[int]:
    return list(range(1, n + 1))


def activations(every: int = 1) -> ActivationStats:
    model = nn.Identity()
    with ActivationStats({"first": model, "second": model}, every=every, limit=13.5, bins=9) as stats:
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


def test_activations_over_the_batches_that_were_looked_at():
    figure = plot_activations(activations(every=4))
    assert figure.axes[0].get_title() == "mean, first 10 batches looked at"
    assert [lines(axis) for axis in figure.axes[:2]] == [[([1, 5, 9, 13], [0, 4, 8, 12])] * 2] * 2


def test_many_layers_have_many_colours():
    modules = nn.ModuleDict({f"{i}": nn.Identity() for i in range(15)})
    with ActivationStats(dict(modules.items())) as stats:
        for module in modules.values():
            module(torch.ones(2))
    assert len({tuple(line.get_color()) for line in plot_activations(stats).axes[0].lines}) == 15


def test_histograms_as_colours():
    figure = plot_histograms(activations(every=2))
    *panels, bar = figure.axes
    assert [axis.get_title() for axis in panels] == ["first Identity", "second Identity"]
    image = panels[0].images[0]
    assert image.get_extent() == [0.5, 16.5, -13.5, 13.5]
    assert image.origin == "lower"
    shares = np.zeros((9, 8))  # bins of 3, and the batches 0, 2, … of i − 1 and i + 1
    for batch, i in enumerate(range(0, 15, 2)):
        for value in (i - 1, i + 1):
            shares[min(int((value + 13.5) / 3), 8), batch] += 0.5
    assert np.allclose(image.get_array(), np.maximum(shares, 1e-4))
    assert bar.get_ylabel() == "share of the values"


def test_near_zero_as_colours():
    axis, bar = plot_near_zero(activations(every=5)).axes
    assert axis.get_title() == "outputs nearer to zero than 1.5"
    assert [text.get_text() for text in axis.get_yticklabels()] == ["first Identity", "second Identity"]
    assert axis.images[0].get_extent() == [0.5, 15.5, 1.5, -0.5]
    assert axis.images[0].get_array().tolist() == [[1.0, 0.0, 0.0]] * 2
    assert bar.get_ylabel() == "share of the values"


def test_a_batch_without_finite_values_is_grey_and_a_module_without_figures_is_left_out():
    model = nn.Identity()
    with ActivationStats({"called": model, "not called": nn.Identity()}, every=1) as stats:
        model(torch.ones(2))
        model(torch.tensor([math.nan, math.inf]))
    *panels, _ = plot_histograms(stats).axes
    assert [axis.get_title() for axis in panels] == ["called Identity"]
    image = panels[0].images[0]
    assert image.get_array().mask.tolist() == [[False, True]] * stats.bins
    assert np.ptp(image.cmap(image.get_array())[0, 1, :3]) == 0
    axis = plot_near_zero(stats).axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["called Identity"]
    assert axis.images[0].get_array().mask.tolist() == [[False, True]]


@pytest.mark.parametrize("plot", [plot_histograms, plot_near_zero])
def test_without_figures_there_is_no_picture(plot):
    with pytest.raises(InputError, match="one training batch at least"):
        plot(ActivationStats(nn.ReLU()))


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
    "histograms": lambda: plot_histograms(activations()),
    "near zero": lambda: plot_near_zero(activations()),
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

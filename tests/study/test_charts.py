import math

import numpy as np
import pytest

from normlab.colours import COLOURS
from normlab.errors import InputError
from normlab.nn import NORMS
from normlab.study.charts import (
    cut,
    drawn_runs,
    layer_axes,
    layers_of,
    loss_axis,
    metric_axis,
    series_of,
    warmth_of,
)
from normlab.study.picture import write_png
from normlab.study.report import write_html
from normlab.study.summary import summarize
from records import record


def test_a_norm_has_one_colour_and_marker_and_its_variants_differ_in_the_dash():
    runs = [
        record(norm=norm, clip=clip, lr=lr) for norm in ("batch", "mine") for clip in (None, 1.0) for lr in (0.1, 1)
    ]
    lines = series_of(summarize(runs))
    assert [line.label for line in lines] == ["batch, clip 1", "batch, clip none", "mine, clip 1", "mine, clip none"]
    assert [line.dash for line in lines] == ["-", "--"] * 2
    batch, mine = ({(line.colour, line.marker) for line in pair} for pair in (lines[:2], lines[2:]))
    assert len(batch) == len(mine) == 1
    assert batch.isdisjoint(mine)
    assert lines[0].colour == COLOURS["batch"]


def test_a_norm_can_have_one_line_at_the_best_of_all_settings():
    runs = [
        record(accuracy, norm=norm, clip=clip)
        for norm in ("batch", "mine")
        for accuracy, clip in ((0.9, None), (0.8, 1.0))
    ]
    lines = series_of(summarize(runs), apart=False)
    assert [line.label for line in lines] == ["batch", "mine"]
    group = lines[1].best(2)
    assert group is not None
    assert group.settings["clip"] is None


@pytest.mark.parametrize("well_known", [0, 1, 7, 8])
def test_all_registered_norms_can_be_told_apart(well_known):
    """However many of those with a colour of their own are among them."""
    own, others = list(COLOURS), [name for name in NORMS if name not in COLOURS]
    assert len(others) >= 13
    norms = own[:well_known] + others
    lines = {line.label: line for line in series_of(summarize([record(norm=norm) for norm in norms]))}
    styles = [(lines[norm].colour, lines[norm].marker) for norm in norms]
    assert len(set(styles)) == len(norms)
    assert [colour for colour, _ in styles[:well_known]] == list(COLOURS.values())[:well_known]
    # No colour comes a third time, nor a marker a fourth, while another is left.
    assert max(sum(colour == other for other, _ in styles) for colour in COLOURS.values()) <= 3
    assert COLOURS.keys() <= NORMS.keys()


def test_new_norms_take_the_colours_that_the_known_ones_leave():
    lines = series_of(summarize([record(norm=norm) for norm in ("batch", "group", *"abcdef")]))
    assert len({line.colour for line in lines}) == len(COLOURS)


def own(value, **settings):
    """A run whose metric is a `depth` of one's own."""
    run = record(0.5, metrics=("my.measures:depth",), **settings)
    run.epochs[0]["valid"]["depth"] = value
    return run


def test_axes_reach_around_what_is_drawn():
    groups = summarize([record(0.98), record(0.1, norm="batch")])
    metric, loss = metric_axis(groups), loss_axis(groups)
    assert metric.low <= 0.1
    assert metric.high > 0.98
    assert loss.low < 0.06
    assert loss.high >= 3 * 0.9 + 2


@pytest.mark.parametrize(
    ("values", "kind"),
    [((0.1, 0.98), "error"), ((0.97, 0.98), "error"), ((1.0, 1.0), "error"), ((0.3, 0.6), "linear")],
)
def test_a_metric_up_to_one_is_drawn_by_its_error_where_it_comes_near_one(values, kind):
    axis = metric_axis(summarize([record(values[0]), record(values[1], norm="batch")]))
    assert (axis.title, axis.kind) == ("accuracy", kind)
    assert axis.share(axis.low) == 0
    assert axis.share(axis.high) == 1
    assert 0 <= axis.share(values[0]) <= axis.share(values[1]) <= 1


@pytest.mark.parametrize(
    ("values", "kind"),
    [((0.95, 0.98), "linear"), ((-40.0, 3000.0), "linear"), ((0.002, 900.0), "log"), ((7.0, 7.0), "linear"),
     ((0.0, 0.0), "linear"), ((1e-290, 1e308), "log"), ((1e-320, 1e308), "linear"), ((-1e308, 1e308), "linear")],
)  # fmt: skip
def test_other_metrics_are_linear_unless_they_span_decades(values, kind):
    axis = metric_axis(summarize([own(values[0]), own(values[1], norm="batch")]))
    assert (axis.title, axis.kind) == ("depth", kind)
    ticks = [tick for tick, _ in axis.ticks]
    assert ticks == sorted(ticks)
    assert 2 <= len(ticks) <= 20
    assert all(math.isfinite(axis.share(value)) for value in (*values, *ticks))
    assert axis.share(values[0]) <= axis.share(values[1])


def test_losses_that_run_away_do_not_flatten_the_others():
    wild = record(status="diverged", norm="batch")
    wild.curve["loss"][50:-1] = [1e20] * 49
    axis = loss_axis(summarize([record(0.9, seed=seed) for seed in range(3)] + [wild]))
    assert axis.high < 50
    assert axis.share(1e20) == 1
    negative = record(0.9)
    negative.curve["loss"][:] = [-float(step) for step in range(100)]
    assert loss_axis(summarize([negative])).kind == "linear"


def test_of_too_many_runs_those_of_the_best_settings_are_drawn():
    runs = [record(0.9 - lr, lr=lr, seed=seed) for lr in (0.1, 0.2) for seed in range(600)]
    drawn = drawn_runs(summarize(runs))
    assert {(run.settings["lr"], run.settings["seed"]) for run in drawn} == {(0.1, seed) for seed in range(500)}
    runs[-1].curve["loss"][0] = 1e-5
    assert loss_axis(summarize(runs)).low > 0.01, "the axis is that of the runs drawn"
    assert drawn_runs(summarize(runs[:1000])) == runs[:1000]


@pytest.mark.parametrize("values", [(0.3, 0.6), (0.1, 0.98)])
def test_many_values_are_as_high_as_each(values):
    axis = metric_axis(summarize([record(values[0]), record(values[1], norm="batch")]))
    some = [-1.0, *values, 0.5, 2.0]
    assert axis.shares(np.array(some)).tolist() == pytest.approx([axis.share(one) for one in some])


def test_less_is_warmer_where_less_is_better():
    for lower, warm in ((False, [0.0, 0.5, 1.0]), (True, [1.0, 0.5, 0.0])):
        groups = summarize([own(value, lr=value, lower=lower) for value in (1.0, 2.0, 3.0)])
        warmth = warmth_of(groups, metric_axis(groups))
        assert [warmth(group) for group in groups] == pytest.approx(warm)
    groups = summarize([record(0.2), record(status="failed", norm="batch")])
    assert [warmth_of(groups, metric_axis(groups))(group) for group in groups] == [0, 0]


def test_layers_are_the_last_finite_figures_that_a_run_kept():
    run = record(0.9)
    run.more["activations"] = {"step": [1, 9], "mean": {"0 conv": [0.1, None], "1 conv": [0.2, 0.3]}, "deviation": None}
    assert layers_of(run) == {"mean": {"0 conv": 0.1, "1 conv": 0.3}}
    assert list(layer_axes(summarize([run]))) == ["mean"]
    for other in (None, [], "text", {"mean": {}}):
        run.more["activations"] = other
        assert layers_of(run) == {}


def test_text_is_cut_to_what_fits_and_can_be_printed():
    assert cut("short", 8) == "short"
    assert cut("x" * 9, 8) == "xxxxxxx…"
    assert cut("a\x00b\x1b[31m\ud800\n", 20) == "a\ufffdb\ufffd[31m\ufffd\ufffd"


@pytest.mark.parametrize("write", [write_png, lambda records, path: write_html(records, path, "t", "c")])
class TestFiles:
    def test_nothing_to_report(self, write, tmp_path):
        with pytest.raises(InputError, match="nothing to report"):
            write([], tmp_path / "a")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, write, tmp_path):
        (tmp_path / "file").write_text("kept")
        with pytest.raises(InputError, match=r"file/a cannot be written: .*Choose another folder"):
            write([record(0.9)], tmp_path / "file" / "a")
        assert (tmp_path / "file").read_text() == "kept"

    def test_a_failed_write_leaves_nothing_behind(self, write, tmp_path):
        (tmp_path / "a").mkdir()
        with pytest.raises(InputError, match="cannot be written"):
            write([record(0.9)], tmp_path / "a")
        assert [entry.name for entry in tmp_path.iterdir()] == ["a"]

    def test_replaces_and_makes_folders(self, write, tmp_path):
        path = tmp_path / "new" / "a"
        write([record(0.9)], path)
        first = path.read_bytes()
        write([record(0.8), record(0.7, norm="batch")], path)
        assert path.read_bytes() != first
        assert [entry.name for entry in path.parent.iterdir()] == ["a"]

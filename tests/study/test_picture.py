import warnings
from collections import Counter
from xml.etree import ElementTree

import matplotlib.image
import numpy as np
import pytest

from normlab.colours import COLOURS
from normlab.errors import InputError
from normlab.study.picture import write_figures, write_png
from records import record, study


def pixels(records, path):
    """How many pixels of the picture have a colour."""
    write_png(records, path)
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int)
    colours, counts = np.unique(pixels @ [65536, 256, 1], return_counts=True)
    return Counter({f"#{colour:06X}": count for colour, count in zip(colours, counts, strict=True)})


def test_each_norm_has_its_colour_and_divergence_its_strip(tmp_path):
    drawn = pixels(study(), tmp_path / "all.png")
    assert min(drawn[COLOURS["running"]], drawn[COLOURS["batch"]]) > 500
    assert drawn[COLOURS["group"]] == 0
    fine = pixels([record(0.96), record(0.97, batch_size=32)], tmp_path / "fine.png")
    lost = pixels([record(0.96), record(status="diverged", step=3, batch_size=32)], tmp_path / "lost.png")
    assert lost["#EEEEEE"] > 1000 > fine["#EEEEEE"]


HOSTILE = ["$\\frac", "<script>&amp;\"'", "x" * 5000, "a\x00b\x1b[31m\n-->", "\u6279 \ud800", "%s {0} \\ _", "--"]


def kept(run):
    run.more["activations"] = {"step": [1], "mean": {"$0$": [0.5], "<b>": [None]}, "deviation": {"$0$": [1.0]}}
    return run


class TestFigures:
    def test_each_is_a_file_of_each_format(self, tmp_path):
        paths = write_figures([kept(run) for run in study()], tmp_path / "new")
        assert {path.name for path in paths} == {
            f"{name}.{kind}" for name in ("metric", "rates", "curves", "layers") for kind in ("png", "svg", "pdf")
        }
        starts = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}
        assert all(path.read_bytes().startswith(starts[path.suffix]) for path in paths)

    def test_there_is_none_of_what_was_not_varied_or_kept(self, tmp_path):
        paths = write_figures([record(0.9)], tmp_path, ["svg"])
        assert sorted(path.name for path in paths) == ["curves.svg", "metric.svg"]

    def test_equal_records_give_equal_files(self, tmp_path):
        one, two = (write_figures([kept(record(0.9))], tmp_path / name) for name in ("one", "two"))
        assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]

    @pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
    def test_names_are_drawn_as_text(self, tmp_path, name):
        runs = [record(0.9, norm=name, lr=lr, optimizer=name) for lr in (0.1, 1.0)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            paths = write_figures(runs, tmp_path, ["svg"])
        for path in paths:
            assert {one.tag.rpartition("}")[2] for one in ElementTree.parse(path).iter()}.isdisjoint({"script", "b"})

    def test_unknown_formats_are_refused_before_anything_is_written(self, tmp_path):
        with pytest.raises(InputError, match=r"formats='gif'.*png, svg, pdf"):
            write_figures([record(0.9)], tmp_path, ["png", "gif"])
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "runs",
    [
        [record(1.0)],
        [record(0.0)],
        [record(status="diverged", step=0, points=1)],
        [record(status="failed", error="no", points=1)],
        [record(0.9, norm=r"$\frac"), record(float("nan"), norm="_x")],
        [record(0.9, seed=seed) for seed in range(7)],
    ],
    ids=["perfect", "all wrong", "diverged at once", "failed", "odd names", "all equal"],
)
def test_extreme_results_can_be_drawn(runs, tmp_path):
    write_png(runs, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

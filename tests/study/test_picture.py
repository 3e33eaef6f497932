from collections import Counter

import matplotlib.image
import numpy as np
import pytest

from normlab.study.charts import COLOURS
from normlab.study.picture import write_png
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


@pytest.mark.parametrize(
    "runs",
    [
        [record(1.0)],
        [record(0.0)],
        [record(status="diverged", step=0, points=1)],
        [record(status="failed", error="no", points=1)],
        [record(0.9, norm=r"$\frac"), record(float("nan"), norm="_x")],
    ],
    ids=["perfect", "all wrong", "diverged at once", "failed", "odd names"],
)
def test_extreme_results_can_be_drawn(runs, tmp_path):
    write_png(runs, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")

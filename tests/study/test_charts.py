import pytest

from normlab.errors import InputError
from normlab.nn import NORMS
from normlab.study.charts import COLOURS, error_ticks, loss_ticks, series_of
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


def test_axes_reach_around_what_is_drawn():
    groups = summarize([record(0.98), record(0.1, norm="batch")])
    errors, losses = error_ticks(groups), loss_ticks(groups)
    assert errors[0] < 0.02
    assert 0.9 <= errors[-1] <= 1
    assert losses[0] < 0.06
    assert losses[-1] >= 3 * 0.9 + 2


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

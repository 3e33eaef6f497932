"""Files that are there whole or not at all, and nothing of the user's is touched."""

import os
import threading

import pytest

from normlab.errors import InputError
from normlab.files import check_writable, write_whole


def test_a_file_is_replaced_whole_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new" / "page.html"
    for content in (b"first", b"second"):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["page.html"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_files_of_the_users_own_are_not_touched(tmp_path):
    for name in (".writable", "page.html.part"):
        (tmp_path / name).write_text("mine")
    check_writable(tmp_path)
    write_whole(tmp_path / "page.html", b"page")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        ".writable": "mine",
        "page.html.part": "mine",
        "page.html": "page",
    }


def test_writers_at_once_leave_one_of_their_files_whole(tmp_path):
    contents = [bytes([65 + number]) * 1_000_000 for number in range(8)]
    writers = [threading.Thread(target=write_whole, args=(tmp_path / "file", one)) for one in contents]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert os.listdir(tmp_path) == ["file"]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    for use in (check_writable, lambda folder: write_whole(folder / "page.html", b"")):
        with pytest.raises(InputError, match="cannot be written"):
            use(tmp_path / "file" / "folder")
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="taken cannot be written"):
        write_whole(tmp_path / "taken", b"")
    assert sorted(os.listdir(tmp_path)) == ["file", "taken"]

"""Downloads from a real server on this machine: cut, slow, wrong, missing, continued."""

import gzip
import hashlib
import http.server
import io
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pooch
import pytest

from normlab.data import download
from normlab.data.download import CHUNK, cache_folder, fetch
from normlab.errors import InputError

NAME = "images.gz"
CONTENT = gzip.compress(random.Random(0).randbytes(1_000_000))
SUM = hashlib.sha256(CONTENT).hexdigest()


# What a server gives as the address of the file, or as its length.
LOCATIONS = {
    "nowhere": "http://127.0.0.1:1/",
    "itself": "images.gz",
    "no-port": "http://127.0.0.1:port/",
    "no-host": "http://[bad/",
    "no-label": "http://.example..invalid/",
    "a-long-label": f"http://{'a' * 80}.invalid/",
    "another-scheme": "file:///etc/hosts",
    "nothing": "",
    "no-address": "//",
    "other-bytes": "http://\xff\xfe/",
}
LENGTHS = {
    "words": "many",
    "minus": "-5",
    "a-part": "1.5",
    "huge": "9" * 30,
    "too-many": str(2 * len(CONTENT)),
    "too-few": "10",
    "two": "5, 7",
    "digits": "\xb2\xb3",
}


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the first folder: good, plain (no Range), cut, stuck, slow, wrong, labelled, or else 404."""

    def do_GET(self):
        way = self.path.split("/")[1]
        asked = self.headers.get("Range")
        self.server.log.append((way, asked))
        content = {"wrong": CONTENT[::-1]}.get(way, CONTENT)
        start = 0 if way == "plain" or not asked else int(asked.removeprefix("bytes=").removesuffix("-"))
        if way == "missing":
            return self.send_error(404)
        if start >= len(content):
            return self.send_error(416)
        if way in LOCATIONS:
            self.send_response(302)
            self.send_header("Location", LOCATIONS[way])
            return self.end_headers()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", LENGTHS.get(way) or str(len(content) - start))
        if way == "labelled":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        end = len(content) // 2 if way in ("cut", "stuck") else len(content)
        for at in range(start, end, CHUNK):
            self.wfile.write(content[at : min(at + CHUNK, end)])
            time.sleep(0.04 if way == "slow" else 0)
        if way == "stuck":
            self.server.closing.wait(60)

    def log_message(self, *_):
        pass


class QuietServer(http.server.ThreadingHTTPServer):
    log: list[tuple[str, str | None]]
    closing: threading.Event

    def handle_error(self, *_):
        """A client that was killed is what some tests are about."""


@pytest.fixture
def server():
    server = QuietServer(("127.0.0.1", 0), Handler)
    server.log, server.closing = [], threading.Event()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def mirror(server):
    return lambda way: f"http://127.0.0.1:{server.server_port}/{way}/"


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def left_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {f"{NAME}.lock"}


def test_the_file_arrives_whole_and_once(server, mirror, tmp_path, capfd):
    path = fetch(NAME, SUM, [mirror("good")], tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / NAME
    assert path.read_bytes() == CONTENT
    assert left_in(path.parent) == {NAME}
    assert fetch(NAME, SUM, [mirror("good")], path.parent) == path
    assert server.log == [("good", None)]
    assert capfd.readouterr() == ("", "")  # not a terminal: nothing is shown


def test_a_cut_download_is_continued_by_the_next_mirror(server, mirror, tmp_path):
    path = fetch(NAME, SUM, [mirror("cut"), mirror("good")], tmp_path)
    assert path.read_bytes() == CONTENT
    assert left_in(tmp_path) == {NAME}
    start = int(server.log[1][1].removeprefix("bytes=").removesuffix("-"))
    assert len(CONTENT) // 2 - CHUNK <= start <= len(CONTENT) // 2


def test_a_cut_download_is_continued_by_the_next_call(server, mirror, tmp_path):
    with pytest.raises(InputError, match=r"cut/images.gz: .*(?s:.)*the next attempt goes on from there"):
        fetch(NAME, SUM, [mirror("cut")], tmp_path)
    assert left_in(tmp_path) == {f"{NAME}.part"}
    have = (tmp_path / f"{NAME}.part").stat().st_size
    assert fetch(NAME, SUM, [mirror("good")], tmp_path).read_bytes() == CONTENT
    assert server.log == [("cut", None), ("good", f"bytes={have}-")]
    assert left_in(tmp_path) == {NAME}


def test_a_server_without_range_starts_again(server, mirror, tmp_path):
    assert fetch(NAME, SUM, [mirror("cut"), mirror("plain")], tmp_path).read_bytes() == CONTENT
    assert server.log[1][1] is not None


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_process_is_continued(server, mirror, tmp_path, stop):
    code = (
        f"from normlab.data.download import fetch; fetch({NAME!r}, {SUM!r}, [{mirror('stuck')!r}], {str(tmp_path)!r})"
    )
    part = tmp_path / f"{NAME}.part"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    ) as process:
        deadline = time.monotonic() + 60
        while not (part.exists() and part.stat().st_size >= 2 * CHUNK) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(stop)
        assert process.wait() != 0
    assert left_in(tmp_path) == {part.name}
    have = part.stat().st_size
    assert 2 * CHUNK <= have < len(CONTENT)
    assert fetch(NAME, SUM, [mirror("good")], tmp_path).read_bytes() == CONTENT
    assert server.log[-1] == ("good", f"bytes={have}-")


def test_a_wrong_sum_leaves_no_file(mirror, tmp_path):
    found = hashlib.sha256(CONTENT[::-1]).hexdigest()
    with pytest.raises(InputError, match=rf"wrong/images.gz: expected SHA-256 {SUM}, found {found}"):
        fetch(NAME, SUM, [mirror("wrong")], tmp_path)
    assert left_in(tmp_path) == set()


def test_after_a_wrong_sum_the_next_mirror_is_asked_for_all(server, mirror, tmp_path):
    assert fetch(NAME, SUM, [mirror("wrong"), mirror("good")], tmp_path).read_bytes() == CONTENT
    assert server.log == [("wrong", None), ("good", None)]


def test_a_mirror_that_does_not_answer_is_passed_over(mirror, tmp_path):
    dead = f"http://127.0.0.1:{unused_port()}/"
    assert fetch(NAME, SUM, [dead, mirror("missing"), mirror("good")], tmp_path).read_bytes() == CONTENT


def test_all_mirrors_failing_names_each_and_the_way_out(mirror, tmp_path):
    mirrors = [mirror("missing"), f"http://127.0.0.1:{unused_port()}/"]
    with pytest.raises(InputError) as caught:
        fetch(NAME, SUM, mirrors, tmp_path / "cifar10")
    text = str(caught.value)
    for line in (
        f"{mirrors[0]}{NAME}: 404",
        f"{mirrors[1]}{NAME}: ",
        "--data-dir",
        "NORMLAB_DATA",
        f"FOLDER/cifar10/{NAME}",
    ):
        assert line in text
    assert "kept" not in text
    assert left_in(tmp_path / "cifar10") == set()


@pytest.mark.parametrize("way", [*LOCATIONS, *LENGTHS])
def test_a_bad_address_or_length_leads_to_the_next_mirror(mirror, tmp_path, way):
    assert fetch(NAME, SUM, [mirror(way), mirror("good")], tmp_path).read_bytes() == CONTENT
    assert left_in(tmp_path) == {NAME}


@pytest.mark.parametrize("way", LOCATIONS)
def test_a_bad_address_alone_is_named(mirror, tmp_path, way):
    with pytest.raises(InputError, match=f"{way}/{NAME}: "):
        fetch(NAME, SUM, [mirror(way)], tmp_path)
    assert not (tmp_path / NAME).exists()


def test_a_file_without_end_is_given_up(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LARGEST", len(CONTENT) // 2)
    with pytest.raises(InputError, match=rf"good/{NAME}: more than {len(CONTENT) // 2:,} bytes came"):
        fetch(NAME, SUM, [mirror("good")], tmp_path)
    assert left_in(tmp_path) == set()


def test_a_damaged_part_does_not_spoil_the_only_good_mirror(server, mirror, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(b"x" * 1000)
    assert fetch(NAME, SUM, [mirror("good")], tmp_path).read_bytes() == CONTENT
    assert server.log == [("good", "bytes=1000-"), ("good", None)]


def test_an_altered_file_is_replaced_only_by_the_right_one(mirror, tmp_path):
    path = tmp_path / NAME
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(InputError):
        fetch(NAME, SUM, [mirror("wrong"), mirror("missing")], tmp_path)
    assert path.read_bytes() == CONTENT[:-1]
    assert fetch(NAME, SUM, [mirror("good")], tmp_path).read_bytes() == CONTENT


def test_a_part_that_lacks_nothing_is_used(server, mirror, tmp_path):
    (tmp_path / f"{NAME}.part").write_bytes(CONTENT)
    assert fetch(NAME, SUM, [mirror("good")], tmp_path).read_bytes() == CONTENT
    assert server.log == [("good", f"bytes={len(CONTENT)}-")]


@pytest.mark.parametrize("rubbish", [b"x" * 1000, b"x" * (len(CONTENT) + 1)], ids=["short", "long"])
def test_a_damaged_part_is_thrown_away(server, mirror, tmp_path, rubbish):
    (tmp_path / f"{NAME}.part").write_bytes(rubbish)
    assert fetch(NAME, SUM, [mirror("good"), mirror("good")], tmp_path).read_bytes() == CONTENT
    assert [asked for _, asked in server.log] == [f"bytes={len(rubbish)}-", None]


def test_bytes_are_kept_as_sent_whatever_their_label(mirror, tmp_path):
    assert fetch(NAME, SUM, [mirror("labelled")], tmp_path).read_bytes() == CONTENT


def test_calls_at_once_download_one_time(server, mirror, tmp_path):
    calls = [threading.Thread(target=fetch, args=(NAME, SUM, [mirror("slow")], tmp_path)) for _ in range(3)]
    for call in calls:
        call.start()
    for call in calls:
        call.join()
    assert server.log == [("slow", None)]
    assert (tmp_path / NAME).read_bytes() == CONTENT


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("progress", [True, False])
def test_a_bar_is_shown_on_a_terminal(mirror, tmp_path, monkeypatch, progress):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    fetch(NAME, SUM, [mirror("good")], tmp_path, progress=progress)
    shown = sys.stderr.getvalue()
    assert (NAME in shown and "1.0/1.0 MB" in shown) if progress else shown == ""


def test_a_folder_that_cannot_be_made(mirror, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/cache cannot be used.*NORMLAB_CACHE"):
        fetch(NAME, SUM, [mirror("good")], tmp_path / "file" / "cache")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(server, mirror, tmp_path):
    (tmp_path / "whole").write_bytes(CONTENT)
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InputError, match=r"cannot be used.*Permission denied.*NORMLAB_CACHE"):
            fetch(NAME, SUM, [mirror("good")], tmp_path)
        assert fetch("whole", SUM, [], tmp_path).read_bytes() == CONTENT
    finally:
        tmp_path.chmod(0o755)
    assert server.log == []


def test_a_file_at_hand_needs_no_right_to_write(tmp_path):
    (tmp_path / NAME).write_bytes(CONTENT)
    assert fetch(NAME, SUM, [], tmp_path).read_bytes() == CONTENT
    assert [file.name for file in tmp_path.iterdir()] == [NAME]  # not even a lock


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv("NORMLAB_CACHE", "~/there")
    assert cache_folder() == Path.home() / "there"
    monkeypatch.delenv("NORMLAB_CACHE")
    assert cache_folder() == pooch.os_cache("normlab")

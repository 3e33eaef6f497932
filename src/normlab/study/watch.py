"""The page of a study that runs, on this machine only."""

import shlex
from contextlib import suppress
from functools import partial
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock

from ..errors import InputError, check, is_whole
from .plan import PLAN, Plan
from .report import make_html
from .results import complete_groups
from .status import status
from .stopping import counts
from .store import RunStore, driver

HOST = "127.0.0.1"
PORT = 8017
BARE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="2">
<link rel="icon" href="data:,"><title>normlab study watch</title><p style="font-family: sans-serif">{}</p></html>
"""
WAITING = BARE.format("No run of this study has ended yet. The page looks again every two seconds.")


def watch(folder: str | Path, port: int = PORT) -> None:
    """Serve the page of a study at http://127.0.0.1:`port` while it runs, until Ctrl-C.

    The page loads itself again when a run has ended. No other machine can ask for it.

    Args:
        folder: of the study.
        port: of this machine; 0 for any that is free.

    Raises:
        InputError: the port is taken.
    """
    with make_server(folder, port) as server:
        server.serve_forever()


def make_server(folder: str | Path, port: int = PORT) -> "Server":
    """The server of `watch`, which answers once its `serve_forever` is called. It has its `address`.

    Raises:
        InputError: the port is taken.
    """
    check(is_whole(port) and port < 2**16, "port", port, "0 to 65535")
    try:
        return Server(Path(folder), port)
    except OSError as error:
        raise InputError(f"port={port} cannot be used: {error.strerror}. Choose another one, or 0 for any.") from error


class Server(ThreadingHTTPServer):
    """Answers with the page of a study, made again when its store has changed."""

    daemon_threads = True

    def __init__(self, folder: Path, port: int):
        self._folder = folder
        self._store, self._plan = RunStore(folder / "runs.jsonl"), folder / PLAN
        self._command = f"normlab study run {shlex.quote(str(self._plan))} --out {shlex.quote(str(folder))}"
        self._state, self._page, self._lock = "", b"", Lock()
        super().__init__((HOST, port), Handler)

    @property
    def address(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self.server_port}/"

    def page(self) -> tuple[str, bytes]:
        """The state of the store, as a tag of HTTP, and its page.

        Raises:
            InputError: store or plan cannot be read.
        """
        with self._lock:
            going = "runs" if driver(self._folder) else "rests"
            state = f'"{_stamp(self._store.path)}-{_stamp(self._plan)}-{going}"'
            if state != self._state:
                self._page = self._make(state)
                self._state = state
            return state, self._page

    def _make(self, state: str) -> bytes:
        records, states = self._store.outcomes(), None
        if self._plan.exists():
            plan = Plan.read(self._plan)
            trials = plan.trials()
            keys, wanted = {trial.key for trial in trials}, partial(counts, plan)
            records = [one for one in records if one.key in keys and wanted(one)]
            states = status(self._folder, trials, wanted).counts
        if not records:
            return WAITING.encode()
        groups = complete_groups(self._store, records)
        return make_html(groups, "Norms compared", self._command, counts=states, live=state).encode(errors="replace")


class Handler(BaseHTTPRequestHandler):
    """Gives the page to a browser of this machine, and nothing else."""

    server: Server
    server_version = "normlab"
    sys_version = ""

    def do_GET(self) -> None:
        """The page; an error of the store is said there."""
        host = self.headers.get("Host", "").rpartition(":")[0]  # its port may be that of a tunnel
        if host not in (HOST, "localhost"):  # a site elsewhere whose name was turned to this machine
            self.send_error(HTTPStatus.FORBIDDEN)
        elif self.path.partition("?")[0] != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            self._answer()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is printed."""

    def _answer(self) -> None:
        try:
            status, (state, page) = HTTPStatus.OK, self.server.page()
        except InputError as error:
            status, (state, page) = HTTPStatus.INTERNAL_SERVER_ERROR, ('""', BARE.format(escape(str(error))).encode())
        self.send_response(status)
        for name, value in {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Length": str(len(page)),
            "ETag": state,
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # the browser has left
                self.wfile.write(page)


def _stamp(path: Path) -> str:
    """Changes when the file does."""
    try:
        found = path.stat()
    except OSError:
        return "none"
    return f"{found.st_size:x}.{found.st_mtime_ns:x}"

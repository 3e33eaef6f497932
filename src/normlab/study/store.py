"""Where a study keeps its runs: when each was begun, and its record; and who runs a study in a folder."""

import json
import os
import re
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..errors import InputError
from ..files import write_whole
from .lines import LineStore, is_sealed
from .record import Record, Start

LOCK, DRIVER = "driver.lock", "driver.json"
LOCK_WAIT = 1.0  # seconds: `driver` holds the lock of a folder for a moment
EPOCHS, CURVE = b', "epochs": [', b', "curve": {'
KEY = re.compile(rb'\{"format": \d+, "key": ("(?:[^"\\]|\\.)*")')  # as a line begins
BEGUN = re.compile(KEY.pattern + rb', "host": ')  # that of a start


class RunStore:
    """The records of runs, in a `LineStore`. Beside them, a line says when and where a run was begun.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lines = LineStore(path)

    def read(self) -> list[Record]:
        """All whole records, in the order written.

        Raises:
            InputError: the file holds something else.
        """
        return [one for one in self._lines.read(_entry) if isinstance(one, Record)]

    def heads(self) -> list[Record | Start]:
        """Starts and records in the order written, the records without epochs, curve and what a study adds.

        Raises:
            InputError: the file holds something else.
        """
        return self._lines.read(_entry, before=EPOCHS)

    def record_heads(self) -> list[Record]:
        """Those of `heads` that are records. Of a start only the checksum is looked at.

        Raises:
            InputError: the file holds something else.
        """
        entries = self._lines.read(
            _entry, before=EPOCHS, wanted=lambda line: not (BEGUN.match(line) and is_sealed(line))
        )
        return [one for one in entries if isinstance(one, Record)]

    def outcomes(self) -> list[Record]:
        """All whole records, in the order written, without the curve and what a study adds.

        Raises:
            InputError: the file holds something else.
        """
        entries = self._lines.read(_entry, before=CURVE, wanted=lambda line: not BEGUN.match(line))
        return [one for one in entries if isinstance(one, Record)]

    def complete(self, outcomes: Iterable[Record]) -> list[Record]:
        """The same records with the curve and what a study adds, in the order written.

        Raises:
            InputError: the file holds something else.
        """
        known: dict[str, list[Record]] = {}
        for one in outcomes:
            known.setdefault(one.key, []).append(_bare(one))
        begin = {json.dumps(key).encode() for key in known}
        entries = self._lines.read(_entry, wanted=lambda line: (key := KEY.match(line)) is None or key[1] in begin)
        return [one for one in entries if isinstance(one, Record) and _bare(one) in known.get(one.key, ())]

    def append(self, record: Record) -> None:
        """Add one record; when this returns it is on the disk.

        Raises:
            InputError: the file cannot be written.
        """
        self._lines.append(record.to_json(), _entry)

    def start(self, key: str, where: str = "") -> None:
        """Write down that this process begins a run; when this returns it is on the disk.

        Args:
            key: of the run.
            where: it is made, if not in this process.

        Raises:
            InputError: the file cannot be written.
        """
        self._lines.append(vars(_here(key, where)), _entry)


@contextmanager
def lock_folder(folder: str | Path) -> Iterator[None]:
    """Inside, no other process runs a study in this folder. The lock goes when the process ends, however it ends.

    Raises:
        InputError: another one does, or the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=LOCK_WAIT)
    except Timeout:
        holder = driver(folder)
        who = f"process {holder.process} on {holder.host} runs a study there since {holder.started}" if holder else ""
        who = who or "another process runs a study there"
        raise InputError(f"{folder} is in use: {who}. Wait for its end, or choose another folder.") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror}. Choose another folder.") from error
    try:
        write_whole(folder / DRIVER, json.dumps(vars(_here())).encode())
        yield
    finally:
        (folder / DRIVER).unlink(missing_ok=True)
        lock.release()


def driver(folder: str | Path) -> Start | None:
    """Who runs a study in this folder now, and since when; None if nobody does."""
    folder = Path(folder)
    if not (folder / LOCK).exists():
        return None
    try:
        with FileLock(folder / LOCK).acquire(timeout=0):
            return None
    except (Timeout, OSError):  # a folder of another user's cannot be locked: believe the file
        pass
    try:
        return Start.from_json(json.loads((folder / DRIVER).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None


def _entry(values: Any) -> Record | Start:
    begun = isinstance(values, dict) and "started" in values and "status" not in values
    return Start.from_json(values) if begun else Record.from_json(values)


def _here(key: str = "", where: str = "") -> Start:
    """This process, now."""
    return Start(key, socket.gethostname(), os.getpid(), datetime.now(UTC).isoformat(timespec="seconds"), where)


def _bare(record: Record) -> Record:
    return replace(record, curve={}, more={})

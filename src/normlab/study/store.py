"""Where results are kept: one JSON object a line, appended as each run ends."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock

from ..errors import InputError
from .record import Record

T = TypeVar("T")

# Seconds between two tries of a process that waits for another's append.
LOCK_POLL = 0.002


class LineStore:
    """A file of JSON objects, one a line, that survives being killed at any moment.

    A line counts once it is whole. Each append is one write, flushed to the disk. If the process was killed in the
    middle of it, the last line has no end: the next append drops it. Numbers that are not finite are kept as null.

    Several processes may append at once. A lock, the file with `.lock` behind its name, lets in one at a time.

    Args:
        path: the file; its folder is made when the first line is written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self, make: Callable[[Any], T]) -> list[T]:
        """What `make` makes of each whole line, in the order written. The file is not changed.

        Raises:
            InputError: a line is not JSON, or `make` refuses it with a ValueError or TypeError.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [self._parse(make, number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def append(self, values: dict[str, Any]) -> None:
        """Add a line; when this returns it is on the disk.

        Raises:
            InputError: the file cannot be written.
        """
        line = json.dumps(_finite(values), allow_nan=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", poll_interval=LOCK_POLL), open(self.path, "a+b") as file:
                _drop_torn_line(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Choose another folder.") from error

    def _parse(self, make: Callable[[Any], T], number: int, line: bytes) -> T:
        try:
            return make(json.loads(line))
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{self.path}, line {number}, is not a record of a run ({error}). "
                "Move the file away or mend the line; it was not changed."
            ) from error


class RunStore:
    """The records of runs, in a `LineStore`.

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
        return self._lines.read(Record.from_json)

    def append(self, record: Record) -> None:
        """Add one record; when this returns it is on the disk.

        Raises:
            InputError: the file cannot be written.
        """
        self._lines.append(record.to_json())


def _drop_torn_line(file: BinaryIO) -> None:
    """Cut the file after its last line end, and go there. The whole file is read only where a line is torn."""
    size = file.seek(0, os.SEEK_END)
    if size:
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)


def _finite(value: Any) -> Any:
    """`value` with every float that is not finite replaced by None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

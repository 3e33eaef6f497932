"""Where results are kept: one JSON object a line, appended as each run ends."""

import json
import math
import os
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock

from ..errors import InputError
from ..files import write_whole

__all__ = ["Record", "RunStore", "write_whole"]

Record = dict[str, Any]

# Seconds between two tries of a process that waits for another's append.
LOCK_POLL = 0.002


class RunStore:
    """A file of JSON lines that survives being killed at any moment.

    A record counts once its line is whole: each append is one write, flushed to the disk. A last line without its end
    (the process was killed in the middle of it) is dropped by the next append. Any other line that is not a record is
    reported, with its number, and nothing is changed. Numbers that are not finite are kept as null.

    Several processes may append at once. A lock, the file with `.lock` behind its name, lets in one at a time.

    Args:
        path: the file; its folder is made when the first record is written.

    Raises:
        InputError: the file holds something else than records, or cannot be written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(self) -> list[Record]:
        """All whole records, in the order written."""
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")[:-1]
        return [self._parse(number, line) for number, line in enumerate(lines, 1) if line.strip()]

    def append(self, record: Record) -> None:
        """Add one record; when this returns it is on the disk."""
        line = json.dumps(_finite(record), allow_nan=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{self.path}.lock", poll_interval=LOCK_POLL), open(self.path, "a+b") as file:
                _drop_torn_line(file)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Choose another folder.") from error

    def _parse(self, number: int, line: bytes) -> Record:
        try:
            record = json.loads(line)
            if "settings" not in record or "status" not in record:
                raise ValueError("no settings or status")
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{self.path}, line {number}, is not a record of a run ({error}). "
                "Move the file away or mend the line; it was not changed."
            ) from error
        return record


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

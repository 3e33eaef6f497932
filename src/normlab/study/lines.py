"""A file of JSON objects, one a line, with a checksum each, that survives being killed at any moment."""

import gc
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from filelock import FileLock

from ..errors import InputError, check
from .record import BOUND

T = TypeVar("T")

# Seconds between two tries of a process that waits for another's append.
LOCK_POLL = 0.002
FORMAT = 2  # of a line; lines of the first one have neither format nor checksum
LONGEST = 1 << 24  # bytes of a line
DIGITS = 20  # of a whole number; seeds go so far

SEAL = b', "checksum": "%08x"}'
SEALED = re.compile(rb', "checksum": "[0-9a-f]{8}"\}')
SEAL_LENGTH = len(SEAL % 0)
# Control characters, which move a terminal's cursor, and halves of characters, which cannot be written.
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

CURE = "Move the file away or mend the line; it was not changed."


class LineStore:
    """A file of JSON objects, one a line, that survives being killed at any moment.

    A line counts once it is whole. Each append is one write, flushed to the disk. If the process was killed in the
    middle of it, the last line has no end: the next append drops it. Numbers that are not finite, or beyond 1e150,
    are kept as null.

    Each line ends in a checksum, so that a damaged one is noticed. Lines from before there were checksums are read.
    Several processes may append at once. A lock, the file with `.lock` behind its name, lets in one at a time.

    Args:
        path: the file; its folder is made when the first line is written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read(
        self,
        make: Callable[[Any], T],
        before: bytes | None = None,
        wanted: Callable[[bytes], bool] = lambda line: True,
    ) -> list[T]:
        """What `make` makes of each whole line, in the order written. The file is not changed.

        Args:
            make: gets the values of a line.
            before: how a field begins, such as `EPOCHS`. It and what comes behind it are left out of lines with a
                checksum, which is quicker.
            wanted: whether a line is looked at.

        Raises:
            InputError: a line is damaged, is not JSON, or `make` refuses it with a ValueError or TypeError; or the
                file cannot be read, or is of a newer version.
        """
        lines = ((number, line) for number, line in self._lines() if wanted(line))
        return [make_line(make, f"{self.path}, line {number},", line, before) for number, line in lines]

    def append(self, values: dict[str, Any], make: Callable[[Any], Any] = dict) -> None:
        """Add a line; when this returns it is on the disk.

        Args:
            values: of the line.
            make: must take the values of the last line, if that is whole but for its end.

        Raises:
            InputError: the file cannot be written, or ends in what is no line of it.
        """
        line = seal(values)
        if len(line) > LONGEST:
            raise InputError(f"{self.path}: a line of {len(line):,} bytes is too long. Keep it under {LONGEST:,}.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            check_file(self.path)
            with FileLock(f"{self.path}.lock", poll_interval=LOCK_POLL), open(self.path, "a+b") as file:
                self._go_to_end(file, make)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}. Choose another folder.") from error

    def _lines(self) -> Iterator[tuple[int, bytes]]:
        """Number and content of each line that is whole."""
        check_file(self.path)
        try:
            with open(self.path, "rb") as file:
                number = 0
                while line := file.readline(LONGEST + 1):
                    number += 1
                    if len(line) > LONGEST:
                        raise InputError(f"{self.path}, line {number}, is longer than {LONGEST:,} bytes. {CURE}")
                    if line.endswith(b"\n") or not _is_torn(line):
                        line = line.removesuffix(b"\n").removesuffix(b"\r")
                        if line:
                            yield number, line
        except FileNotFoundError:
            return
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror}. Choose another folder.") from error

    def _go_to_end(self, file: BinaryIO, make: Callable[[Any], Any]) -> None:
        """Drop a torn last line. More than the last byte is read only where the last line has no end."""
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return
        file.seek(max(0, size - LONGEST))
        last = file.read().rpartition(b"\n")[2]
        if _is_torn(last):
            file.truncate(size - len(last))
        else:
            make_line(make, f"{self.path}, last line,", last)
            file.write(b"\n")


def seal(values: dict[str, Any]) -> bytes:
    """The line of some values, with the format in front and a checksum at its end."""
    body = json.dumps({"format": FORMAT} | _finite(values), allow_nan=False)[:-1].encode()
    return body + SEAL % zlib.crc32(body) + b"\n"


@contextmanager
def uncollected() -> Iterator[None]:
    """Inside, Python looks for no garbage: among 10,000 records that takes a second, and finds none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def make_line(make: Callable[[Any], T], where: str, line: bytes, cut: bytes | None = None) -> T:
    """What `make` makes of the values of a line; `cut` begins what is not read of it.

    Raises:
        InputError: the line is damaged, or is not what it should be; it says `where`.
    """
    body = line[:-SEAL_LENGTH]
    sealed = is_sealed(line)
    try:
        values = _load_head(body, cut) if sealed and cut is not None and cut in body else None
        values = _load(line) if values is None else values
        version = values.pop("format", None) if isinstance(values, dict) else None
        if isinstance(version, int) and version > FORMAT:
            raise InputError(f"{where} is of a newer version of normlab, or damaged. Update normlab; {CURE}")
        if not sealed and (version is not None or (isinstance(values, dict) and "checksum" in values)):
            raise InputError(f"{where} is damaged: its checksum is another. {CURE} Without it, the run is made again.")
        if sealed:
            values.pop("checksum", None)
        return make(values)
    except InputError as error:
        if str(error).startswith(where):
            raise
        raise InputError(f"{where} is not a record of a run ({error}) {CURE}") from error
    except RecursionError:
        raise InputError(f"{where} is not a record of a run (it is nested too deep). {CURE}") from None
    except (ValueError, TypeError, OverflowError) as error:
        raise InputError(f"{where} is not a record of a run ({error}). {CURE}") from error


def is_sealed(line: bytes) -> bool:
    """Whether it ends in the checksum of the rest."""
    return line[-SEAL_LENGTH:] == SEAL % zlib.crc32(line[:-SEAL_LENGTH])


def check_file(path: Path) -> None:
    """Raise an InputError if something is there that is no file, such as a folder or a pipe."""
    check(path.is_file() or not path.exists(), "runs", str(path), "a file, or a path where nothing is yet")


def _is_torn(line: bytes) -> bool:
    """Whether it is the beginning of a line, without end: what a process leaves that is killed while it writes."""
    if not line.startswith(b'{"'[: len(line)]) or SEALED.search(line):
        return False
    try:
        json.loads(line)
    except ValueError:
        return True
    except RecursionError:
        return False
    return False


def _load_head(line: bytes, cut: bytes) -> Any:
    """The values of a line up to `cut`; None if that stands inside another value."""
    try:
        return _load(line[: line.index(cut)] + b"}")
    except ValueError:
        return None


def _load(line: bytes) -> Any:
    """The values of a line."""
    text = line.decode()
    if text.startswith("\ufeff"):
        raise ValueError("it begins with a byte order mark, BOM")
    values = DECODER.decode(text)
    return _harmless(values) if b"\\" in line or b"\x7f" in line or not text.isascii() else values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has {next(name for name in names if names.count(name) > 1)!r} twice")
    return values


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _whole(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"{digits[:12]}… has more than {DIGITS} digits")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refuse, parse_int=_whole)


def _harmless(value: Any) -> Any:
    """`value` with � for the characters in its texts that harm a terminal."""
    if isinstance(value, dict):
        return {HARMFUL.sub("�", key): _harmless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_harmless(item) for item in value]
    return HARMFUL.sub("�", value) if isinstance(value, str) else value


def _finite(value: Any) -> Any:
    """`value` with None for every float that is not finite, or beyond what is kept."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not -BOUND < value < BOUND:
        return None
    return value

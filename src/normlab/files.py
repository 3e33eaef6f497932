"""Files that are there whole or not at all."""

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from .errors import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, then rename, so that a reader never sees half a file; the folder is made if it is not there.

    Raises:
        InputError: it cannot be written.
    """
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")  # nobody else's
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise InputError(f"{path} cannot be written: {error.strerror}. Choose another folder.") from error
        raise


def check_writable(folder: Path) -> None:
    """Raise an InputError unless files can be made in `folder`, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"out={str(folder)!r} cannot be written: {error.strerror}. Choose another folder.") from error

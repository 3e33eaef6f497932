"""Files that are there whole or not at all."""

import contextlib
from pathlib import Path

from .errors import InputError


def write_whole(path: Path, content: bytes) -> None:
    """Write beside, then rename, so that a reader never sees half a file; the folder is made if it is not there.

    Raises:
        InputError: it cannot be written.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise InputError(f"{path} cannot be written: {error.strerror}. Choose another folder.") from error

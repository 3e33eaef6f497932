"""Files over HTTP: whole or not at all, and continued where an earlier attempt stopped."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import pooch
import requests
import urllib3
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from ..errors import InputError

TIMEOUT = (10, 30)  # seconds to connect, and without a byte
CHUNK = 1 << 16
LARGEST = 1 << 30  # bytes of a file; the data sets are much smaller


def cache_folder() -> Path:
    """Where downloads are kept: NORMLAB_CACHE, or the user's cache folder of this system."""
    return Path(os.environ.get("NORMLAB_CACHE") or pooch.os_cache("normlab")).expanduser()


def fetch(file_name: str, sha256: str, mirrors: Iterable[str], folder: str | Path, progress: bool = True) -> Path:
    """The path of a file with the given sum in `folder`, downloaded from the first mirror that delivers it.

    What arrives is kept in `<file_name>.part` until it is whole, and continued by the next mirror or the next call.
    A file already there with another sum is replaced, once the right one has arrived. Calls from several processes at
    once download it one time.

    Args:
        file_name: name of the file, on the mirrors and in `folder`.
        sha256: its sum, in hexadecimal digits.
        mirrors: addresses that end in a slash, tried in order.
        folder: where it goes, made if need be; named after the data set.
        progress: show a bar when standard error is a terminal.

    Raises:
        InputError: every mirror failed, or the folder cannot be written.
    """
    folder = Path(folder)
    path = folder / file_name
    try:
        if _has_sum(path, sha256):  # asked before the lock: this needs no right to write
            return path
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{file_name}.lock"):
            if not _has_sum(path, sha256):  # another process may have brought it meanwhile
                _from_first_good(mirrors, path, sha256, progress)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be used: {error}. Choose another cache folder with NORMLAB_CACHE."
        ) from error
    return path


def _has_sum(path: Path, sha256: str) -> bool:
    return path.is_file() and pooch.file_hash(str(path)) == sha256


def _from_first_good(mirrors: Iterable[str], path: Path, sha256: str, progress: bool) -> None:
    part = path.with_name(f"{path.name}.part")
    failures = []
    for url in (mirror + path.name for mirror in mirrors):
        try:
            if _continue(url, part, progress) and pooch.file_hash(str(part)) != sha256:
                part.unlink()  # perhaps what was there before is to blame
                _continue(url, part, progress)
        except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
            failures.append(f"\n  {url}: {error}")
            continue
        found = pooch.file_hash(str(part))
        if found == sha256:
            part.replace(path)
            return
        failures.append(f"\n  {url}: expected SHA-256 {sha256}, found {found} ({part.stat().st_size:,} bytes)")
        part.unlink()
    kept = f"\nWhat has arrived is kept in {part}; the next attempt goes on from there." if part.exists() else ""
    raise InputError(
        f"{path.name} could not be downloaded:{''.join(failures)}{kept}\n"
        f"Try again, or give a local copy: put it at FOLDER/{path.parent.name}/{path.name} "
        "and name FOLDER with --data-dir or NORMLAB_DATA."
    )


def _continue(url: str, part: Path, progress: bool) -> bool:
    """Add to `part` what it lacks, or all of it where the server cannot continue. Returns whether there was a part.

    Raises:
        ValueError: the file is larger than any of ours; or an address is none, to which the server leads.
    """
    have = part.stat().st_size if part.exists() else 0
    # Without "identity" some servers compress, or unpack, what should arrive byte for byte.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == requests.codes.requested_range_not_satisfiable:
            return True  # nothing is left to send; the sum tells whether that is right
        response.raise_for_status()
        continued = response.status_code == requests.codes.partial_content
        with open(part, "ab" if continued else "wb") as file:
            try:
                _save(response, file, progress)
            except _TooLarge:
                part.unlink()
                raise
    return continued


class _TooLarge(ValueError):
    pass


def _save(response: requests.Response, file: BinaryIO, progress: bool) -> None:
    """Write the body of an answer as it comes, and show how far it is."""
    have, told = file.tell(), response.headers.get("Content-Length", "")
    total = have + int(told) if told.isascii() and told.isdecimal() and len(told) < 20 else None
    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (progress and console.is_terminal)) as bar:
        task = bar.add_task(Path(file.name).stem, total=total, completed=have)
        for chunk in response.raw.stream(CHUNK, decode_content=False):
            file.write(chunk)
            if file.tell() > LARGEST:
                raise _TooLarge(f"more than {LARGEST:,} bytes came")
            bar.advance(task, len(chunk))

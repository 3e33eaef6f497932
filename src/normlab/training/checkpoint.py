"""Checkpoints: a fit that was killed goes on as if it had never stopped."""

import hashlib
import io
import os
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import InputError, check, is_real, is_whole
from .events import Callback

if TYPE_CHECKING:
    from .learner import Learner

HEAD = b"normlab checkpoint 1\n"  # and the SHA-256 of what follows
DIGITS = 64


class Checkpoint(Callback):
    """Keeps the state of a fit in a file: after each epoch, and within one every `batches` or `seconds`.

    The file is written beside and renamed, and the one before is kept as `name.previous.suffix`. So a process killed at
    any moment leaves a whole one. If the disk is full the fit goes on with a warning, and the last file stays.

        checkpoint = Checkpoint("run/last.ckpt", batches=500)
        learner = Learner(model, train, optimizer=optimizer, callbacks=[checkpoint])
        checkpoint.resume(learner)  # goes on where the file is, if there is one
        learner.fit(10)

    The fit that goes on gives the same weights, buffers, losses and metrics bit for bit, on the same machine and number
    of threads, and if no part of it draws random numbers that are not Python's, numpy's, torch's or a loader's. Workers
    of a DataLoader that stay (`persistent_workers`) draw others.

    Args:
        path: of the file.
        batches: training batches between two checkpoints within an epoch; None for no such.
        seconds: the same in seconds.

    Raises:
        InputError: an argument cannot be used.
    """

    order = 100  # after the callbacks whose state it saves

    def __init__(self, path: str | Path, batches: int | None = None, seconds: float | None = None):
        check(batches is None or is_whole(batches, 1), "batches", batches, "a whole number from 1, or None")
        check(seconds is None or (is_real(seconds) and seconds > 0), "seconds", seconds, "a number above 0, or None")
        self.path, self.batches, self.seconds = Path(path), batches, seconds

    def resume(self, learner: "Learner") -> bool:
        """Has the next fit of the learner go on from the file; whether there was one.

        Raises:
            InputError: the file, or what it holds, cannot be used.
        """
        if not self.path.exists():
            return False
        learner.load_state_dict(load_checkpoint(self.path))
        return True

    def begin_fit(self) -> None:
        self._last = time.monotonic()

    def after_batch(self) -> None:
        learner = self.learner
        if learner.training and learner._whole and self._is_due():
            self._save()

    def after_epoch(self) -> None:
        self._save()

    def _is_due(self) -> bool:
        if self.batches is not None and (self.learner.batch + 1) % self.batches == 0:
            return True
        if self.seconds is None:
            return False
        ranks = self.learner.ranks
        passed = time.monotonic() - self._last >= self.seconds
        return ranks.sum(passed and ranks.rank == 0) != [0]  # by the clock of the first process

    def _save(self) -> None:
        ranks = self.learner.ranks
        state = ranks.state_of(self.learner)
        try:
            if ranks.rank == 0:
                save_checkpoint(state, self.path)
        except OSError as error:
            warnings.warn(f"{self.path} could not be written: {error.strerror}. The one before is there.", stacklevel=2)
        self._last = time.monotonic()


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes a learner's state, whole or not at all; what was there becomes the previous one.

    Raises:
        OSError: it cannot be written; then all is as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            file.write(HEAD + hashlib.sha256(content).hexdigest().encode() + b"\n")
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            link = previous(path).with_name(path.name + ".link")
            link.unlink(missing_ok=True)
            os.link(path, link)
            link.replace(previous(path))
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


def previous(path: Path) -> Path:
    """Where the checkpoint before this one is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The state in a checkpoint. Nothing in the file is run.

    Raises:
        InputError: the file is cut, altered, foreign or of another version; it says so, and which file to try.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    found = _checked(content, path)
    try:
        return torch.load(io.BytesIO(found), weights_only=True)
    except Exception as error:  # whatever a foreign file makes of the reader
        raise _refused(path, "it holds more than tensors, numbers, text, lists and dicts") from error


def _checked(content: bytes, path: Path) -> bytes:
    if not content.startswith(HEAD[:19]):
        raise _refused(path, "it is no checkpoint of normlab's")
    if not content.startswith(HEAD):
        raise _refused(path, f"its format is {content[:40].splitlines()[0]!r}, that of another version")
    start = len(HEAD) + DIGITS + 1
    found = content[start:]
    if content[len(HEAD) : start] != hashlib.sha256(found).hexdigest().encode() + b"\n":
        raise _refused(path, "it was cut or altered: its checksum is another")
    return found


def _refused(path: Path, reason: str) -> InputError:
    other = previous(path)
    cure = f"The checkpoint before it is {other}." if other.exists() else "There is none before it: begin anew."
    return InputError(f"{path}: {reason}. {cure}")

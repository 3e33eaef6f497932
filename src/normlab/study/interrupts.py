"""Ctrl-C where it can be borne: between two steps of the driver, and never while it cleans up."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class HeldCtrlC:
    """While it is entered, Ctrl-C is noted, and raised where `check` is called or within `at_once`.

    So processes are never left half started, nor a clean-up half done, however often Ctrl-C is pressed. What was
    pressed and not raised yet is raised at the end. Where Ctrl-C is ignored, and outside of the main thread, which
    alone hears it, it changes nothing.
    """

    def __init__(self):
        self.pressed = False
        self._at_once = False
        self._before: Any = None

    def __enter__(self) -> "HeldCtrlC":
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, _leave if self.pressed and self._before is _interrupt else self._before)
        if kind is None:
            self.check()

    def check(self) -> None:
        """Raise a KeyboardInterrupt if Ctrl-C was pressed."""
        if self.pressed:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, the first Ctrl-C is raised as it is pressed: for a run in this process."""
        self._at_once = True
        try:
            self.check()
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._at_once:
            self._at_once = False
            raise KeyboardInterrupt


@contextmanager
def impatient_ctrl_c() -> Iterator[None]:
    """Inside, a second Ctrl-C ends the process at once; after a first one, the end does. The exit status is 130."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # it is ignored, or heard by somebody else
        yield
        return
    signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if signal.getsignal(signal.SIGINT) is _leave:
            _leave()  # Python takes a second to end by itself, and Ctrl-C would disturb it
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, _leave)
    raise KeyboardInterrupt


def _leave(*_: object) -> None:
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h")  # show the cursor, which a view of progress has hidden
    os._exit(130)

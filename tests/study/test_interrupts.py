"""Ctrl-C: held back where it would do harm, raised elsewhere, and a second one ends a command at once."""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from normlab.study.interrupts import HeldCtrlC

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


@pytest.fixture(autouse=True)
def python_hears_ctrl_c():
    """The tests may run where Ctrl-C is ignored, in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_raised_where_it_is_asked_for():
    with HeldCtrlC() as held:
        held.check()
        press()
        press()
        with pytest.raises(KeyboardInterrupt):
            held.check()
        held.pressed = False


def test_ctrl_c_that_nobody_asked_for_is_raised_at_the_end():
    with pytest.raises(KeyboardInterrupt), HeldCtrlC():
        press()


def test_another_error_goes_first():
    held = HeldCtrlC()
    with pytest.raises(ValueError, match="first"):
        _raise_after_ctrl_c(held)


def _raise_after_ctrl_c(held: HeldCtrlC) -> None:
    with held:
        press()
        raise ValueError("first")


def test_a_run_in_this_process_is_left_at_once_and_the_cleaning_up_is_not():
    reached = []
    with pytest.raises(KeyboardInterrupt):
        _press_twice(reached)
    assert reached == ["cleaned up"]


def _press_twice(reached: list[str]) -> None:
    with HeldCtrlC() as held:
        try:
            with held.at_once():
                press()
                reached.append("not left")
        finally:
            press()
            reached.append("cleaned up")


def test_where_ctrl_c_is_ignored_it_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with HeldCtrlC() as held:
        press()
        held.check()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_hears_nothing_of_it():
    heard = []
    thread = threading.Thread(target=lambda: heard.append(HeldCtrlC().__enter__().pressed))
    thread.start()
    thread.join()
    assert heard == [False]


@pytest.mark.parametrize(("presses", "everybody"), [(1, True), (2, False), (3, True)])
def test_ctrl_c_ends_a_comparison_at_any_moment(tmp_path, presses, everybody):
    """Without a traceback or a process that is left, also while the workers start."""
    draw = random.Random(presses)
    command = [sys.executable, "-m", "normlab.cli", "compare", "--images", "2000", "--norms", "batch", "none"]
    options = ["--batch-sizes", "2", "--seeds", "0", "1", "2", "--workers", "2", "--out", str(tmp_path / "out")]
    process = psutil.Popen([*command, *options], stdout=-1, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    while sum("spawn_main" in " ".join(one.cmdline()) for one in process.children()) < 2:
        time.sleep(0.01)
    children = process.children()
    time.sleep(draw.uniform(0, 3))
    for _ in range(presses):
        if process.poll() is None:
            (os.killpg if everybody else os.kill)(process.pid, signal.SIGINT)
            time.sleep(0.05)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert presses > 1 or "interrupted; what is done is kept" in said
    assert not psutil.wait_procs(children, timeout=30)[1]

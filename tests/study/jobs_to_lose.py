"""Runs for the tests of executors, in a file that every process can import."""

import os
import signal
import time
import uuid
from pathlib import Path

from normlab.study.record import Record


def kill_own_process(folder: Path, times: int, tell) -> Record:
    """End this process the first times, each of which leaves a mark."""
    if len(list(folder.glob("*.killed"))) < times:
        (folder / f"{uuid.uuid4()}.killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Record("killed", {}, "finished")


def leave_mark(folder: Path, number: int, tell) -> Record:
    """A run of a second, which writes on which node of a Ray cluster it began."""
    import ray

    (folder / f"{uuid.uuid4()}.began").write_text(ray.get_runtime_context().get_node_id())
    time.sleep(1)
    return Record(str(number), {}, "finished")

"""Where the time of training steps goes."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from ..errors import InputError, check, is_whole
from .events import Callback


class Profile(Callback):
    """Profiles some training batches with `torch.profiler`, and writes what it saw for a viewer of traces.

        profiler = Profile("trace.json")
        Learner(model, train, optimizer=optimizer, callbacks=[profiler]).fit(1)
        print(profiler.table())

    Open the file at https://ui.perfetto.dev. The other batches cost nothing.

    Args:
        path: of the trace, as JSON; `.json.gz` is compressed. None writes none.
        skip: training batches to leave out at first, while caches fill and kernels compile.
        batches: to profile.
        memory: note memory too.

    Raises:
        InputError: an argument cannot be used.
    """

    order = -100  # around what the others do

    def __init__(self, path: str | Path | None = None, skip: int = 5, batches: int = 10, memory: bool = False):
        check(path is None or isinstance(path, str | Path), "path", path, "a path such as 'trace.json', or None")
        check(is_whole(skip, 1), "skip", skip, "a whole number from 1")
        check(is_whole(batches, 1), "batches", batches, "a whole number from 1")
        self.path = None if path is None else Path(path)
        self.skip, self.batches, self.memory = skip, batches, memory
        self.profiler: profile | None = None

    def begin_fit(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(
            activities=activities,
            schedule=schedule(wait=self.skip - 1, warmup=1, active=self.batches, repeat=1),
            on_trace_ready=self._write,
            profile_memory=self.memory,
        )
        self.profiler.start()
        self._running = True

    def begin_validate(self) -> None:
        self._stop()  # of a shorter epoch: what follows are no training batches

    def after_batch(self) -> None:
        if self._running and self.profiler is not None:
            self.profiler.step()
            if self.profiler.step_num >= self.skip + self.batches:
                self._stop()

    def after_fit(self) -> None:
        self._stop()

    def table(self, rows: int = 15) -> str:
        """The operators that took the most time, most first.

        Raises:
            InputError: nothing was profiled.
        """
        averages = self.profiler.key_averages() if self.profiler is not None and self.profiler.profiler else []
        if not averages:
            raise InputError(f"Profile: nothing was profiled. Fit {self.skip + self.batches} training batches or more.")
        device = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        return averages.table(sort_by=device, row_limit=rows)  # pyright: ignore[reportAttributeAccessIssue]

    def _stop(self) -> None:
        if self.profiler is not None and self._running:
            self._running = False
            self.profiler.stop()

    def _write(self, profiler: profile) -> None:
        if self.path is not None and self.learner.ranks.rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(self.path))

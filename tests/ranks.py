"""Several processes of a test that speak to each other over gloo."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def run_ranks(script: str, count: int, folder: Path) -> list[Any]:
    """What `count` processes, each started as `script rank folder`, saved as `folder/rank.pt`."""
    settings = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    commands = [[sys.executable, script, str(rank), str(folder)] for rank in range(count)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=settings) for command in commands]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * count, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]

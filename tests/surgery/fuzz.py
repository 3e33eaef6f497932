"""More random trees than the tests try, by hand; goes on where it stopped.

    python tests/surgery/fuzz.py --seeds 0 200000 --append FILE [--processes 2]

Every line of the file is a stretch of seeds that was tried, with those that failed and why.
"""

import argparse
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from surgery.laws import obey

STRETCH = 100  # seeds a line


def attempt(start: int) -> dict[str, Any]:
    """The line of a stretch of seeds."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    failed = {}
    for seed in range(start, start + STRETCH):
        try:
            obey(seed)
        except Exception as error:  # whatever it is, a law is broken
            failed[seed] = f"{type(error).__name__}: {error}"[:500]
    return {"start": start, "tried": STRETCH, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs=2, type=int, default=(0, 200_000), metavar=("FROM", "TO"))
    parser.add_argument("--append", type=Path, required=True, metavar="FILE")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    lines = options.append.read_text().splitlines() if options.append.exists() else []
    done = {json.loads(line)["start"] for line in lines}
    starts = [start for start in range(*options.seeds, STRETCH) if start not in done]
    with ProcessPoolExecutor(options.processes) as pool, options.append.open("a") as file:
        for line in pool.map(attempt, starts):
            file.write(json.dumps(line) + "\n")
            file.flush()
            if line["failed"]:
                print(line["failed"], flush=True)
    lines = [json.loads(line) for line in options.append.read_text().splitlines()]
    print(sum(line["tried"] for line in lines), "trees,", sum(len(line["failed"]) for line in lines), "failures")


if __name__ == "__main__":
    main()

"""What `stop_beaten` costs and saves, in studies made up so that the truth is known.

    python benchmarks/stopping.py [--studies 4000]

Each study has two alike norms, five learning rates and six seeds. A run's accuracy is that of its rate, plus a part
that all runs with its seed share, plus a part of its own. Both parts have a deviation of 0.01.

1. The share of the runs that are not made, and of the settings that are stopped.
2. The share of norms whose best rate is stopped: the truly best one, or with alike rates the one with the best mean
   over all six seeds. Beside it, by how much the chosen rate is truly worse than the best, with and without stopping.
3. The share of studies that call one of the norms worse, with and without stopping.

Results go to results/stopping.jsonl.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from normlab.study.plan import Plan, Trial
from normlab.study.record import Record
from normlab.study.stopping import Rounds
from normlab.study.summary import summarize
from normlab.study.verdicts import compare_groups

OUT = Path(__file__).parent / "results" / "stopping.jsonl"
RATES, SEEDS, NORMS = [0.01, 0.03, 0.1, 0.3, 1.0], 6, ["group", "running"]
TRIALS = Plan(norms=NORMS, batch_sizes=[2], lrs=RATES, seeds=list(range(SEEDS))).trials()
DEVIATION = 0.01
CASES = {  # by how many deviations each rate is behind the best one; None for one that diverges
    "alike rates": (0, 0, 0, 0, 0),
    "two good rates, two bad ones, one that diverges": (8, 3, 0, 0.5, None),
    "rates a deviation apart": (2, 1, 0, 1, 2),
    "rates half a deviation apart": (1, 0.5, 0, 0.5, 1),
    "each rate far behind the next": (12, 6, 0, 6, 12),
}


def draw(rng: np.random.Generator, behind: tuple[float | None, ...]) -> dict[str, Record]:
    """All runs of a study, by key."""
    shared, own = rng.normal(size=SEEDS), rng.normal(size=len(TRIALS))
    return {trial.key: run(trial, shared[trial.seed] + x, behind) for trial, x in zip(TRIALS, own, strict=True)}


def run(trial: Trial, luck: float, behind: tuple[float | None, ...]) -> Record:
    loss = behind[RATES.index(trial.lr)]
    if loss is None:
        return Record(trial.key, trial.to_dict(), "diverged")
    epoch = {"epoch": 1, "valid": {"accuracy": 0.8 + DEVIATION * (luck - loss)}}
    return Record(trial.key, trial.to_dict(), "finished", epochs=[epoch])


def stopped_study(runs: dict[str, Record]) -> list[Record]:
    """The records of the study if settings that are beaten are stopped."""
    rounds = Rounds(TRIALS, [])
    waiting, records = list(rounds.first.ready), []
    while waiting:
        records.append(runs[waiting.pop()])
        step = rounds.end(records[-1])
        waiting += step.ready
        records += step.stopped
    return records


def told_apart(records: Iterable[Record]) -> bool:
    return any(verdict.apart for verdict in compare_groups(summarize(records)))


def chosen(records: Iterable[Record]) -> dict[str, float]:
    """The rate at which each norm is judged."""
    return {one.group.settings["norm"]: one.group.settings["lr"] for one in compare_groups(summarize(records))}


def measure(name: str, studies: int) -> dict:
    behind, rng = CASES[name], np.random.default_rng(0)
    loss = {rate: float(one or 0) for rate, one in zip(RATES, behind, strict=True)}
    saved = settings = lost = apart = apart_before = 0
    worse = worse_before = 0.0
    for _ in range(studies):
        runs = draw(rng, behind)
        all_runs, records = list(runs.values()), stopped_study(runs)
        stopped = {(one.settings["norm"], one.settings["lr"]) for one in records if one.status == "stopped"}
        best = chosen(all_runs) if not any(loss.values()) else dict.fromkeys(NORMS, RATES[behind.index(0)])
        saved += sum(one.status == "stopped" for one in records)
        settings += len(stopped)
        lost += len(stopped & best.items())
        worse += sum(loss[rate] for rate in chosen(records).values())
        worse_before += sum(loss[rate] for rate in chosen(all_runs).values())
        apart, apart_before = apart + told_apart(records), apart_before + told_apart(all_runs)
    norms = studies * len(NORMS)
    return {
        "rates": name,
        "deviations behind the best": behind,
        "runs not made": saved / studies / len(TRIALS),
        "settings stopped": settings / norms / len(RATES),
        "best rate stopped": lost / norms,
        "deviations lost by the choice": {"stopping": worse / norms, "all runs": worse_before / norms},
        "alike norms told apart": {"stopping": apart / studies, "all runs": apart_before / studies},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000)
    studies = parser.parse_args().studies
    rows = []
    for name in CASES:
        rows.append({"studies": studies, **measure(name, studies)})
        print(json.dumps(rows[-1]), flush=True)
    OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()

"""How often intervals and verdicts are right, in studies made up so that the truth is known.

    python benchmarks/intervals.py [--studies 4000]

First the share of studies whose interval covers the true mean: that of `normlab.study.statistics.interval`, Student's,
and scipy's percentile and BCa bootstrap. Then the share of studies of alike norms that call one of them worse, with
the correction over all pairs and, for comparison, over the pairs with the best alone. Results go to
results/intervals.jsonl.
"""

import argparse
import itertools
import json
import warnings
from pathlib import Path

import numpy as np
from scipy import stats

from normlab.study.statistics import holm, interval, paired_test

OUT = Path(__file__).parent / "results" / "intervals.jsonl"
DRAWS = {  # of runs' metrics, and their true mean
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "uniform": (lambda rng, n: rng.uniform(size=n), 0.5),
    "skewed: accuracy near 1, beta(20, 1)": (lambda rng, n: rng.beta(20, 1, size=n), 20 / 21),
    "very skewed: exponential": (lambda rng, n: rng.exponential(size=n), 1.0),
}


def student(x: np.ndarray) -> tuple[float, float]:
    return stats.t.interval(0.95, len(x) - 1, x.mean(), stats.sem(x))


def bootstrap(x: np.ndarray, method: str) -> tuple[float, float]:
    found = stats.bootstrap((x,), np.mean, method=method, n_resamples=999, rng=0).confidence_interval
    return found.low, found.high


def coverage(name: str, n: int, studies: int) -> dict:
    """The share of studies whose interval covers the mean; scipy's bootstraps on a tenth of them, as they are slow."""
    draw, truth = DRAWS[name]
    rng = np.random.default_rng(n)
    ways = {
        "normlab": lambda x: interval(list(x)),
        "Student": student,
        "percentile": lambda x: bootstrap(x, "percentile"),
        "BCa": lambda x: bootstrap(x, "BCa"),
    }
    counts = {way: [0, 0] for way in ways}
    for number in range(studies):
        x = draw(rng, n)
        for way, make in ways.items():
            if way in ("normlab", "Student") or number % 10 == 0:
                low, high = make(x)
                counts[way][0] += bool(low <= truth <= high)
                counts[way][1] += 1
    return {"case": name, "runs": n, "coverage": {way: hits / tried for way, (hits, tried) in counts.items()}}


def errors(norms: int, seeds: int, studies: int) -> dict:
    """The share of studies that call one of alike norms worse than the best, which is chosen by the same runs."""
    rng = np.random.default_rng(norms * 100 + seeds)
    wrong = {"all pairs": 0, "pairs with the best": 0}
    for _ in range(studies):
        values = rng.normal(size=(norms, seeds)) + rng.normal(size=seeds)
        runs = [dict(enumerate(row)) for row in values[np.argsort(-values.mean(1))]]
        pairs = list(itertools.combinations(range(norms), 2))
        found = [paired_test(runs[i], runs[j], 0.0) or 1.0 for i, j in pairs]
        corrected = holm(found)
        wrong["all pairs"] += any(p < 0.05 for (i, _), p in zip(pairs, corrected, strict=True) if i == 0)
        with_best = holm([p for (i, _), p in zip(pairs, found, strict=True) if i == 0])
        wrong["pairs with the best"] += min(with_best) < 0.05
    return {"norms": norms, "seeds": seeds, "wrong": {way: count / studies for way, count in wrong.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000)
    studies = parser.parse_args().studies
    warnings.filterwarnings("ignore", category=stats.DegenerateDataWarning)
    cases = [coverage(name, n, studies) for name in DRAWS for n in (3, 6, 10)]
    cases += [errors(norms, seeds, studies) for norms, seeds in ((2, 6), (3, 8), (5, 10), (6, 10))]
    for case in cases:
        print(json.dumps(case))
    OUT.write_text("".join(json.dumps({"studies": studies, **case}) + "\n" for case in cases))


if __name__ == "__main__":
    main()

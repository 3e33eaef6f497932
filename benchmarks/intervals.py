"""How often intervals and verdicts are right, in studies made up so that the truth is known.

    python benchmarks/intervals.py [--studies 4000]

1. The share of studies whose interval covers the true mean: that of `normlab.study.statistics.interval`, Student's, and
   scipy's percentile and BCa bootstrap.
2. The share of studies of alike norms that call one of them worse than the best, with the correction over all pairs
   and, for comparison, over the pairs with the best alone.
3. The share of studies that tell two norms apart with as many seeds as `seeds_to_tell` asks for.

Results go to results/intervals.jsonl.
"""

import argparse
import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import stats

from normlab.study.statistics import holm, interval, paired_test, seeds_to_tell

OUT = Path(__file__).parent / "results" / "intervals.jsonl"
Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
DRAWS: dict[str, tuple[Draw, float]] = {  # of runs' metrics, and their true mean
    "normal": (lambda rng, size: rng.normal(size=size), 0.0),
    "bounded: uniform": (lambda rng, size: rng.uniform(size=size), 0.5),
    "bounded, a little skewed: beta(5, 2)": (lambda rng, size: rng.beta(5, 2, size=size), 5 / 7),
    "bounded, skewed: beta(20, 1)": (lambda rng, size: rng.beta(20, 1, size=size), 20 / 21),
    "very skewed: exponential": (lambda rng, size: rng.exponential(size=size), 1.0),
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
        x = draw(rng, (n,))
        for way, make in ways.items():
            if way in ("normlab", "Student") or number % 10 == 0:
                low, high = make(x)
                counts[way][0] += bool(low <= truth <= high)
                counts[way][1] += 1
    return {"interval of": name, "seeds": n, "covers": {way: hits / tried for way, (hits, tried) in counts.items()}}


def alike(rng: np.random.Generator, norms: int, seeds: int) -> np.ndarray:
    return rng.normal(size=(norms, seeds)) + rng.normal(size=seeds)


def diverging(rng: np.random.Generator, norms: int, seeds: int) -> np.ndarray:
    return np.where(rng.uniform(size=(norms, seeds)) < 0.2, np.nan, 10 + alike(rng, norms, seeds))


def equal_means(rng: np.random.Generator, norms: int, seeds: int) -> np.ndarray:
    """The first norm's metric is skewed, and varies three times as much as that of the others."""
    values = alike(rng, norms, seeds)
    values[0] = 3 * (1 - rng.exponential(size=seeds))
    return values


def best_of_five(rng: np.random.Generator, norms: int, seeds: int) -> np.ndarray:
    """Each norm at the best of five settings, which is chosen by the same runs."""
    values = rng.normal(size=(norms, 5, seeds)) + rng.normal(size=seeds)
    return values[np.arange(norms), values.mean(2).argmax(1)]


def first_of_five(rng: np.random.Generator, norms: int, seeds: int) -> np.ndarray:
    """The first norm alone at the best of five settings."""
    values = best_of_five(rng, norms, seeds)
    values[1:] = rng.normal(size=(norms - 1, seeds))
    return values


CASES = {
    "alike": alike,
    "alike, one run in five diverges": diverging,
    "equal means, one skewed and wider": equal_means,
    "alike, each the best of 5 settings by the same runs": best_of_five,
    "alike, one the best of 5 settings by the same runs": first_of_five,
}


def errors(case: str, norms: int, seeds: int, studies: int) -> dict:
    """The share of studies that call one of alike norms worse than the best, which is chosen by the same runs."""
    rng = np.random.default_rng(norms * 100 + seeds)
    wrong = {"all pairs": 0, "pairs with the best": 0}
    pairs = list(itertools.combinations(range(norms), 2))
    for _ in range(studies):
        values = CASES[case](rng, norms, seeds)
        values = values[np.argsort(-np.nan_to_num(values).mean(1))]
        runs = [{seed: None if np.isnan(x) else float(x) for seed, x in enumerate(row)} for row in values]
        found = [paired_test(runs[i], runs[j], 0.0) or 1.0 for i, j in pairs]
        corrected = holm(found)
        wrong["all pairs"] += any(p <= 0.05 for (i, _), p in zip(pairs, corrected, strict=True) if i == 0)
        wrong["pairs with the best"] += min(holm([p for (i, _), p in zip(pairs, found, strict=True) if i == 0])) <= 0.05
    return {"norms": case, "number": norms, "seeds": seeds, "wrong": {way: n / studies for way, n in wrong.items()}}


def power(effect: float, tests: int, studies: int) -> dict:
    """The share of studies that tell two norms apart, with the seeds that the true effect and deviation ask for."""
    made = np.array([-1.0, 0.0, 1.0])  # deviation 1
    seeds = seeds_to_tell(list(made + effect), tests) or 0
    rng = np.random.default_rng(seeds)
    told = 0
    for _ in range(studies):
        apart = rng.normal(effect, 1.0, size=seeds)
        p = paired_test(dict(enumerate(apart)), dict.fromkeys(range(seeds), 0.0), 0.0)
        told += p is not None and p * tests <= 0.05
    return {"difference": effect, "tests": tests, "seeds_to_tell": seeds, "told": told / studies}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=4000)
    studies = parser.parse_args().studies
    warnings.filterwarnings("ignore", category=stats.DegenerateDataWarning)
    rows = [coverage(name, n, studies) for name in DRAWS for n in (3, 6, 10)]
    rows += [errors("alike", norms, seeds, studies) for norms, seeds in ((2, 6), (3, 8), (6, 10))]
    rows += [errors(case, norms, seeds, studies) for case in list(CASES)[1:] for norms, seeds in ((2, 10), (5, 10))]
    rows += [power(effect, tests, studies) for effect, tests in ((1.0, 1), (0.5, 1), (1.0, 10))]
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    OUT.write_text("".join(json.dumps({"studies": studies, **row}, ensure_ascii=False) + "\n" for row in rows))


if __name__ == "__main__":
    main()

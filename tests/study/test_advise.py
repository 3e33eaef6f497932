"""Advice: each number is that of the committed records, and what is not known is said to be so."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tyro
from rich.console import Console

from normlab.cli import Advise
from normlab.errors import InputError
from normlab.nn import NORMS
from normlab.study.advise import HOW, PRACTICE, advise
from normlab.study.evidence import COMMITTED, LEAST_SEEDS, make_cases, read_cases, to_json
from normlab.study.statistics import interval
from normlab.study.store import RunStore
from records import record

STUDIES = Path(__file__).parents[2] / "studies"


def lines(path):
    return [json.loads(line) for line in (STUDIES / path).read_text().splitlines()]


def by_seed(runs, **settings):
    """The last metric of each run with these settings, by its seed."""
    own = [run for run in runs if settings.items() <= run["settings"].items()]
    metric = own[0]["settings"].get("metrics", ["accuracy"])[0]
    return {
        run["settings"]["seed"]: run["epochs"][-1]["valid"][metric] if run["status"] == "finished" else None
        for run in own
    }


def best_setting(runs, norm):
    """The metric by seed at the setting with the best mean."""
    names = ("lr", "clip", "schedule")
    settings = {tuple(run["settings"][name] for name in names) for run in runs if run["settings"]["norm"] == norm}
    found = [by_seed(runs, norm=norm, **dict(zip(names, setting, strict=True))) for setting in settings]
    return max(found, key=lambda values: np.mean(list(values.values())))


def paired(one, other):
    seeds = [seed for seed in one if one[seed] is not None and other.get(seed) is not None]
    a, b = (np.array([values[seed] for seed in seeds]) for values in (one, other))
    return a.mean() - b.mean(), *interval(a - b), len(seeds)


def found(advice, rival, case):
    one = next(one for one in advice.evidence if one.rival == rival and case in one.case)
    return one.difference, *one.interval, one.seeds


# The committed studies


def test_the_evidence_is_what_the_studies_hold():
    spec = importlib.util.spec_from_file_location("evidence_of_studies", STUDIES / "evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert COMMITTED.read_text(encoding="utf-8") == to_json(module.all_cases()), "run python studies/evidence.py"
    assert len(read_cases()) >= 15


@pytest.mark.parametrize(("folder", "case"), [("confirm-mnist", "MNIST, the"), ("confirm-cifar10", "CIFAR-10")])
def test_classification_at_batch_2(folder, case):
    advice = advise("classification", 2)
    assert advice.norm == "running"
    runs = [run for run in lines(f"flagship/{folder}/runs.jsonl") if run["settings"]["batch_size"] == 2]
    expected = paired(best_setting(runs, "running"), best_setting(runs, "group"))
    assert found(advice, "group", case) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(("rival", "rate"), [("as is", 0.01), ("group", 0.003), ("running", 0.01)])
def test_fine_tuning_at_batch_2(rival, rate):
    advice = advise("classification", 2, pretrained=True)
    assert advice.norm == "running_instance, fitted"
    assert "fit=True" in advice.how
    runs = lines("finetune/confirm-camera/runs.jsonl")
    one, other = (by_seed(runs, norm=n, lr=lr, batch_size=2) for n, lr in ((advice.norm, 0.01), (rival, rate)))
    assert len(one) == len(other) == 5
    assert found(advice, rival, "camera") == pytest.approx(paired(one, other), abs=2e-6)


@pytest.mark.parametrize(
    ("folder", "pretrained", "rival"),
    [("standardised", False, "batch"), ("raw", False, "running"), ("few_raw", True, "group")],
)
def test_segmentation_at_batch_2(folder, pretrained, rival):
    advice = advise("segmentation", 2, pretrained=pretrained)
    assert advice.norm == ("instance" if pretrained else "running_instance")
    runs = lines(f"segmentation/confirm-{folder}/runs.jsonl")
    one, other = (by_seed(runs, norm=norm, batch_size=2) for norm in (advice.norm, rival))
    assert len(one) == len(other) == 6
    named = {"standardised": "made images, standardised", "raw": "made images of differing", "few_raw": "from standard"}
    assert found(advice, rival, named[folder]) == pytest.approx(paired(one, other), abs=2e-6)


def test_a_net_that_fails_is_no_rival_and_is_named():
    advice = advise("classification", 1, pretrained=True)
    as_is = next(one for one in advice.evidence if one.rival == "as is" and one.batch_size == 1)
    values = by_seed(lines("finetune/confirm-classes/runs.jsonl"), norm="as is", batch_size=1)
    assert set(values.values()) == {None}
    assert (as_is.failed, as_is.difference, as_is.interval) == (len(values), None, None)
    assert "5 of its runs failed" in str(as_is)


def test_batch_norm_where_nothing_is_told_apart_from_it():
    assert advise("classification", 32).norm == "batch"
    assert advise("classification", 8, pretrained=True).norm == "as is"


def test_the_weak_points_of_the_evidence_are_said():
    said = "\n".join(advise("classification", 2).caveats)
    assert "No runs of batch are kept for: CIFAR-10" in said
    assert "Fewer than 6" in said
    assert "AdamW" in said
    assert "measured at batch 2, not 4" in "\n".join(advise("classification", 4).caveats)


@pytest.mark.parametrize(
    ("task", "batch_size", "pretrained", "why"),
    [
        ("detection", 2, True, "No committed study has this."),
        ("classification", 4096, False, "None is within a factor of 2."),
    ],
)
def test_what_is_not_known_is_said(task, batch_size, pretrained, why):
    advice = advise(task, batch_size, pretrained=pretrained)
    assert (advice.norm, advice.how, advice.evidence) == (None, None, [])
    assert why in advice.why[0]
    assert PRACTICE[task] in advice.why
    assert "I do not know" in str(advice)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 32, 100, 512])
def test_every_advice_can_be_carried_out(batch_size, pretrained):
    advice = advise("classification", batch_size, pretrained=pretrained)
    assert advice.norm is None or advice.norm in {*NORMS, *HOW}
    assert (advice.norm is None) == (advice.how is None)
    assert all(len(case.norms) > 1 for case in read_cases())


# A study of one's own


def write(folder, runs):
    store = RunStore(folder / "runs.jsonl")
    for run in runs:
        store.append(run)
    return folder


def seeds(norm, mean, n=6, spread=0.002, **settings):
    return [record(mean + spread * (-1) ** seed, norm=norm, seed=seed, **settings) for seed in range(n)]


def test_ones_own_study_is_the_only_evidence(tmp_path):
    runs = [*seeds("group", 0.9), *seeds("running", 0.8), *seeds("batch", 0.7, lr=0.1), *seeds("batch", 0.6, lr=0.2)]
    advice = advise(batch_size=2, study=write(tmp_path, runs))
    assert advice.norm == "group"
    rivals = {one.rival: one.difference for one in advice.evidence}
    assert rivals == pytest.approx({"running": 0.1, "batch": 0.2})  # batch norm at its better rate
    assert {one.study for one in advice.evidence} == {str(tmp_path)}
    assert "several settings" in "\n".join(advice.caveats)


def test_a_norm_that_failed_once_is_not_advised(tmp_path):
    runs = [*seeds("instance", 0.95)[1:], record(status="diverged", step=3, norm="instance", seed=0)]
    advice = advise(batch_size=2, study=write(tmp_path, [*runs, *seeds("group", 0.9), *seeds("batch", 0.5)]))
    assert advice.norm == "group"


def test_less_can_be_better(tmp_path):
    other = {"metrics": ("loss",), "lower": True}
    runs = [*seeds("group", 0.9, **other), *seeds("running", 0.8, **other)]  # its loss is 3 · (1 − accuracy)
    advice = advise(batch_size=2, study=write(tmp_path, runs))
    assert advice.norm == "group"
    assert advice.evidence[0].difference == pytest.approx(0.3)


def test_data_sets_are_not_mixed(tmp_path):
    runs = [*seeds("group", 0.9), *seeds("running", 0.5), *seeds("group", 0.6, data="cifar10")]
    runs += [*seeds("running", 0.7, data="cifar10"), *seeds("batch", 0.2), *seeds("batch", 0.2, data="cifar10")]
    advice = advise(batch_size=2, study=write(tmp_path, runs))
    assert advice.norm == "group"  # behind by 0.1 at worst, where running is by 0.4
    assert {one.case for one in advice.evidence} == {"mnist, convnet", "cifar10, convnet"}
    assert "0.1000" in advice.why[0]


@pytest.mark.parametrize("n", range(1, LEAST_SEEDS))
def test_few_seeds_say_nothing(tmp_path, n):
    folder = write(tmp_path, [*seeds("group", 0.9, n), *seeds("running", 0.5, n)])
    advice = advise(batch_size=2, study=folder)
    assert advice.norm is None
    assert "three seeds" in advice.why[0]
    assert make_cases(RunStore(folder / "runs.jsonl").read(), "") == []


def test_a_folder_without_runs_is_an_error(tmp_path):
    with pytest.raises(InputError, match="with runs"):
        advise(study=tmp_path)


@pytest.mark.parametrize(
    ("task", "batch_size", "said"), [("segmentaton", 2, "segmentation"), ("detection", 0, "from 1")]
)
def test_bad_input_is_named(task, batch_size, said):
    with pytest.raises(InputError, match=said):
        advise(task, batch_size)


# The command


@pytest.mark.parametrize(
    ("options", "status", "said"), [("--task detection --pretrained", 1, "I do not know"), ("", 0, "running")]
)
def test_the_command_prints_the_advice(options, status, said, capsys):
    command = tyro.cli(Advise, args=[*options.split(), "--batch-size", "2"])
    assert command.run(Console()) == status
    assert said in capsys.readouterr().out.splitlines()[0]


def test_the_command_takes_ones_own_study(tmp_path, capsys):
    folder = write(tmp_path, [*seeds("group", 0.9), *seeds("running", 0.8)])
    assert tyro.cli(Advise, args=["--from", str(folder)]).run(Console(width=200)) == 0
    assert f"{folder} at batch 2: group" in capsys.readouterr().out

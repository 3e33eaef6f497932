"""The study of fine-tuning, with networks and images that are tiny."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from normlab.data import ImageData
from normlab.nn import NORMS, BatchNorm2d, FrozenBatchNorm2d, GroupNorm, RunningBatchNorm2d
from normlab.study.store import RunStore
from normlab.study.summary import summarize
from records import record

FILE = Path(__file__).parents[2] / "studies" / "finetune" / "study.py"


def images(name, data_dir, held_out):
    """Of two sets alike, with a mean for each class."""
    generator = torch.Generator().manual_seed(len(held_out))
    x, y = torch.rand(96, 1, 28, 28, generator=generator), torch.arange(96) % 10
    x = (x + y[:, None, None, None] / 5) / 3
    return ImageData(name, x[:64], y[:64], x[64:], y[64:], tuple("0123456789"))


@pytest.fixture
def study(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("finetune_study", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    small = {"TRAINED_ON": 32, "TRAINED_AT": 16, "TRAINED_EPOCHS": 1, "IMAGES": 8, "TO_CHOOSE": 16, "TO_JUDGE": 24}
    places = {"FOLDER": tmp_path, "NETWORKS": tmp_path / "networks", "STORE": RunStore(tmp_path / "results.jsonl")}
    for name, value in {**small, **places, "images_of": images}.items():
        monkeypatch.setattr(module, name, value)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_every_way_fine_tunes_the_trained_network(study):
    case = study.CASES["classes"]
    trained = study.train(case, None)
    assert trained.status == "finished"
    kept = {name: value.clone() for name, value in torch.load(study.network_file(case)).items()}
    for way in study.WAYS:
        run = study.fine_tune(study.settings("classes", way, 2, 0.001, 1), None)
        assert run.steps == 4
        assert 0 <= run.epochs[-1]["valid"]["accuracy"] <= 1
        study.STORE.append(run)
    assert len({run.curve["loss"][-1] for run in study.STORE.read()}) == len(study.WAYS)
    assert all(torch.equal(value, kept[name]) for name, value in torch.load(study.network_file(case)).items())


def test_a_way_changes_every_norm_and_nothing_else(study):
    kinds = {"as is": nn.BatchNorm2d, "running": RunningBatchNorm2d, "group": GroupNorm, "frozen": FrozenBatchNorm2d}
    for way, change in study.WAYS.items():
        model = study.new_network(study.CASES["camera"])
        before = [type(layer) for layer in model.modules()]
        assert nn.BatchNorm2d in before
        assert BatchNorm2d not in before
        change(model, torch.randn(4, 1, 28, 28))
        after = [type(layer) for layer in model.modules()]
        assert after == [kinds[way.split(",")[0]] if kind is nn.BatchNorm2d else kind for kind in before]


def test_a_new_last_layer_where_the_classes_are_others(study):
    for name, case in study.CASES.items():
        study.NETWORKS.mkdir(exist_ok=True)
        model = study.new_network(case)
        torch.save(model.state_dict(), study.network_file(case))
        again = study.trained_network(case)
        same = [torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True)]
        assert all(same[:-2])
        assert all(same[-2:]) == (name == "camera")


def test_a_seed_has_its_own_images_that_no_network_was_trained_on(study):
    case = study.CASES["classes"]
    used = study.normalized(images("mnist", None, "validation").x_train[:32], case, None)
    (one, _, to_choose, _), (other, _, to_judge, _) = (study.target_images(case, seed, None) for seed in (0, 1))
    assert len(one) == len(other) == 8
    assert len(to_choose) == 16
    assert len(to_judge) == 24
    assert not torch.equal(one, other)
    assert all(not torch.equal(image, seen) for image in one for seen in used)
    assert not any(torch.equal(image, judged) for image in to_choose for judged in to_judge)


@pytest.mark.parametrize(
    ("found", "next_rates"),
    [
        ({}, [0.001, 0.003, 0.01, 0.03]),
        ({0.001: 0.5, 0.003: 0.8, 0.01: 0.7, 0.03: 0.1}, []),
        ({0.001: 0.5, 0.003: 0.6, 0.01: 0.7, 0.03: 0.8}, [0.1]),
        ({0.001: 0.9, 0.003: 0.6, 0.01: 0.7, 0.03: 0.8}, [0.0003]),
        ({0.1: 0.5, 0.3: 0.6, 1.0: 0.7}, []),
        ({0.001: 0.0, 0.003: 0.0}, []),
    ],
)
def test_screening_goes_on_while_the_best_rate_is_at_the_edge(study, found, next_rates):
    runs = [record(score, lr=lr, norm="running", data="camera") for lr, score in found.items()]
    trials = study.to_screen(summarize(runs) if runs else [], "camera", "running", 2)
    assert [trial.lr for trial in trials] == next_rates
    assert {trial.seed for trial in trials} <= {0}


def test_the_best_rate_is_confirmed_on_other_seeds(study):
    runs = [record(score, lr=lr, norm="group", data="camera") for lr, score in ((0.003, 0.7), (0.01, 0.8))]
    trials = study.to_confirm(summarize(runs), "camera", "group", 2)
    assert {trial.lr for trial in trials} == {0.01}
    assert [trial.seed for trial in trials] == [1, 2, 3, 4, 5]
    assert study.to_confirm([], "camera", "group", 2) == []


def test_a_run_from_before_there_were_tasks_is_read_as_one_of_today(study):
    today = study.settings("camera", "frozen, recalibrated", 2, 0.01, 1)
    assert (today.norm, today.data, today.task) == ("frozen", "fashion_mnist", "camera: frozen, recalibrated")
    assert study.case_and_way(today) == ("camera", "frozen, recalibrated")
    assert {study.norm_of(way) for way in study.WAYS} <= set(NORMS)
    before = replace(today, task=None, data="camera", norm="frozen, recalibrated")
    study.STORE.append(record(0.7, **before.to_dict()))
    study.STORE.append(study.train(study.CASES["classes"], None))
    old, trained = study.kept_runs()
    assert (old.key, old.settings) == (today.key, today.to_dict())
    assert trained == study.STORE.read()[1]
    assert study.runs([1]) == [old]


def test_the_report_keeps_what_is_written_by_hand(study):
    for way, base in (("running", 0.8), ("group", 0.7)):
        for seed in range(6):
            chosen = study.settings("camera", way, 2, 0.01, seed).to_dict()
            study.STORE.append(replace(record(base + seed / 100, **chosen), more={"before": 0.2}))
    readme = study.FOLDER / "README.md"
    readme.write_text(f"Before.\n{study.BEGIN}\nold\n{study.END}\nAfter.\n")
    study.report()
    text = readme.read_text()
    assert text.startswith("Before.\n")
    assert text.endswith("After.\n")
    assert "old" not in text
    assert "| group | 0.01 | 0.2000 ±0.0000 | 0.7300 ±0.0158 | 0.7300 ±0.0158 | 0.1000 ±0.0000 |" in text
    assert "| running | 0.8000 |" in text
    assert "| running | 0.8300 ±0.0158 |" in text
    assert (study.FOLDER / "finetune.png").stat().st_size > 10_000

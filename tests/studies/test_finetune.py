"""The task of the study of fine-tuning, with networks and images that are tiny."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from normlab.data import ImageData
from normlab.errors import InputError
from normlab.nn import BatchNorm2d, build_norm
from normlab.study.named import find_named
from normlab.study.plan import Plan, Trial
from normlab.study.trial import run_trial

FOLDER = Path(__file__).parents[2] / "studies" / "finetune"


def images(name, held_out):
    """Of two sets alike, with a mean for each class."""
    generator = torch.Generator().manual_seed(len(held_out))
    x, y = torch.rand(128, 1, 28, 28, generator=generator), torch.arange(128) % 10
    x = (x + y[:, None, None, None] / 5) / 3
    return ImageData(name, x[:96], y[:96], x[96:], y[96:], tuple("0123456789"))


@pytest.fixture
def task(tmp_path, monkeypatch):
    module = sys.modules[find_named("model", f"{FOLDER / 'task.py'}:Case").__module__]
    small = {"TRAINED_ON": 64, "IMAGES": 8, "TO_CHOOSE": 16, "TO_JUDGE": 24, "VALID_BATCH": 8}
    for name, value in {**small, "NETWORKS": tmp_path / "networks", "images_of": images}.items():
        monkeypatch.setattr(module, name, value)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


def test_every_way_fine_tunes_the_trained_network(task, monkeypatch):
    own = {name: f"{FOLDER / 'task.py'}:classes_{name}" for name in ("model", "data")}
    with pytest.raises(InputError, match=r"mnist-convnet\.pt is missing\. Train it: python studies/finetune/task\.py"):
        run_trial(Trial("running", 2, 0.001, 1, **own))
    monkeypatch.chdir(FOLDER.parents[1])  # plans name the task from there
    monkeypatch.setattr(task, "CASES", {"classes": task.CLASSES})
    task.main()
    kept = {name: value.clone() for name, value in torch.load(task.CLASSES.file).items()}
    runs = [run_trial(Trial(way, 2, 0.001, 1, **own)) for way in task.WAYS]
    assert {(run.status, run.steps) for run in runs} == {("finished", 4)}
    assert len({run.curve["loss"][-1] for run in runs}) == len(task.WAYS)
    assert all(torch.equal(value, kept[name]) for name, value in torch.load(task.CLASSES.file).items())
    with pytest.raises(InputError, match=r"norm='runing' is unknown. Did you mean 'running'"):
        run_trial(Trial("runing", 2, 0.001, 1, **own))


def test_a_way_changes_every_norm_and_nothing_else(task):
    for way in task.WAYS:
        model = task.CAMERA.make_untrained()
        before = [type(layer) for layer in model.modules()]
        assert nn.BatchNorm2d in before
        assert BatchNorm2d not in before
        task.change(model, way, torch.randn(4, 1, 28, 28))
        after = [type(layer) for layer in model.modules()]
        to = way.split(",")[0]
        there = nn.BatchNorm2d if to == "as is" else type(build_norm(to, 4))
        assert after == [there if kind is nn.BatchNorm2d else kind for kind in before]


def test_a_new_last_layer_where_the_classes_are_others(task):
    task.NETWORKS.mkdir()
    for name, case in task.CASES.items():
        model = case.make_untrained()
        torch.save(model.state_dict(), case.file)
        same = [torch.equal(*both) for both in zip(model.parameters(), case.trained().parameters(), strict=True)]
        assert all(same[:-2])
        assert all(same[-2:]) == (name == "camera")


@pytest.mark.parametrize("name", ["camera", "classes"])
def test_a_seed_has_its_own_images_that_no_network_was_trained_on(task, name):
    case = task.CASES[name]
    used = case.make_source(8, 0)[0].dataset.x
    (one, _, to_choose, _), (other, _, to_judge, _) = (case.images(seed) for seed in (0, 1))
    assert (len(one), len(other), len(to_choose), len(to_judge)) == (8, 8, 16, 24)
    assert torch.equal(one, case.images(0)[0])
    assert not torch.equal(one, other)
    assert all(not torch.equal(image, seen) for image in one for seen in used)
    assert not any(torch.equal(image, judged) for image in to_choose for judged in to_judge)


def test_the_networks_are_trained_as_their_plans_say(task):
    for name in task.CASES:
        (trial,) = Plan.read(FOLDER / f"train-{name}" / "plan.toml").trials()
        assert (trial.optimizer, trial.epochs, trial.batch_size) == ("momentum", 5, 64)
        assert trial.model.endswith(f"task.py:{name}_untrained")


def test_the_tables_are_those_of_the_runs():
    tables = find_named("tables", f"{FOLDER / 'tables.py'}:tables")()
    assert tables in (FOLDER / "README.md").read_text()

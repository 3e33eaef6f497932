"""A model of the user's own, by name, and what is said of names and files that are no good."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from normlab.errors import InputError
from normlab.study.subject import of_run, of_user

NETS = """
from torch import nn, randn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

net = make()
batches = [randn(2, 3, 4, 4)]
loss = nn.MSELoss()

def more():
    yield from batches

number = 5
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


@pytest.mark.parametrize("module", ["nets", "nets.py"])
def test_a_model_is_named_by_module_or_file_as_it_is_or_by_what_makes_it(module):
    for model, batches in (("make", "batches"), ("net", "more")):
        subject = of_user(f"{module}:{model}", f"{module}:{batches}", None, f"{module}:loss")
        assert subject.model(next(iter(subject.batches))).shape == (2, 4, 4, 4)
        assert subject.loss is not None


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_are_loaded(here, suffix):
    state = {
        name: part + 1 for name, part in of_user("nets:net", "nets:batches", None, None).model.state_dict().items()
    }
    (torch.save if suffix == ".pt" else save_file)(state, here / f"weights{suffix}")
    model = of_user("nets:make", "nets:batches", here / f"weights{suffix}", None).model
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_that_are_no_weights_are_named(here, suffix):
    path = here / f"weights{suffix}"
    with pytest.raises(InputError, match=f"weights.*{path.name}.*cannot be read"):
        of_user("nets:make", "nets:batches", path, None)
    path.write_bytes(b"hi\n")
    with pytest.raises(InputError, match=f"weights.*{path.name}.*damaged"):
        of_user("nets:make", "nets:batches", path, None)
    (torch.save if suffix == ".pt" else save_file)({"other": torch.zeros(2)}, path)
    with pytest.raises(InputError, match=f"weights.*{path.name}.*another model"):
        of_user("nets:make", "nets:batches", path, None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nets", r"model='nets'.*module:name"),
        ("nowhere:make", r"model='nowhere:make' cannot be imported: No module"),
        ("nowhere.py:make", r"model='nowhere.py:make' cannot be imported"),
        ("nets:mkae", r"model='nets:mkae' is unknown. Did you mean 'nets:make'"),
        ("nets:batches", r"model='nets:batches'"),
        ("nets:more", r"model='nets:more'.*torch.nn.Module"),
    ],
)
def test_names_of_no_model_are_named(name, message):
    with pytest.raises(InputError, match=message):
        of_user(name, "nets:batches", None, None)


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ("nets:number", None, r"batches='nets:number'.*Accepted: module:name of the thing itself"),
        ("nets:batches", "nets:number", r"loss='nets:number'.*function of output and target"),
    ],
)
def test_what_is_no_iterable_or_no_function_is_named(batches, loss, message):
    with pytest.raises(InputError, match=message):
        of_user("nets:make", batches, None, loss)


@pytest.mark.parametrize("name", ["nets.py:make", "nets:make"])
def test_a_model_without_batches_is_not_blamed(name):
    with pytest.raises(InputError, match=f"batches is missing: {name}, a model of your own, needs --batches"):
        of_run(Path(name), None, None)


def test_a_folder_without_a_run_is_named(here):
    with pytest.raises(InputError, match=r"model=.*normlab train"):
        of_run(here, None, None)

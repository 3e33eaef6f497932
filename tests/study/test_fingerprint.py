"""What makes a run: changed code, data, versions or threads are told, and nothing else is."""

import shutil
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from normlab.study import fingerprint as room
from normlab.study.fingerprint import CHANGING, differences, fingerprint, is_made_by
from normlab.study.plan import Trial
from normlab.study.record import Record

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

import parts.layers
from helper import scale

def make_model():
    import later
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

def make_data(seed):
    x = scale * torch.arange(64.0).view(16, 4)
    return TensorDataset(x, torch.zeros(16, dtype=torch.long)), TensorDataset(x[:4], torch.zeros(4, dtype=torch.long))

def no_two_alike():
    import os
    x = torch.tensor(list(os.urandom(64))).view(16, 4) * 1.0
    return TensorDataset(x, x), TensorDataset(x, x)

def of_chance():
    x = torch.randn(16, 4)
    return TensorDataset(x, x), TensorDataset(x, x)

def of_dicts(batch_size):
    batches = [{"image": torch.ones(batch_size, 1), "name": ["a"] * batch_size, "more": (1, None, {"b": object()})}]
    return batches, batches
"""
FILES = {
    "task.py": TASK,
    "helper.py": "scale = 1.0\n",
    "later.py": "from parts import deep\n",
    "parts/__init__.py": "",
    "parts/layers.py": "from . import sizes\nfrom .deep.inner import one\n",
    "parts/sizes.py": "",
    "parts/deep/__init__.py": "",
    "parts/deep/inner.py": "one = 1\n",
    "notes.py": "",
}

TOP = {name.partition("/")[0].removesuffix(".py") for name in FILES}


@pytest.fixture
def told(tmp_path, monkeypatch):
    """Tells the fingerprint of a trial with the code of the user's that lies in a folder, as a new process does."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    write(tmp_path)

    def tell(place: str = ".", **settings) -> dict[str, str]:
        settings = settings or {"model": "task:make_model", "data": "task:make_data"}
        monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.startswith(str(tmp_path))])
        monkeypatch.chdir(tmp_path / place)
        for name in list(sys.modules):
            if name.partition(".")[0] in TOP:  # of an earlier folder, or of another test
                monkeypatch.delitem(sys.modules, name)
        room._code_of.cache_clear()
        room._data.cache_clear()
        return fingerprint(Trial(batch_size=2, **settings), threads=1)

    yield tell
    room._code_of.cache_clear()
    room._data.cache_clear()


def write(folder: Path) -> None:
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)


def changed(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def test_a_change_of_any_file_that_is_imported_is_told_and_of_no_other(told, tmp_path):
    before = told()
    assert before == told()
    assert before["own"]
    (tmp_path / "notes.py").write_text("# changed\n")
    assert told() == before
    for name in ("task.py", "later.py", "parts/sizes.py", "parts/deep/__init__.py", "parts/deep/inner.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        assert changed(before, told()) == {"own"}, name
        write(tmp_path)
    (tmp_path / "helper.py").write_text("scale = 20.0\n")
    assert changed(before, told()) == {"own", "data"}


def test_a_file_is_followed_as_a_module_is(told, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    settings = {"model": f"{tmp_path}/task.py:make_model", "data": "../task.py:make_data"}
    before = told("elsewhere", **settings)
    (tmp_path / "parts" / "sizes.py").write_text("# changed\n")
    assert changed(before, told("elsewhere", **settings)) == {"own"}


def test_of_installed_packages_the_version_is_told(told, tmp_path):
    assert "packages" not in told()
    (tmp_path / "task.py").write_text(f"{TASK}\nimport rich.table\nimport json, torch\n")
    assert told()["packages"] == f"rich {version('rich')}"
    found = told(model="torch.nn:Identity", optimizer="rich.console:Console")
    assert found["packages"] == f"rich {version('rich')}"
    assert "own" not in found


def test_data_that_are_others_each_time_are_told_so_and_equal_ones_are_equal(told):
    assert told(data="task:no_two_alike")["data"] == CHANGING
    chance = told(data="task:of_chance")["data"]
    assert chance == told(data="task:of_chance")["data"] != CHANGING
    dicts = told(data="task:of_dicts")["data"]
    assert dicts == told(data="task:of_dicts", seed=3)["data"] != CHANGING
    assert len({chance, dicts, told(data="task:make_data")["data"]}) == 3


def test_what_is_built_in():
    found = fingerprint(Trial(), threads=3)
    assert {name: found[name] for name in ("normlab", "torch")} == {
        name: version(name) for name in ("normlab", "torch")
    }
    assert found["threads"] == "3"
    assert len(found["code"]) == len(found["data"]) == 12
    assert found == fingerprint(Trial(seed=1, lr=0.1, norm="batch", batch_size=8), threads=3)
    assert fingerprint(Trial())["threads"] == str(torch.get_num_threads())


def test_kernels_that_were_compiled_of_other_code_are_others(monkeypatch):
    before = room._kernels()
    monkeypatch.setattr(room.cpu, "kernels", SimpleNamespace(code="of before"))
    assert room._kernels() != before
    monkeypatch.setattr(room.cpu, "kernels", None)
    assert room._kernels() == room.cpu.PATH


def test_the_code_of_each_room_that_trains_counts(monkeypatch, tmp_path):
    copy = tmp_path / "normlab"
    shutil.copytree(room.NORMLAB, copy, ignore=shutil.ignore_patterns("mnist", "csrc", "*.so", "__pycache__"))
    monkeypatch.setattr(room, "NORMLAB", copy)
    before = room._code.__wrapped__()
    for name in ("report.py", "record.py"):
        (copy / "study" / name).write_text("# changed")
        assert room._code.__wrapped__() == before
    for name in ("nn/running.py", "training/learner.py", "study/trial.py", "data/loaders.py", "choice.py"):
        whole = (copy / name).read_bytes()
        (copy / name).write_bytes(whole + b"# changed\n")
        assert room._code.__wrapped__() != before, name
        (copy / name).write_bytes(whole)


def test_a_record_is_of_the_run_that_its_fingerprint_tells():
    here = fingerprint(Trial(), threads=1)
    record = Record("a", {}, "finished", made_by=here, versions={"torch": "other"})
    assert is_made_by(record, here)
    assert differences(record, here | {"threads": "2", "code": "other"}) == ["threads", "code"]
    assert differences(record, {name: here[name] for name in here if name != "data"}) == ["data"]
    assert differences(replace(record, made_by={}), here) == ["torch"]


def test_of_an_older_record_the_versions_count():
    here = fingerprint(Trial(), threads=1)
    versions = {name: here[name] for name in ("python", "normlab", "torch", "numpy")}
    assert is_made_by(Record("a", {}, "finished", versions=versions), here)
    assert not is_made_by(Record("a", {}, "finished"), here)

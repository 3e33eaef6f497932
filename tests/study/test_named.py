"""A user's files are loaded as Python loads them, and an error of theirs is told with their line."""

import sys

import pytest

from normlab.errors import InputError
from normlab.study.named import explain_failure, find_named, make_named


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


def test_a_file_may_import_its_neighbour(here):
    (here / "blocks_beside.py").write_text("width = 8\n")
    (here / "nets_a.py").write_text("from blocks_beside import width\n")
    assert find_named("model", f"{here}/nets_a.py:width") == 8


def test_a_file_may_have_a_dataclass_with_annotations_as_text(here):
    text = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    (here / "config_b.py").write_text(f"{text}@dataclass\nclass Config:\n    width: int = 8\n")
    assert find_named("model", f"{here}/config_b.py:Config")().width == 8


def test_a_file_is_run_once_so_that_its_classes_are_one(here):
    (here / "nets_c.py").write_text("class Net: pass\nmade = Net()\n")
    net = find_named("model", f"{here}/nets_c.py:Net")
    assert type(find_named("batches", f"{here}/nets_c.py:made")) is net


def test_a_file_that_is_called_as_a_module_of_python_is_the_users(here):
    import random

    (here / "random.py").write_text("width = 3\n")
    assert find_named("model", f"{here}/random.py:width") == find_named("model", f"{here}/random.py:width") == 3
    assert sys.modules["random"] is random


def test_a_folder_with_a_space_and_a_name_with_a_dash_are_fine(here):
    (here / "my nets").mkdir()
    (here / "my nets" / "my-net.v2.py").write_text("width = 3\n")
    assert find_named("model", f"{here}/my nets/my-net.v2.py:width") == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\nraise ValueError('a [/x] of theirs')\n", "line 2: ValueError: a [/x] of theirs."),
        ("x = 1 +\n", "line 1: SyntaxError: invalid syntax"),
        ("\nimport not_there\n", "line 2: No module named 'not_there'."),
        ("from .beside import x\n", "line 1: attempted relative import"),
        ("import sys\nsys.exit('usage: train')\n", "line 2: SystemExit: usage: train."),
        ("import json\njson.loads('{')\n", "line 2: JSONDecodeError"),
    ],
)
def test_a_file_that_fails_is_told_with_its_line(here, text, said):
    path = here / "broken_d.py"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        find_named("model", f"{path}:make")
    assert str(error.value).startswith(f"model='{path}:make' cannot be imported: {path}, {said}")
    assert "broken_d" not in sys.modules, "mended, it is loaded anew"


def test_a_module_that_fails_is_told_with_its_line(here, monkeypatch):
    monkeypatch.chdir(here)
    (here / "broken_e.py").write_text("\n\n1 / 0\n")
    with pytest.raises(InputError, match=r"broken_e.py, line 3: ZeroDivisionError: division by zero\.$"):
        find_named("model", "broken_e:make")


def test_a_function_that_fails_is_told_with_its_line(here):
    (here / "nets_f.py").write_text("def make():\n    raise OSError('no disk')\ndef more(n): pass\n")
    name = f"{here}/nets_f.py:make"
    with pytest.raises(InputError, match=r"^model='.*:make' failed: .*nets_f.py, line 2: OSError: no disk\.$"):
        make_named("model", name, find_named("model", name))
    with pytest.raises(InputError, match=r"more' failed: TypeError: more.* missing 1 required positional argument"):
        make_named("model", "nets_f:more", find_named("model", f"{here}/nets_f.py:more"))


def test_ctrl_c_in_the_users_code_is_ctrl_c():
    with pytest.raises(KeyboardInterrupt), explain_failure("model failed"):
        raise KeyboardInterrupt


def test_a_name_that_is_not_there_is_answered_with_those_that_the_file_made(here):
    """Also things that no class or function of the file is the type of, such as a model; not what it imported."""
    text = "from functools import partial\nimport math\nfrom fractions import Fraction\n"
    (here / "nets_z.py").write_text(f"{text}net = Fraction(1)\ndef make(): pass\n_hidden = 1\n")
    with pytest.raises(InputError, match=r"Did you mean '.*:net'\? Accepted: \S*:net, \S*:make\.$"):
        find_named("model", f"{here}/nets_z.py:nett")

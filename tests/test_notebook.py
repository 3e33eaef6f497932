"""A module from a notebook: which cells, which file, and which notebook when it is not named."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import normlab
from normlab.errors import InputError
from normlab.lesson import nb_auto_export
from normlab.notebook import export_notebook, running_notebook

SOURCE_FOLDER = str(Path(normlab.__file__).parents[1])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """The working directory of each test; no front end that says which notebook runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return tmp_path


def write(name: str, *cells: str, folder: Path = Path()) -> Path:
    """A notebook of these code cells, after one of text."""
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_markdown_cell("#export is only said here"),
        *map(nbformat.v4.new_code_cell, cells),
    ]
    path = folder / name
    nbformat.write(notebook, path)
    return path


def load(module: Path):
    spec = importlib.util.spec_from_file_location(module.stem, module)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


# --- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mark", ["#export", "# export", "#|export", "#| export", "# | export  ", "\n#export", "  #export"]
)
def test_marked_cells_become_a_module(mark):
    write("07_norms.ipynb", f"{mark}\na = 1", "a = 2", f"{mark}\ndef double(x):\n    return x * a * 2\n")
    module = export_notebook("07_norms.ipynb")
    assert module == Path("exp/nb_07.py")
    assert module.read_text() == (
        "# Made from 07_norms.ipynb by its #export cells; edit the notebook instead.\n\n"
        "a = 1\n\ndef double(x):\n    return x * a * 2\n"
    )
    assert load(module).double(3) == 6


@pytest.mark.parametrize(
    "cell", ["a = 2", "#exports\na = 2", "a = 2  #export", "a = 2\n#export", "#exporting\na = 2", ""]
)
def test_other_cells_do_not(cell):
    write("07_norms.ipynb", "#export\na = 1", cell)
    assert load(export_notebook("07_norms.ipynb")).a == 1


@pytest.mark.parametrize(
    ("name", "module"),
    [("07_batchnorm.ipynb", "nb_07"), ("05b_early.ipynb", "nb_05b"), ("12_a_b.ipynb", "nb_12"), ("3_x.ipynb", "nb_3")],
)
def test_the_module_is_named_by_the_number(name, module, tmp_path):
    assert export_notebook(write(name, "#export\na = 1", folder=tmp_path)) == tmp_path / "exp" / f"{module}.py"


def test_a_second_export_replaces_the_first_and_leaves_nothing_beside():
    write("07_norms.ipynb", "#export\na = 1")
    export_notebook("07_norms.ipynb")
    write("07_norms.ipynb", "#export\nα = 'δ'")
    assert load(export_notebook("07_norms.ipynb")).α == "δ"
    assert [file.name for file in Path("exp").iterdir()] == ["nb_07.py"]


def test_a_source_of_lines_is_read_too():
    cell = {"cell_type": "code", "source": ["#export\n", "a = 1\n", "b = 2"]}
    Path("07_norms.ipynb").write_text(json.dumps({"cells": [cell]}))
    assert load(export_notebook("07_norms.ipynb")).b == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("norms.ipynb", "{}", r"notebook='norms.ipynb' is not usable. Accepted: a name like 07_batchnorm.ipynb"),
        ("07_norms.py", "{}", r"notebook='07_norms.py' is not usable"),
        ("07_norms.ipynb", None, r"notebook='07_norms.ipynb' does not exist. Accepted: the path of a notebook"),
        ("07_norms.ipynb", "a = 1", r"notebook='07_norms.ipynb' is not a notebook \(JSONDecodeError"),
        ("07_norms.ipynb", "[]", r"notebook='07_norms.ipynb' is not a notebook \(TypeError"),
        ("07_norms.ipynb", "{}", r"notebook='07_norms.ipynb' is not a notebook \(KeyError: 'cells'\)"),
        ("07_norms.ipynb", '{"cells": []}', r"Accepted: a notebook with cells whose first line is #export"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_writes_nothing(name, content, message):
    if content is not None:
        Path(name).write_text(content)
    with pytest.raises(InputError, match=message):
        export_notebook(name)
    assert not Path("exp").exists()


# --- which notebook -------------------------------------------------------------------------------------------------


def test_the_notebook_that_is_named(capsys, tmp_path):
    write("07_norms.ipynb", "#export\na = 1")
    write("08_data.ipynb", "#export\na = 2")
    nb_auto_export("08_data.ipynb")
    assert capsys.readouterr().out == "Converted 08_data.ipynb to exp/nb_08.py\n"
    other = tmp_path / "other"
    other.mkdir()
    nb_auto_export(write("09_more.ipynb", "#export\na = 3", folder=other))
    assert load(Path("exp/nb_08.py")).a == 2
    assert load(other / "exp" / "nb_09.py").a == 3
    assert not Path("exp/nb_07.py").exists()


def test_in_a_script_the_only_one_with_a_number_and_marked_cells():
    write("07_norms.ipynb", "#export\na = 1")
    write("08_data.ipynb", "a = 2")
    write("notes.ipynb", "#export\na = 2")
    Path("09_broken.ipynb").write_text("not a notebook")
    assert running_notebook() == Path.cwd() / "07_norms.ipynb"


def test_in_a_script_without_one(tmp_path):
    with pytest.raises(InputError, match=rf"Cannot tell which notebook of {tmp_path.name}/ this is \(none there\)"):
        nb_auto_export()


def test_in_a_script_beside_several():
    write("07_norms.ipynb", "#export\na = 1")
    write("08_data.ipynb", "#export\na = 2")
    with pytest.raises(InputError, match=r"\(07_norms.ipynb, 08_data.ipynb\). Name it: nb_auto_export\('07_….ipynb'\)"):
        nb_auto_export()
    assert not Path("exp").exists()


@pytest.fixture
def interactive(monkeypatch):
    """Sets the variables of the notebook that asks."""
    import IPython

    def set_variables(**variables) -> None:
        monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(user_ns=variables))

    return set_variables


def two_elsewhere(tmp_path: Path) -> Path:
    """Two notebooks in the working directory that could be the one, and the one that is, in another folder."""
    write("07_norms.ipynb", "#export\na = 1")
    write("08_data.ipynb", "#export\na = 2")
    other = tmp_path / "other"
    other.mkdir()
    return write("09_more.ipynb", "#export\na = 3", folder=other)


def test_an_editor_says_it_in_a_variable(interactive, tmp_path):
    path = two_elsewhere(tmp_path)
    interactive(__vsc_ipynb_file__=str(path), In=["#export\na = 1"])
    assert running_notebook() == path


def test_a_server_says_it_in_the_environment(monkeypatch, tmp_path):
    path = two_elsewhere(tmp_path)
    monkeypatch.setenv("JPY_SESSION_NAME", str(path))
    assert running_notebook() == path


def test_a_server_may_say_it_from_its_own_root(monkeypatch, tmp_path):
    two_elsewhere(tmp_path)
    monkeypatch.setenv("JPY_SESSION_NAME", "projects/lesson/08_data.ipynb")
    assert running_notebook() == Path("08_data.ipynb")


@pytest.mark.parametrize("said", ["a-session-without-a-notebook", "gone/10_gone.ipynb"])
def test_what_is_said_but_not_there_is_passed_over(monkeypatch, said):
    write("07_norms.ipynb", "#export\na = 1")
    monkeypatch.setenv("JPY_SESSION_NAME", said)
    assert running_notebook() == Path.cwd() / "07_norms.ipynb"


def test_of_several_the_one_whose_cells_were_run(interactive):
    write("07_norms.ipynb", "#export\na = 1", "same", "b = 1")
    write("08_data.ipynb", "#export\na = 2", "same", "b = 2")
    interactive(In=["", "#export\na = 2\n", "same", "b = 3", "nb_auto_export()"])
    assert running_notebook() == Path.cwd() / "08_data.ipynb"
    interactive(In=["", "same"])
    with pytest.raises(InputError, match="Cannot tell which notebook"):
        running_notebook()


def test_a_notebook_that_runs_finds_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", SOURCE_FOLDER)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    imports = "#export\nfrom normlab.notebook import export_notebook, running_notebook"
    write("06_other.ipynb", imports, "#export\na = 6")
    path = write("07_norms.ipynb", imports, "#export\na = 7", "print(export_notebook(running_notebook()).name)")
    notebook = nbformat.read(path, as_version=4)
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))  # of this interpreter
    NotebookClient(notebook, km=kernel, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert notebook.cells[-1].outputs[0].text == "nb_07.py\n"
    assert "a = 7" in Path("exp/nb_07.py").read_text()
    assert kernel.kernel_spec.argv[0] == sys.executable


def test_a_module_of_the_users_own_is_not_overwritten():
    notebook = write("07_norm.ipynb", "#export\na = 1")
    module = Path("exp") / "nb_07.py"
    module.parent.mkdir()
    for text in ("mine = True\n", "", "# Made from my own head\n"):
        module.write_text(text)
        with pytest.raises(InputError, match=r"exp/nb_07\.py was not made from a notebook.*Move"):
            export_notebook(notebook)
        assert module.read_text() == text
    lesson = f"{'#' * 49}\n### THIS FILE WAS AUTOGENERATED! DO NOT EDIT! ###\n"
    for text in (lesson, "# Made from 07_old.ipynb by its #export cells\n"):
        module.write_text(text)
        assert load(export_notebook(notebook)).a == 1
    assert load(export_notebook(notebook)).a == 1

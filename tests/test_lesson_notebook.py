"""The lesson as a notebook: every cell runs, on the first 2,000 images, and shows what it should."""

import base64
import importlib.util
import io
import math
import os
import re
from pathlib import Path

import matplotlib.image
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import normlab

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "07_batchnorm.ipynb"
FIRST_CELL = "%load_ext autoreload\n%autoreload 2\n%matplotlib inline"  # as many notebooks begin
FEWER_IMAGES = "\nx_train, y_train, x_valid, y_valid = x_train[:2000], y_train[:2000], x_valid[:1000], y_valid[:1000]"
FIGURE = r"(nan|-?inf|[-+.e\d]+)"

# Epochs of each cell that trains.
EPOCHS = {
    **{"bare": 2, "bare-fast": 2, "hooks": 1, "batchnorm-run": 2, "builtin-run": 2, "schedule-run": 8, "find": 2},
    **{"layernorm-run": 3, "instancenorm-run": 3, "groupnorm-run": 2, "small-run": 1},
    **{"running-few": 1, "running-simple-few": 1, "running-real": 1, "epoch-run": 1},
}
PICTURES = {"batch": 1, "hooks": 2, "plot-lr": 1, "plot-loss": 1, "find": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def cells(folder) -> dict:
    """The cells by id, after they were run in a kernel of this interpreter."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.write(notebook, folder / NOTEBOOK.name)
    nbformat.write(nbformat.v4.new_notebook(cells=notebook.cells[:2]), folder / "06_another.ipynb")
    next(cell for cell in notebook.cells if cell.id == "data").source += FEWER_IMAGES
    notebook.cells.insert(0, nbformat.v4.new_code_cell(FIRST_CELL, id="first"))
    environment = {name: value for name, value in os.environ.items() if name not in ("MPLBACKEND", "JPY_SESSION_NAME")}
    environment |= {"PYTHONPATH": str(Path(normlab.__file__).parents[1]), "IPYTHONDIR": str(folder / "ipython")}
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    client = NotebookClient(notebook, km=kernel, timeout=120, resources={"metadata": {"path": str(folder)}})
    client.execute(env={**environment, "OMP_NUM_THREADS": "1"})
    return {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def results(cell) -> list[tuple[str, float, float]]:
    """(part, loss, accuracy) of each line that a run printed."""
    lines = re.findall(rf"^(train|valid): \[{FIGURE}, {FIGURE}\]$", printed(cell), re.MULTILINE)
    return [(part, float(loss), float(accuracy)) for part, loss, accuracy in lines]


def pictures(cell) -> list:
    encoded = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [matplotlib.image.imread(io.BytesIO(base64.b64decode(png))) for png in encoded]


def test_every_cell_runs_without_error_or_warning(cells):
    assert [cell.execution_count for cell in cells.values()] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells.values() for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]


def test_every_run_prints_its_epochs_in_finite_numbers(cells):
    found = {name: results(cell) for name, cell in cells.items() if results(cell)}
    assert {name: [part for part, *_ in lines] for name, lines in found.items()} == {
        name: ["train", "valid"] * epochs for name, epochs in EPOCHS.items()
    }
    del found["bare-fast"]  # which shows that the rate is too high
    assert all(math.isfinite(loss) for lines in found.values() for _, loss, _ in lines)


def test_norms_learn_where_the_bare_net_does_not(cells):
    def accuracy(name: str) -> float:
        return results(cells[name])[-1][2]

    assert accuracy("bare-fast") < accuracy("batchnorm-run") - 0.2
    assert min(accuracy(name) for name in ("batchnorm-run", "builtin-run", "schedule-run")) > 0.6
    assert min(accuracy(name) for name in ("layernorm-run", "groupnorm-run", "epoch-run")) > 0.5
    assert min(accuracy(name) for name in ("running-few", "running-simple-few")) > 0.5
    assert accuracy("instancenorm-run") < 0.2


def test_what_cells_show(cells):
    assert "(torch.Size([2000, 784])" in cells["data-look"].outputs[0].data["text/plain"]
    assert cells["batch"].outputs[0].data["text/plain"] == "(torch.Size([512, 784]), torch.Size([512]))"
    assert cells["groupnorm"].outputs[0].data["text/plain"] == "(tensor(True), tensor(True))"
    timed = [name for name, cell in cells.items() if "%time" in cell.source]
    assert len(timed) >= 10
    assert all("Wall time: " in printed(cells[name]) for name in timed)


def test_pictures_are_there_and_not_blank(cells):
    drawn = {name: pictures(cell) for name, cell in cells.items() if pictures(cell)}
    assert {name: len(images) for name, images in drawn.items()} == PICTURES
    assert all(image[..., :3].std() > 0.05 for images in drawn.values() for image in images)


def test_the_marked_cells_became_a_module(cells, folder):
    assert printed(cells["export"]) == "Converted 07_batchnorm.ipynb to exp/nb_07.py\n"
    assert [path.name for path in (folder / "exp").glob("*.py")] == ["nb_07.py"]
    spec = importlib.util.spec_from_file_location("nb_07", folder / "exp" / "nb_07.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert [type(layer).__name__ for layer in module.conv_layer(1, 8)] == ["Conv2d", "GeneralRelu", "BatchNorm2d"]
    assert module.get_learn_run.__module__ == module.init_cnn.__module__ == "nb_07"
    assert module.RunningBatchNorm.__module__ == "normlab.lesson"  # the cells that define one are not marked


def test_the_notebook_is_kept_without_outputs():
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code[0].source == "#export\nfrom normlab.lesson import *"
    assert code[-1].source == "nb_auto_export()"
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    ids = [cell.id for cell in notebook.cells]
    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z-]+", id) for id in ids)  # names, that stay when the notebook is saved
    assert notebook.metadata.kernelspec.name == "python3"

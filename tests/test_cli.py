"""The command line, as its user meets it."""

import json
import sys

import pytest
import torch
from torch import nn

from normlab import card, cli
from normlab.data import DATASETS
from normlab.kernels import cpu
from normlab.models import MODELS
from normlab.nn import NORMS
from normlab.study.optimizers import OPTIMIZERS
from normlab.study.schedules import SCHEDULES


def normlab(monkeypatch, capsys, *arguments: str, columns: int = 160) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["normlab", *arguments])
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as end:
        cli.main()
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_list_names_everything(monkeypatch, capsys):
    status, out, _ = normlab(monkeypatch, capsys, "list")
    assert status == 0
    for name in (*NORMS, *MODELS, *DATASETS, *SCHEDULES):
        assert f" {name} " in out


def test_info_says_which_kernels_are_in_use(monkeypatch, capsys):
    status, out, _ = normlab(monkeypatch, capsys, "info")
    assert status == 0
    assert cpu.PATH in out
    assert torch.__version__ in out


def test_list_fits_a_terminal_of_100_columns(monkeypatch, capsys):
    """A line for each: nothing is broken off."""
    _, out, _ = normlab(monkeypatch, capsys, "list", columns=100)
    assert len(out.splitlines()) == len([*NORMS, *MODELS, *DATASETS, *SCHEDULES, *OPTIMIZERS])


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_settings_of_a_trial_have_one_help(monkeypatch, capsys, command):
    _, out, _ = normlab(monkeypatch, capsys, command, "--help")
    shown = " ".join(out.replace("│", " ").split())
    for said in ("Passes over the training images.", "How the learning rate moves (normlab list).", "None for all."):
        assert shown.count(said) == 1
    assert ("(default: 0.1)" in shown) == (command == "train")


def test_compare_takes_six_norms_unless_told_otherwise():
    assert cli.Compare().norms == ["none", "batch", "group", "layer", "instance", "running"]


def test_train_leaves_a_record_three_pictures_and_a_model_to_diagnose(monkeypatch, capsys, tmp_path):
    options = ["--norm", "batch", "--batch-size", "50", "--images", "2000", "--lr", "0.2", "--out", str(tmp_path)]
    status, out, _ = normlab(monkeypatch, capsys, "train", *options)
    assert status == 0
    assert "epoch 1" in out
    record = json.loads((tmp_path / "runs.jsonl").read_text())
    assert record["settings"]["images"] == 2000
    assert f"accuracy {record['epochs'][0]['valid']['accuracy']:.4f}" in out
    for name in ("training.png", "activations.png", "histograms.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert str(tmp_path / name) in out
    folder = tmp_path / "diagnosis"
    options = ["diagnose", str(tmp_path), "--limit", "20", "--out", str(folder)]
    assert normlab(monkeypatch, capsys, *options)[0] == 0
    status, text, _ = normlab(monkeypatch, capsys, *options, "--batch-size", "2")
    assert status == 1
    assert "batch too small" in text
    found = json.loads((folder / "diagnosis.json").read_text())["findings"]
    assert "batch too small" in [finding["fault"] for finding in found]
    assert (folder / "diagnosis.png").read_bytes().startswith(b"\x89PNG")


OWN = """
import torch
from torch import nn

def make(): return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

class Net(nn.Module):
    def forward(self, x): return x + undefined

batches = [torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(0))] * 2
integers = [torch.ones(8, 3, 4, 4, dtype=torch.int64)]
wrong = [torch.ones(8, 5, 4, 4)]
numbers = [1]
empty = []

def ends():
    yield from batches
    raise OSError("no disk")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "own", raising=False)
    (tmp_path / "own.py").write_text(OWN)
    yield tmp_path
    sys.modules.pop("own", None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["own.py:make"], "batches is missing: own.py:make, a model of your own, needs --batches"),
        (["own.py:Net", "--batches", "own.py:batches"], "own.py, line 8: NameError: name 'undefined' is not defined."),
        (["own.py:make", "--batches", "own.py:integers"], "batch 1, a tensor of int64 (8, 3, 4, 4)"),
        (["own.py:make", "--batches", "own.py:wrong"], "batch 1, a tensor of float32 (8, 5, 4, 4)"),
        (["own.py:make", "--batches", "own.py:numbers"], "batch 1, int without tensors"),
        (["own.py:make", "--batches", "own.py:empty"], "batches=[] is not usable. Accepted: at least one batch."),
        (["own.py:make", "--batches", "own.py:ends"], "own.py, line 18: OSError: no disk."),
        (["own.py:make", "--batches", "own.py:batches", "--weights", "own.py"], "weights='own.py' is damaged"),
        (["own.py:make", "--batches", "own.py:batches", "--batch-size", "2"], "batch_size=2 is not usable"),
        (
            ["runs/train", "--loss", "own.py:make"],
            "loss='own.py:make' is not usable. Accepted: None for a run. Give --batches too",
        ),
    ],
)
def test_diagnose_tells_what_is_wrong_with_a_users_things_in_a_line(monkeypatch, capsys, own, options, said):
    status, _, err = normlab(monkeypatch, capsys, "diagnose", *options)
    assert status == 2
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (own / "runs").exists() or not list((own / "runs").rglob("*.json"))


def test_diagnose_names_what_is_left_of_the_weights_and_norms_that_are_others(monkeypatch, capsys, own):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3))
    state = {f"module.{key}": part for key, part in model.state_dict().items()}
    torch.save({"state_dict": {**state, "head": torch.ones(1)}, "normlab.card": card(model)}, own / "w.pt")
    options = ["own.py:make", "--batches", "own.py:batches", "--weights", "w.pt"]
    status, out, _ = normlab(monkeypatch, capsys, "diagnose", *options)
    assert status in (0, 1)
    assert "warning: weights='w.pt': left over, not in the model: head." in out
    assert "warning: weights='w.pt': 1: eps was 0.001 when saved, is 1e-05 here" in out


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["train", "--images", "100"], "this run is not kept"),
        (["compare", "--images", "100"], "what is done is kept, run the same command to go on"),
    ],
)
def test_ctrl_c_is_told_what_is_kept(monkeypatch, capsys, tmp_path, command, said):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Train, "run", interrupted)
    monkeypatch.setattr(cli.Compare, "run", interrupted)
    status, _, err = normlab(monkeypatch, capsys, *command, "--out", str(tmp_path / "out"))
    assert status == 130
    assert said in err


def test_weights_of_another_run_than_the_last_are_refused(monkeypatch, capsys, tmp_path):
    """Killed between record and weights, train leaves the weights of the run before."""
    options = ["train", "--norm", "batch", "--batch-size", "50", "--images", "200", "--out", str(tmp_path)]
    assert normlab(monkeypatch, capsys, *options)[0] == 0
    before = (tmp_path / "model.safetensors").read_bytes()
    assert normlab(monkeypatch, capsys, *options, "--seed", "1")[0] == 0
    (tmp_path / "model.safetensors").write_bytes(before)
    status, _, err = normlab(monkeypatch, capsys, "diagnose", str(tmp_path), "--out", str(tmp_path / "diagnosis"))
    assert status == 2
    assert "run of the weights" in err
    assert "train again" in err


def test_train_that_diverges_says_where_and_is_no_crash(monkeypatch, capsys, tmp_path):
    options = ["--norm", "none", "--lr", "9", "--images", "1000", "--out", str(tmp_path)]
    status, out, _ = normlab(monkeypatch, capsys, "train", *options)
    assert status == 0
    assert "diverged at step" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--norm", "bach"], "norm='bach' is unknown. Did you mean 'batch'?"),
        (["compare", "--norms", "batch", "grup"], "norm='grup' is unknown. Did you mean 'group'?"),
        (["compare", "--data", "mnits"], "Did you mean 'mnist'?"),
        (["compare", "--batch-sizes", "0"], "batch_size=0 is not usable. Accepted: a whole number from 1."),
        (["compare", "--batch-sizes", "60000"], "batch_size=60000 is not usable"),
        (["compare", "--lrs", "-1"], "lr=-1.0 is not usable"),
        (["compare", "--schedules", "cosin"], "schedule='cosin' is unknown"),
        (["compare", "--workers", "0", "--images", "10"], "workers=0"),
        (["reproduce", "--rows", "R99"], "rows='R99' is unknown"),
        (["compare", "--data-dir", "not/there"], "not/there"),
        (["compare", "--norms"], "norms"),
    ],
)
def test_bad_input_is_named_with_what_is_accepted(monkeypatch, capsys, tmp_path, arguments, said):
    status, _, err = normlab(monkeypatch, capsys, *arguments, "--out", str(tmp_path / "out"))
    assert status == 2
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_is_answered_with_the_nearest(monkeypatch, capsys):
    status, _, err = normlab(monkeypatch, capsys, "compare", "--bach-sizes", "2")
    assert status == 2
    assert "--batch-sizes" in err


def test_an_altered_data_file_is_refused(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(b"not the images")
    status, _, err = normlab(monkeypatch, capsys, "train", "--data-dir", str(tmp_path), "--out", str(tmp_path / "out"))
    assert status == 2
    assert "train-images-idx3-ubyte.gz" in err
    assert (folder / "train-images-idx3-ubyte.gz").read_bytes() == b"not the images"

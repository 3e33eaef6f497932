"""Studies of the user's own model and data."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from normlab.data import TensorBatches
from normlab.errors import InputError
from normlab.nn import RunningBatchNorm2d
from normlab.study.compare import run_study
from normlab.study.plan import Plan, Trial
from normlab.study.tasks import Repeated, check_tasks, make_data, make_model, make_optimizer
from normlab.study.trial import run_trial


class Blobs(Dataset):
    """A square in noise, and where it is; samples are dicts."""

    def __init__(self, n: int, seed: int):
        numbers = torch.Generator().manual_seed(seed)
        self.labels = torch.zeros(n, 16, 16, dtype=torch.long)
        self.labels[:, 4:10, 4:10] = 1
        self.images = self.labels[:, None] + 0.5 * torch.randn(n, 1, 16, 16, generator=numbers)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int):
        return {"image": self.images[number], "label": self.labels[number]}


def data():
    return Blobs(10, 0), Blobs(6, 1)


def batches(batch_size: int, seed: int):
    blobs = Blobs(10, seed)
    made = TensorBatches(blobs.images, blobs.labels, batch_size)
    return made, made


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))


def net_of(norm: str):
    assert norm == "theirs"
    return net()


def net_for(num_classes: int, in_channels: int, seed: int):
    return nn.Sequential(
        nn.Conv2d(in_channels, 4, 28), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, num_classes + seed)
    )


def without_norm():
    return nn.Conv2d(1, 2, 1)


def fails():
    raise RuntimeError("no such file as blobs.nii")


def error(output, targets):
    return (output.argmax(1) != targets).float().mean()


class Loss(nn.Module):
    def forward(self, output, targets):
        return nn.functional.cross_entropy(output, targets)


def clipped(groups, lr):
    return torch.optim.RMSprop(groups, lr=lr)


HERE = f"{Path(__file__)}:"
OWN = {"model": f"{HERE}net", "data": f"{HERE}data", "metrics": ("dice",)}


def test_data_sets_become_loaders_of_the_batch_size_in_the_order_of_the_seed():
    orders = []
    for seed in (0, 0, 1):
        train, valid = make_data(Trial(batch_size=4, seed=seed, **OWN))
        assert isinstance(train, DataLoader)
        assert isinstance(valid, DataLoader)
        orders.append(torch.cat([batch["image"] for batch in train]))
        assert [len(batch["label"]) for batch in train] == [4, 4, 2]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


def test_a_function_that_takes_batch_size_gives_the_batches():
    train, valid = make_data(Trial(batch_size=3, seed=5, **{**OWN, "data": f"{HERE}batches"}))
    assert train is valid
    assert train.batch_size == 3  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(train.dataset.x, Blobs(10, 5).images)  # pyright: ignore[reportAttributeAccessIssue]


def test_some_images_are_the_first_ones():
    train, _ = make_data(Trial(images=3, **OWN))
    assert len(train.dataset) == 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(InputError, match=r"images=11 is not usable. Accepted: 1 to 10"):
        make_data(Trial(images=11, **OWN))


def test_steps_go_on_through_the_data_and_begin_it_anew():
    epochs = Repeated([1, 2, 3], 4)
    assert len(epochs) == 4
    assert [list(epochs) for _ in range(3)] == [[1, 2, 3, 1], [2, 3, 1, 2], [3, 1, 2, 3]]
    with pytest.raises(InputError, match="no batches"):
        list(Repeated([], 2))


def test_the_norm_is_put_in_by_conversion_from_the_same_weights():
    plain, converted = (make_model(Trial(norm=norm, seed=3, **OWN)) for norm in ("batch", "running"))
    assert isinstance(converted[1], RunningBatchNorm2d)  # pyright: ignore[reportIndexIssue]
    assert torch.equal(plain[0].weight, converted[0].weight)  # pyright: ignore[reportIndexIssue]


def test_a_function_that_takes_norm_puts_it_in_itself():
    """And knows names that are none of ours."""
    own = {**OWN, "model": f"{HERE}net_of"}
    assert isinstance(make_model(Trial(norm="theirs", **own))[1], nn.BatchNorm2d)  # pyright: ignore[reportIndexIssue]
    check_tasks([Trial(norm="theirs", **own)])
    with pytest.raises(InputError, match="'theirs' is unknown"):
        check_tasks([Trial(norm="theirs", **OWN)])


def test_a_study_of_norms_that_are_none_of_ours(tmp_path):
    plan = Plan(norms=["theirs"], batch_sizes=[2], lrs=[0.1], seeds=[0], **{**OWN, "model": f"{HERE}net_of"})
    records = run_study(plan, tmp_path, workers=1)
    assert [(record.settings["norm"], record.status) for record in records] == [("theirs", "finished")]
    assert "theirs" in (tmp_path / "report.html").read_text()


def test_a_function_for_built_in_data_may_ask_for_classes_and_channels():
    model = make_model(Trial(norm="group", model=f"{HERE}net_for", seed=3))
    assert model[3].out_features == 13  # pyright: ignore[reportIndexIssue]
    assert run_trial(Trial(norm="batch", model=f"{HERE}net_for", images=200, batch_size=20)).result


@pytest.mark.parametrize(
    ("name", "kind", "decay"),
    [
        ("sgd", torch.optim.SGD, 0.0),
        ("nesterov", torch.optim.SGD, 0.1),
        ("adamw", torch.optim.AdamW, 0.1),
        (f"{HERE}clipped", torch.optim.RMSprop, 0.1),
        ("torch.optim:NAdam", torch.optim.NAdam, 0.1),
    ],
)
def test_the_optimizer_decays_weights_alone(name, kind, decay):
    optimizer = make_optimizer(Trial(optimizer=name, lr=0.01, weight_decay=decay), net())
    assert type(optimizer) is kind
    assert [group["weight_decay"] for group in optimizer.param_groups] == [decay, 0.0]
    assert {group["lr"] for group in optimizer.param_groups} == {0.01}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"model": f"{HERE}nett"}, "Did you mean"),
        ({"model": "no_such_module:net"}, "model='no_such_module:net' cannot be imported"),
        ({"model": f"{HERE}without_norm"}, r"norms='none' is not usable. Accepted: one or more, to be converted"),
        ({"model": f"{HERE}data"}, r"expected|is not usable. Accepted: a torch.nn.Module"),
        ({"data": f"{HERE}fails"}, r"failed: .*test_tasks.py, line \d+: RuntimeError: no such file as blobs.nii"),
        ({"data": f"{HERE}net"}, "two: data for training, and for validation"),
        ({"loss": f"{HERE}HERE"}, "expected a function of output and targets, got str"),
        ({"metrics": ("dise",)}, "metrics"),
        ({"optimizer": "adam"}, "Did you mean 'adamw'"),
    ],
)
def test_mistakes_are_said_before_anything_is_run(wrong, said):
    with pytest.raises(InputError, match=said):
        check_tasks([Trial(**{**OWN, **wrong})])


def test_a_run_of_ones_own_is_the_same_twice_and_another_by_its_seed():
    trial = Trial(norm="running", optimizer="adamw", lr=0.03, epochs=2, loss=f"{HERE}Loss", **OWN)
    runs = [run_trial(Trial(**{**vars(trial), "seed": seed})) for seed in (0, 0, 1)]
    assert runs[0].losses == runs[1].losses != runs[2].losses
    assert runs[0].result == runs[0].epochs[-1]["valid"]["dice"] > 0.5
    assert runs[0].steps == 10


def test_a_study_of_ones_own_judges_by_its_metric(tmp_path, monkeypatch):
    """In processes of its own; where less is better the table knows it."""
    (tmp_path / "mine.py").write_text(inspect.getsource(inspect.getmodule(net)))  # pyright: ignore[reportArgumentType]
    monkeypatch.chdir(tmp_path)
    plan = Plan(
        norms=["batch", "running"], batch_sizes=[2], lrs=[0.001, 0.1], seeds=[0, 1], optimizers=["adamw"],
        model="mine:net", data="mine.py:data", metrics=("mine.py:error", "dice"), lower=True,
    )  # fmt: skip
    records = run_study(plan, "out", workers=2)
    assert len(records) == 8
    assert {record.status for record in records} == {"finished"}
    best = min(records, key=lambda record: record.result or 0)
    assert best.metric == "error"
    assert best.settings["lr"] == 0.1
    assert set(best.epochs[-1]["valid"]) == {"loss", "error", "dice"}
    assert Plan.read("out/plan.toml") == plan
    assert (tmp_path / "out/report.html").exists()

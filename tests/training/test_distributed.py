"""Two and four processes train as one does; a rank that dies ends the others; FSDP2 takes our norms."""

import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import several
import torch
from filelock import FileLock
from keeping import KEEPING
from safetensors.torch import load_file
from several import ALIKE, BATCH, CASES, IN_FLOAT64, SAMPLES, data, fit, kill, killed_learner, train_step, whole_net
from statistics_formula import assert_kept, averaged, statistics
from torch import nn

from normlab.data import TensorBatches
from normlab.errors import InputError
from normlab.training import Distributed, Learner, load_checkpoint
from normlab.training.distributed import Ranks
from normlab.training.shards import Shard, part_of

LAUNCH = [sys.executable, several.__file__]
WHOLE = "2/whole"  # of the jobs: the fit that was not killed


@functools.cache
def alone(name, dtype):
    with tempfile.TemporaryDirectory() as folder:
        return fit(name, Path(folder), dtype)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """What every job left there; the first worker of pytest-xdist that asks runs them for all."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "jobs"
    with FileLock(f"{folder}.lock"):
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            settings = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([*LAUNCH, folder, "jobs"], check=True, env=settings)
            (folder / "done").touch()
    return folder


@pytest.fixture(scope="module")
def results(jobs) -> dict[int, list]:
    """By the number of processes, what each rank ended with."""
    return {count: [torch.load(jobs / f"{count}/{rank}.pt") for rank in range(count)] for count in (2, 4)}


@pytest.fixture(scope="module")
def ranks(results) -> dict[int, list]:
    """The fits of `CASES`."""
    return {count: [result["fits"][torch.float32] for result in results[count]] for count in results}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ALIKE)
def test_several_processes_train_as_one_does(ranks, name, count):
    """Losses, figures, weights and statistics; the last batch has fewer samples than there are processes."""
    one = alone(name, torch.float32)
    for result in ranks[count]:
        torch.testing.assert_close(result[name], one, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", ALIKE)
def test_over_an_epoch_they_differ_by_less_than_a_millionth(ranks, name, count):
    """Each loss, the figures, weights and statistics."""
    batches, found, one = -(-SAMPLES // BATCH), ranks[count][0][name], alone(name, torch.float32)
    for key, end in (("losses", batches), ("figures", 2), ("validated", 1)):
        torch.testing.assert_close(found[key][:end], one[key][:end], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", IN_FLOAT64)
def test_in_float64_they_differ_by_its_rounding(results, name, count):
    one = alone(name, torch.float64)
    for result in results[count]:
        torch.testing.assert_close(result["fits"][torch.float64][name], one, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_end_with_the_same(ranks, name, count):
    for result in ranks[count][1:]:
        torch.testing.assert_close(result[name], ranks[count][0][name], rtol=0, atol=0)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", [*KEEPING, "torch"])
def test_own_statistics_are_the_means_over_ranks(ranks, name, count):
    """Of norms of the data itself, and their moving average, from the formulas in float64."""
    x = torch.cat([inputs for inputs, _ in TensorBatches(*data(), BATCH, shuffle=True)])
    parts = [[batch[part_of(len(batch), rank, count)] for batch in x.split(BATCH)] for rank in range(count)]
    if name == "sync":
        parts = [x.split(BATCH)]
    steps = range(1, len(parts[0]) + 1)
    after = [[statistics({"torch": "batch"}.get(name, name), own[:step]) for step in steps] for own in parts]
    found = ranks[count][0]["own statistics"]
    for state, expected in (
        (found["state"], [own[-1] for own in after]),
        (found["averages"][0], [averaged(own, 0.9) for own in after]),
    ):
        kept = {key: state[f"0.norms.{name}.{key}"] for key in expected[0]}
        assert_kept(kept, mean_over_ranks(expected))


def mean_over_ranks(states):
    """Of whole numbers the largest."""
    together = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    return {name: part.mean(0) if part.is_floating_point() else part.max() for name, part in together.items()}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "SaveBest" in case.get("with", ())])
def test_the_first_process_saves_what_all_validated(jobs, ranks, name, count):
    folder = jobs / f"{count}/{name}"
    assert [path.name for path in folder.iterdir()] == ["of rank 0"]
    files = sorted((folder / "of rank 0").iterdir())
    assert [path.name for path in files] == ["epoch-001.safetensors", "epoch-002.safetensors", "last.safetensors"]
    for result in ranks[count]:
        first, second = result[name]["validated"]
        for path, state in zip(files, (first, second, second), strict=True):
            torch.testing.assert_close(load_file(path), state, rtol=0, atol=0)


@pytest.mark.parametrize("count", [2, 4])
def test_measured_statistics_are_those_of_the_batches(ranks, count):
    """Of the first norm, from its formula, in float64, of the weights that were averaged."""
    for state in ranks[count][0]["measured and saved"]["validated"]:
        given = nn.functional.conv2d(data()[0].double(), *(state[f"1.{part}"].double() for part in ("weight", "bias")))
        expected = {"running_mean": given.mean((0, 2, 3)), "running_var": given.transpose(0, 1).flatten(1).var(1)}
        assert_kept({key: state[f"2.{key}"] for key in expected}, expected)


def test_a_killed_rank_ends_the_others_and_the_fit_goes_on_bit_by_bit(jobs, tmp_path):
    kill(tmp_path, seed=os.getpid())
    if (tmp_path / "a.ckpt").exists():
        load_checkpoint(tmp_path / "a.ckpt")
    subprocess.run([*LAUNCH, tmp_path, "resume"], check=True)
    for rank in range(2):
        found, expected = (torch.load(folder / f"{rank}.pt") for folder in (tmp_path, jobs / WHOLE))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found, expected = (
        {path.name: load_file(path) for path in (folder / "best").iterdir()} for folder in (tmp_path, jobs / WHOLE)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_fit_as_the_example_s_ends_the_same_on_all_ranks(jobs):
    found = [torch.load(jobs / WHOLE / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_a_checkpoint_of_several_processes(jobs, tmp_path):
    """It has averaged statistics, each rank's own beside them, and no other names."""
    state = load_checkpoint(jobs / WHOLE / "a.previous.ckpt")
    assert state["batches"] == 6
    assert set(state["model"]) == set(killed_learner(tmp_path).model.state_dict())
    own = [rank["buffers"]["2.running_mean"] for rank in state["ranks"]]
    assert not torch.equal(*own)
    torch.testing.assert_close(state["model"]["2.running_mean"], sum(own) / 2)
    learner = killed_learner(tmp_path)
    learner.load_state_dict(state)
    with pytest.raises(
        InputError, match=r"processes=1 is not usable. Accepted: 2, as in the saved state. The state at"
    ):
        learner.fit(several.EPOCHS)


def test_the_end_of_an_epoch_goes_on_with_another_number_of_processes(jobs, tmp_path):
    state = load_checkpoint(jobs / WHOLE / "a.ckpt")
    assert state["batches"] == 0
    learner = killed_learner(tmp_path)
    learner.load_state_dict(state)
    history = learner.fit(several.EPOCHS + 1)
    assert history[:-1] == state["history"]


def test_a_loss_that_is_not_finite_ends_every_rank(results):
    found = [result["poisoned"] for result in results[2]]
    assert found[0]["step"] == found[1]["step"]
    assert sorted(one["where"][:24] for one in found) == ["All parameters are finit", "The inputs of the batch "]


def test_fully_sharded(results):
    """As in one process; loaded from a checkpoint of parts, another net goes on the same."""
    found = [result["sharded"] for result in results[2]]
    model, optimizer = whole_net(0)
    x, y = data()
    losses = [train_step(model, optimizer, x[:36], y[:36]) for _ in range(5)]
    mine = torch.tensor([[*rank["losses"], *rank["again"][0]] for rank in found]).mean(0)
    torch.testing.assert_close(mine, torch.tensor(losses), rtol=0, atol=1e-6)
    for rank in found:
        assert rank["again"][0] == rank["again"][1]
        torch.testing.assert_close(*rank["states"], rtol=0, atol=0)
        torch.testing.assert_close(dict(rank["states"][0]), model.state_dict(), rtol=1e-5, atol=1e-6)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_parts_are_the_whole(count):
    x, y = torch.arange(10.0).view(5, 2), torch.arange(5)
    batches = [
        (x, y),
        [x[:2], y[:2]],
        {"image": x[:3], "label": y[:3], "scale": torch.tensor(2.0)},
        ((x, x), y),
        (x[:1], {"y": y[:1]}),
    ]
    shards = [list(Shard(batches, rank, count)) for rank in range(count)]
    for number, batch in enumerate(batches):
        torch.testing.assert_close(joined([shard[number] for shard in shards]), batch)


def joined(parts):
    first = parts[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(parts) if first.dim() else first
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    return type(first)(joined(list(each)) for each in zip(*parts, strict=True))


def test_names_of_samples_are_cut_and_those_of_a_batch_are_not():
    batch = {"image": torch.zeros(3, 2), "label": torch.zeros(3), "name": ["a", "b", "c"], "kind": "photo"}
    parts = [next(iter(Shard([batch], rank, 2))) for rank in range(2)]
    assert [part["name"] for part in parts] == [["a"], ["b", "c"]]
    assert [part["kind"] for part in parts] == ["photo"] * 2


def test_a_shard_says_how_many_samples_there_are():
    shard = Shard(TensorBatches(*data(), BATCH), 1, 4)
    assert [(shard.own, shard.total) for _ in shard] == [(2, 6)] * 6 + [(0, 1)]
    assert len(shard) == 7
    assert shard.state_dict()["delivered"] == 0


def test_a_distributed_sampler_is_refused():
    x, y = data()
    pairs = torch.utils.data.TensorDataset(x, y)
    sampler = torch.utils.data.DistributedSampler(pairs, num_replicas=2, rank=0)
    with pytest.raises(InputError, match="sampler='DistributedSampler' is not usable"):
        Shard(torch.utils.data.DataLoader(pairs, 4, sampler=sampler), 0, 2)


# --- one process ------------------------------------------------------------------------------------------------------


def test_alone_it_does_nothing():
    with_it, without = several.learner_of(), several.learner_of()
    without.callbacks = without.callbacks[:2]
    for learner in (with_it, without):
        learner.fit(2)
    assert with_it.callbacks[1].losses == without.callbacks[1].losses
    assert type(with_it.ranks) is Ranks


def test_what_several_processes_cannot_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = nn.Linear(2, 2)
    options = {"optimizer": torch.optim.LBFGS(model.parameters()), "callbacks": [Distributed()]}
    with pytest.raises(InputError, match="needs no closure, in several processes"):
        Learner(model, [(torch.ones(2, 2), torch.zeros(2).long())], **options).fit(1)
    with pytest.raises(InputError, match="timeout=0 is not usable"):
        Distributed(timeout=0)

"""Two and four processes train as one does; a rank that dies ends the others; FSDP2 takes our norms."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import several
import torch
from several import BATCH, CASES, SAMPLES, data, fit, kill, train_step, whole_net
from torch import nn

from normlab.data import TensorBatches
from normlab.errors import InputError
from normlab.training import Distributed, Learner, load_checkpoint
from normlab.training.distributed import Ranks
from normlab.training.shards import Shard, part_of

WITHOUT_OWN_STATISTICS = [name for name, case in CASES.items() if case.get("norm") not in ("batch", "running")]
alone = functools.cache(fit)
LAUNCH = [sys.executable, several.__file__]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> Path:
    """What every job left there."""
    folder = tmp_path_factory.mktemp("jobs")
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*LAUNCH, folder, "jobs"], check=True, env=settings)
    return folder


@pytest.fixture(scope="module")
def ranks(jobs) -> dict[int, list]:
    """By the number of processes, what each fit of each rank ended with."""
    return {count: [torch.load(jobs / f"{count}/{rank}.pt") for rank in range(count)] for count in (2, 4)}


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", WITHOUT_OWN_STATISTICS)
def test_several_processes_train_as_one_does(ranks, name, count):
    """Losses, figures, weights and statistics; the last batch has fewer samples than there are processes."""
    one = alone(name)
    for result in ranks[count]:
        torch.testing.assert_close(result[name], one, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_all_ranks_end_with_the_same(ranks, name, count):
    for result in ranks[count][1:]:
        torch.testing.assert_close(result[name], ranks[count][0][name], rtol=0, atol=0)


@pytest.mark.parametrize("count", [2, 4])
def test_own_statistics_are_the_means_over_ranks(ranks, count):
    """Of batch norm on the data itself, from its formula, in float64; an empty part tells nothing."""
    x = torch.cat([inputs for inputs, _ in TensorBatches(*data(), BATCH, shuffle=True)]).double()
    found = []
    for rank in range(count):
        mean, var = torch.zeros(2).double(), torch.ones(2).double()
        for batch in x.split(BATCH):
            part = batch[part_of(len(batch), rank, count)]
            if len(part):
                mean += 0.1 * (part.mean((0, 2, 3)) - mean)
                var += 0.1 * (part.transpose(0, 1).flatten(1).var(1) - var)
        found.append((mean, var))
    state = ranks[count][0]["own statistics"]["state"]
    torch.testing.assert_close(state["0.running_mean"].double(), sum(m for m, _ in found) / count, rtol=0, atol=1e-6)
    torch.testing.assert_close(state["0.running_var"].double(), sum(v for _, v in found) / count, rtol=0, atol=1e-6)
    assert state["0.num_batches_tracked"] == -(-SAMPLES // BATCH)


def test_a_killed_rank_ends_the_others_and_the_fit_goes_on_bit_by_bit(jobs, tmp_path):
    assert kill(tmp_path, seed=os.getpid()) < 10
    if (tmp_path / "a.ckpt").exists():
        load_checkpoint(tmp_path / "a.ckpt")
    subprocess.run([*LAUNCH, tmp_path, "resume"], check=True)
    for rank in range(2):
        found, expected = (torch.load(folder / f"{rank}.pt") for folder in (tmp_path, jobs / "whole"))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_checkpoint_of_several_processes(jobs):
    """It has averaged statistics, each rank's own beside them, and no other names."""
    state = load_checkpoint(jobs / "whole/a.previous.ckpt")
    assert state["batches"] == 6
    assert set(state["model"]) == set(several.learner_of("batch").model.state_dict())
    own = [rank["buffers"]["2.running_mean"] for rank in state["ranks"]]
    assert not torch.equal(*own)
    torch.testing.assert_close(state["model"]["2.running_mean"], sum(own) / 2)
    learner = several.learner_of("batch", callbacks=[several.Slowly()])
    learner.load_state_dict(state)
    with pytest.raises(
        InputError, match=r"processes=1 is not usable. Accepted: 2, as in the saved state. The state at"
    ):
        learner.fit(several.EPOCHS)


def test_the_end_of_an_epoch_goes_on_with_another_number_of_processes(jobs):
    state = load_checkpoint(jobs / "whole/a.ckpt")
    assert state["batches"] == 0
    learner = several.learner_of("batch", callbacks=[several.Slowly()])
    learner.load_state_dict(state)
    history = learner.fit(several.EPOCHS + 1)
    assert history[:-1] == state["history"]


def test_a_loss_that_is_not_finite_ends_every_rank(jobs):
    found = [torch.load(jobs / f"poisoned/{rank}.pt") for rank in range(2)]
    assert found[0]["step"] == found[1]["step"]
    assert sorted(one["where"][:24] for one in found) == ["All parameters are finit", "The inputs of the batch "]


def test_fully_sharded(jobs):
    """As in one process; loaded from a checkpoint of parts, another net goes on the same."""
    found = [torch.load(jobs / f"sharded/{rank}.pt") for rank in range(2)]
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

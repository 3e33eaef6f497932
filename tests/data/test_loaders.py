"""Every sample once an epoch, an order that depends on the seed alone, and exact continuation of a saved epoch."""

import io
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from normlab.data.loaders import BLOCK, TensorBatches, TensorPairs
from normlab.errors import InputError


def numbered(n: int, batch_size: int, **settings) -> TensorBatches:
    """Batches of samples that are their own number, so that an order can be read off."""
    x = torch.arange(n, dtype=torch.float32).reshape(n, 1).expand(n, 3).contiguous()
    return TensorBatches(x, torch.arange(n) * 10, batch_size, **settings)


def epoch(batches: TensorBatches) -> list[list[int]]:
    return [x[:, 0].int().tolist() for x, _ in batches]


def flat(order: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(order))


@st.composite
def settings(draw):
    n = draw(st.integers(1, 3 * BLOCK))
    size = draw(st.integers(1, n) if n < 40 else st.sampled_from([1, 2, 3, 7, 32, n // 2, n - 1, n]))
    return {"n": n, "batch_size": size, "shuffle": draw(st.booleans()), "drop_last": draw(st.booleans())}


@given(settings(), st.integers(0, 5))
def test_every_sample_once_an_epoch(settings, seed):
    batches = numbered(**settings, seed=seed)
    size, n = settings["batch_size"], settings["n"]
    for _ in range(2):
        order = epoch(batches)
        assert len(order) == len(batches)
        assert all(len(batch) == size for batch in order[:-1])
        seen = flat(order)
        assert len(seen) == len(set(seen)) == batches.num_samples
        assert set(seen) <= set(range(n))
        assert n - len(seen) == (n % size if settings["drop_last"] else 0)
        if not settings["shuffle"]:
            assert seen == list(range(len(seen)))


@given(settings(), st.integers(0, 2), st.data())
def test_a_saved_place_is_continued_exactly(settings, epochs, data):
    batches = numbered(**settings)
    for _ in range(epochs):
        epoch(batches)
    place = data.draw(st.integers(0, len(batches)), label="batches delivered")
    running = iter(batches)
    for _ in range(place):
        next(running)
    saved = torch.load(stored(batches.state_dict()), weights_only=True)
    rest = [x[:, 0].int().tolist() for x, _ in running]

    other = numbered(**settings, seed=99)
    epoch(other)
    other.load_state_dict(saved)
    assert other.state_dict()["delivered"] == place
    assert epoch(other) == rest
    assert [epoch(other) for _ in range(2)] == [epoch(batches) for _ in range(2)]


def stored(state: dict) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_state_saved_between_epochs_starts_the_next():
    batches = numbered(100, 8, shuffle=True)
    epoch(batches)
    state = batches.state_dict()
    following = epoch(batches)
    other = numbered(100, 8, shuffle=True)
    other.load_state_dict(state)
    assert epoch(other) == following


def test_an_abandoned_epoch_is_not_continued():
    batches, whole = numbered(100, 8, shuffle=True), numbered(100, 8, shuffle=True)
    next(iter(batches))
    epoch(whole)
    assert epoch(batches) == epoch(whole)


def test_saving_again_after_a_restore_keeps_the_place():
    batches, other, third = (numbered(100, 8, shuffle=True) for _ in range(3))
    running = iter(batches)
    for _ in range(3):
        next(running)
    other.load_state_dict(batches.state_dict())
    resumed = iter(other)
    next(resumed), next(running)
    third.load_state_dict(other.state_dict())
    assert epoch(third) == [x[:, 0].int().tolist() for x, _ in running]


def test_epochs_and_seeds_differ():
    batches = numbered(1000, 10, shuffle=True)
    first, second = flat(epoch(batches)), flat(epoch(batches))
    assert first != second
    assert first != flat(epoch(numbered(1000, 10, shuffle=True, seed=1)))
    assert first == flat(epoch(numbered(1000, 10, shuffle=True)))


def test_the_order_depends_on_nothing_else():
    expected = epoch(numbered(1000, 7, shuffle=True))
    torch.manual_seed(5)
    batches = numbered(1000, 7, shuffle=True)
    order = []
    for x, _ in batches:
        torch.rand(3)
        order.append(x[:, 0].int().tolist())
    assert order == expected
    before = torch.get_rng_state()
    epoch(batches)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("batch_size", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1])
def test_the_order_does_not_depend_on_the_batch_size(batch_size):
    expected = flat(epoch(numbered(3 * BLOCK, 5, shuffle=True)))
    assert flat(epoch(numbered(3 * BLOCK, batch_size, shuffle=True))) == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_targets_stay_with_their_samples(shuffle):
    for x, y in numbered(2000, 3, shuffle=shuffle):
        assert torch.equal(x[:, 0].long() * 10, y)


def test_batches_not_shuffled_are_views_of_the_data():
    batches = numbered(1000, 16)
    for i, (x, y) in enumerate(batches):
        assert x.data_ptr() == batches.dataset.x[16 * i :].data_ptr()
        assert y.data_ptr() == batches.dataset.y[16 * i :].data_ptr()


def test_data_is_moved_to_the_device():
    batches = numbered(10, 3, shuffle=True, device="meta")
    assert batches.dataset.y.device.type == "meta"
    assert [x.shape[0] for x, _ in batches] == [3, 3, 3, 1]
    assert all(x.device.type == y.device.type == "meta" for x, y in batches)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_order_is_the_same_on_a_gpu():
    assert epoch(numbered(2000, 7, shuffle=True, device="cuda")) == epoch(numbered(2000, 7, shuffle=True))
    batches = numbered(2000, 7, shuffle=True, device="cuda")
    state = torch.load(stored(batches.state_dict()), weights_only=True, map_location="cuda")
    batches.load_state_dict(state)
    assert epoch(batches) == epoch(numbered(2000, 7, shuffle=True))


def test_small_batches_are_cheap():
    """Images are gathered by thousands, not batch by batch: a few hundredths of an operation each."""
    batches = TensorBatches(torch.rand(20_000, 64), torch.zeros(20_000), 2, shuffle=True)
    with CountedOperations() as operations:
        assert sum(1 for _ in batches) == 10_000
    assert operations.count < 0.05 * len(batches)


class CountedOperations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("batch_size", [0, -1, 11])
def test_unusable_batch_size(batch_size):
    with pytest.raises(InputError, match=rf"batch_size={batch_size} is not usable. Accepted: 1 to 10, the number of"):
        numbered(10, batch_size)


def test_lengths_must_agree():
    with pytest.raises(InputError, match=r"len\(y\)=9 is not usable. Accepted: 10"):
        TensorBatches(torch.zeros(10, 2), torch.zeros(9), 2)
    with pytest.raises(InputError, match=r"len\(y\)=9"):
        TensorPairs(torch.zeros(10, 2), torch.zeros(9))
    with pytest.raises(InputError, match=r"len\(x\)=0"):
        TensorBatches(torch.zeros(0, 2), torch.zeros(0), 2)


@pytest.mark.parametrize("other", [{"n": 21}, {"batch_size": 3}, {"shuffle": False}])
def test_a_state_of_other_settings_is_refused(other):
    own = {"n": 20, "batch_size": 2, "shuffle": True}
    batches = numbered(**(own | other))
    with pytest.raises(InputError, match="as in the saved state"):
        batches.load_state_dict(numbered(**own).state_dict())


def test_pairs_are_indexed_by_number_slice_list_and_tensor():
    pairs = numbered(10, 2).dataset
    assert len(pairs) == 10
    assert pairs[3][1] == 30
    for index in (slice(2, 5), [2, 3, 4], torch.tensor([2, 3, 4])):
        x, y = pairs[index]
        assert x[:, 0].tolist() == [2, 3, 4]
        assert y.tolist() == [20, 30, 40]

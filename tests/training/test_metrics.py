"""Means over samples: every batch counts by its size, however the values are gathered."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from normlab.training.metrics import POOL, MetricMean, SampleMean, accuracy, mean_over_samples

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=600)


def test_accuracy_is_the_share_of_right_answers():
    output = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.4, 0.6]])
    assert accuracy(output, torch.tensor([1, 0, 0])) == pytest.approx(2 / 3)
    assert accuracy(output, torch.tensor([1, 0, 1])) == 1
    assert accuracy(output, torch.tensor([0, 1, 0])) == 0


@settings(deadline=None)  # of a busy machine
@given(SIZES, st.integers(0, 5))
def test_a_mean_counts_every_value_by_its_samples(sizes, seed):
    values = torch.randn(len(sizes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean = SampleMean()
    for value, size in zip(values, sizes, strict=True):
        mean.add(value, size)
    expected = math.fsum(v * n for v, n in zip(values.tolist(), sizes, strict=True)) / sum(sizes)
    assert mean.value() == pytest.approx(expected, abs=1e-12)
    assert mean.value() == pytest.approx(expected, abs=1e-12)  # asking changes nothing


def test_a_mean_goes_on_after_it_was_asked():
    mean = SampleMean()
    mean.add(torch.tensor(1.0), 1)
    assert mean.value() == 1
    mean.add(torch.tensor(4.0), 2)
    assert mean.value() == 3


def test_nothing_has_no_mean():
    assert math.isnan(SampleMean().value())
    assert math.isnan(MetricMean(accuracy).value())


def test_an_empty_batch_counts_for_nothing_and_nan_is_not_hidden():
    mean = SampleMean()
    mean.add(torch.tensor(2.0), 3)
    mean.add(torch.tensor(math.nan), 0)
    assert mean.value() == 2
    mean.add(torch.tensor(math.nan), 1)
    assert math.isnan(mean.value())


def batches(sizes: list[int], classes: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(len(sizes))
    return [
        (torch.randn(n, classes, generator=generator), torch.randint(classes, (n,), generator=generator)) for n in sizes
    ]


@settings(deadline=None)  # of a busy machine
@given(SIZES)
@example([1] * 512 + [5] * 100)  # computed in two parts
def test_the_mean_of_a_metric_is_that_over_all_samples(sizes):
    data = batches(sizes)
    mean = MetricMean(accuracy)
    for batch in data:
        mean.add(*batch)
    right = sum(int((output.argmax(1) == targets).sum()) for output, targets in data)
    assert mean.value() == pytest.approx(right / sum(sizes), abs=1e-6)


@pytest.mark.parametrize(("marked", "computed_for"), [(False, [4, 4, 1]), (True, [9])])
def test_a_marked_metric_is_computed_for_many_batches_at_once_any_other_for_each(marked, computed_for):
    calls = []

    def size(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        return torch.tensor(float(len(targets)))

    mean = MetricMean(mean_over_samples(size) if marked else size)
    for batch in batches([4, 4, 1]):
        mean.add(*batch)
    assert mean.value() == pytest.approx(sum(n * n for n in computed_for) / 9)
    assert calls == computed_for


def test_what_is_pooled_is_bounded():
    calls = []

    @mean_over_samples
    def size(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        return torch.tensor(1.0)

    mean = MetricMean(size)
    for batch in batches([1] * 1100, classes=2):
        mean.add(*batch)
    assert calls == [512, 512]
    mean = MetricMean(size)
    calls.clear()
    for batch in batches([POOL // 8] * 3, classes=8):
        mean.add(*batch)
    assert calls == [POOL // 8] * 3

"""Means over samples: every batch counts by its size, however the values are gathered."""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from normlab.errors import InputError
from normlab.training.metrics import (
    POOL,
    MetricMean,
    SampleMean,
    accuracy,
    dice,
    mean_iou,
    mean_of,
    mean_over_samples,
)

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


def some_maps(single: bool, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and classes; the second image has no foreground."""
    generator = torch.Generator().manual_seed(seed)
    classes = 1 if single else 4
    targets = torch.randint(2 if single else 4, (5, 6, 7), generator=generator)
    targets[1] = 0
    return torch.randn(5, classes, 6, 7, generator=generator), targets


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize(("ours", "theirs"), [(dice, "DiceMetric"), (mean_iou, "MeanIoU")])
def test_overlap_is_monais(ours, theirs, background, single, seed):
    metrics = pytest.importorskip("monai.metrics")
    output, targets = some_maps(single, seed)
    found = output[:, 0] > 0 if single else output.argmax(1)
    one_hot = [torch.nn.functional.one_hot(part.long(), 2 if single else 4).movedim(-1, 1) for part in (found, targets)]
    metric = getattr(metrics, theirs)(include_background=background, reduction="mean")
    metric(*one_hot)
    mean = MetricMean(partial(ours, background=background))
    for part in (slice(0, 2), slice(2, 5)):
        mean.add(output[part], targets[part])
    assert mean.value() == pytest.approx(float(metric.aggregate()), abs=1e-6)
    torch.testing.assert_close(ours(output, targets[:, None]), ours(output, targets), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("targets", [torch.zeros(5, 6), torch.zeros(5, 6, 7), torch.zeros(5, 7, 6, dtype=torch.long)])
def test_targets_of_another_shape_or_kind_are_refused(targets):
    with pytest.raises(InputError, match=r"targets='torch.* of .*whole numbers .* of \(5, 6, 7\)"):
        dice(some_maps(False, 0)[0], targets)


def test_objects_of_torchmetrics_and_monai_add_up_batches_themselves():
    torchmetrics, metrics = pytest.importorskip("torchmetrics"), pytest.importorskip("monai.metrics")
    data = batches([4, 4, 1])
    ours, theirs = (
        MetricMean(accuracy),
        mean_of(torchmetrics.classification.MulticlassAccuracy(3, average="micro"), "a"),
    )
    f1 = metrics.ConfusionMatrixMetric(metric_name="f1 score", reduction="mean")
    of_monai = mean_of(f1, "f1")
    assert math.isnan(theirs.value())
    for output, targets in data:
        ours.add(output, targets)
        theirs.add(output, targets)
        hot = [torch.nn.functional.one_hot(part, 3) for part in (output.argmax(1), targets)]
        of_monai.add(*hot)
    assert theirs.value() == pytest.approx(ours.value(), abs=1e-6)
    assert 0 < of_monai.value() < 1


def test_the_state_of_a_metric_goes_on():
    torchmetrics = pytest.importorskip("torchmetrics")
    made = lambda: mean_of(torchmetrics.classification.MulticlassAccuracy(3, average="micro"), "a")  # noqa: E731
    whole, before, after = made(), made(), made()
    data = batches([4, 4, 1])
    for number, batch in enumerate(data):
        whole.add(*batch)
        (before if number < 2 else after).add(*batch)
        if number == 1:
            after.load_state_dict(before.state_dict())
    assert after.value() == whole.value()


def test_several_figures_are_refused():
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = mean_of(torchmetrics.classification.MulticlassAccuracy(3, average=None), "a")
    metric.add(*batches([4])[0])
    with pytest.raises(InputError, match=r"Metrics\(a=…\): figure='a tensor \(3,\)' is not usable"):
        metric.value()

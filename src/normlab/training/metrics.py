"""Figures of an epoch: means over its samples, not over its batches."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, check
from .batches import count_samples

Metric = Callable[[Any, Any], Any]
Total = Callable[..., Sequence[float]]

# Elements of output that are pooled before a metric is computed once for all of them.
POOL = 1 << 14


def own(*values: float) -> Sequence[float]:
    """The sums over all processes, where there is one."""
    return values


def mean_over_samples(metric: Metric) -> Metric:
    """Mark a metric that is a mean over samples: of two batches together it is then computed once, which is faster."""
    metric.mean_over_samples = True  # pyright: ignore[reportFunctionMemberAccess]
    return metric


@mean_over_samples
def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose largest output, along dimension 1, is that of the target class."""
    return (output.argmax(1) == targets).float().mean()


def dice(output: Tensor, targets: Tensor, background: bool = False) -> Tensor:
    """The Dice score of each image, 2|P∩T| / (|P| + |T|), the mean over the classes that its target has.

    Args:
        output: (N, K, *space), a score for each class; or (N, 1, *space), above 0 where the one class is predicted.
        targets: (N, *space) or (N, 1, *space), the class of each position, whole numbers.
        background: whether class 0 counts too.

    Returns:
        (N,); NaN for an image without a class that counts, which a mean leaves out.

    Source: Dice 1945; as MONAI's `DiceMetric(include_background=False, reduction="mean")`.
    """
    both, predicted, true = _overlaps(output, targets, background)
    return _mean_of_classes(2 * both / (predicted + true), true)


def mean_iou(output: Tensor, targets: Tensor, background: bool = False) -> Tensor:
    """The intersection over union of each image, |P∩T| / |P∪T|, the mean over the classes that its target has.

    Arguments and what is returned as for `dice`.

    Source: Jaccard 1912; as MONAI's `MeanIoU(include_background=False, reduction="mean")`.
    """
    both, predicted, true = _overlaps(output, targets, background)
    return _mean_of_classes(both / (predicted + true - both), true)


def _overlaps(output: Tensor, targets: Tensor, background: bool) -> tuple[Tensor, Tensor, Tensor]:
    """How many positions of each class, (N, K), are right, are predicted, and are true."""
    if targets.dim() == output.dim():
        targets = targets.squeeze(1)
    single = output.shape[1] == 1
    found, classes = (output[:, 0] > 0, 2) if single else (output.argmax(1), output.shape[1])
    expected = (output.shape[0], *output.shape[2:])
    fits = tuple(targets.shape) == expected and not targets.is_floating_point()
    came = f"{targets.dtype} of {tuple(targets.shape)}"
    check(fits, "targets", came, f"whole numbers (the class of each position) of {expected}")
    one_hot = [torch.nn.functional.one_hot(part.flatten(1).long(), classes) for part in (found, targets)]
    p, t = (part[..., 0 if background else 1 :].to(torch.float64) for part in one_hot)
    return (p * t).sum(1), p.sum(1), t.sum(1)


def _mean_of_classes(scores: Tensor, true: Tensor) -> Tensor:
    there = true > 0
    counts = there.sum(1)
    return (torch.where(there, scores, 0).sum(1) / counts).float()


class SampleMean:
    """The mean of a figure over samples: every value counts as many times as it has samples.

    Values are kept as tensors and added up in blocks, so that a GPU is not made to wait at every step.
    """

    def __init__(self) -> None:
        self._total, self._samples = 0.0, 0
        self._values: list[Tensor] = []
        self._weights: list[int] = []

    def add(self, value: Tensor, samples: int) -> None:
        """Count `value` (a scalar without a graph) for so many samples."""
        self._values.append(value)
        self._weights.append(samples)
        if len(self._values) == 256:
            self._flush()

    def value(self, total: Total = own) -> float:
        """The mean so far; nan if nothing was added.

        Args:
            total: the sums over all processes, of those of this one.
        """
        self._flush()
        figures, samples = total(self._total, self._samples)
        return figures / samples if samples else float("nan")

    def state_dict(self) -> dict[str, Any]:
        """All that was added."""
        return {
            "total": self._total,
            "samples": self._samples,
            "values": list(map(torch.as_tensor, self._values)),
            "weights": list(self._weights),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._total, self._samples = state["total"], state["samples"]
        self._values, self._weights = list(state["values"]), list(state["weights"])

    def _flush(self) -> None:
        if self._values:
            values = torch.stack(list(map(_scalar, self._values))).tolist()
            self._total += sum(v * w for v, w in zip(values, self._weights, strict=True) if w)
            self._samples += sum(self._weights)
            self._values, self._weights = [], []


def _scalar(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) and not value.dim() else torch.as_tensor(value).reshape(())


class MetricMean:
    """The mean over samples of a metric; one marked `mean_over_samples` is computed for several batches at once.

    Args:
        metric: of output and targets.
        name: for errors.
    """

    def __init__(self, metric: Metric, name: str = "metric"):
        self.metric, self.name = metric, name
        self._mean = SampleMean()
        self._pooled = getattr(metric, "mean_over_samples", False)
        self._shapes: Any = None  # of the newest of what is pooled
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._elements = 0

    def add(self, output: Any, targets: Any, samples: int | None = None) -> None:
        """Count a batch, of so many samples (by default as many as targets); no tensor in it may hold a graph.

        Raises:
            InputError: the metric cannot take the batch, or gives no single figure.
        """
        if not (self._pooled and isinstance(output, Tensor) and isinstance(targets, Tensor)):
            samples = count_samples(output, targets) if samples is None else samples
            if samples == 0:  # the part of one of several processes
                return
            figure = self._figure(output, targets, samples)
            if isinstance(figure, Tensor) and figure.dim():
                there = figure[~figure.isnan()].double()
                figure, samples = there.mean(), len(there)
            self._mean.add(figure, samples)
            return
        others = self._outputs and (output.shape, targets.shape) != self._shapes
        if others and _sizes(output, targets) != _sizes(self._outputs[0], self._targets[0]):
            self._flush()  # images of another size cannot be joined with these
        self._shapes = output.shape, targets.shape
        self._outputs.append(output)
        self._targets.append(targets)
        self._elements += output.numel()
        if self._elements >= POOL or len(self._outputs) == 512:
            self._flush()

    def value(self, total: Total = own) -> float:
        """As that of `SampleMean`."""
        self._flush()
        return self._mean.value(total)

    def state_dict(self) -> dict[str, Any]:
        """All that was added, also what is not computed yet."""
        pooled = {"outputs": list(self._outputs), "targets": list(self._targets), "elements": self._elements}
        return {"mean": self._mean.state_dict(), **pooled}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._mean.load_state_dict(state["mean"])
        self._outputs, self._targets = list(state["outputs"]), list(state["targets"])
        self._elements = state["elements"]

    def _flush(self) -> None:
        if self._outputs:
            targets = torch.cat(self._targets)
            self._mean.add(self.metric(torch.cat(self._outputs), targets), len(targets))
            self._outputs, self._targets, self._elements = [], [], 0

    def _figure(self, output: Any, targets: Any, samples: int) -> Any:
        try:
            figure = self.metric(output, targets)
        except Exception as error:  # of the user's function, whatever it raises on a structure
            if isinstance(output, Tensor) and isinstance(targets, Tensor):
                raise
            raise InputError(
                f"Metrics({self.name}=…): cannot take an output {type(output).__name__} with targets "
                f"{type(targets).__name__} ({type(error).__name__}: {error}). Give it the part it needs: "
                f"Metrics({self.name}=lambda output, targets: metric(output[0], targets))."
            ) from error
        if isinstance(figure, Tensor):
            figure = figure.reshape(()) if figure.numel() == 1 and samples != 1 else figure
            single = figure.numel() == 1 or tuple(figure.shape) == (samples,)
            what = f"a tensor {tuple(figure.shape)} of {samples} samples"
        else:
            single, what = hasattr(figure, "__float__"), type(figure).__name__
        if not single:
            raise InputError(f"Metrics({self.name}=…): expected one figure of each batch or sample, got {what}.")
        return figure


class MetricOfBatches:
    """The figure of a metric that adds up batches itself: with `update`, `compute` and `reset`, or MONAI's.

    Args:
        metric: an object as those of torchmetrics, or of MONAI, which has `aggregate` and is called.
        name: for errors.
    """

    def __init__(self, metric: Any, name: str = "metric"):
        self.metric, self.name = metric, name
        self._update = metric if hasattr(metric, "aggregate") else metric.update
        self._compute = metric.aggregate if hasattr(metric, "aggregate") else metric.compute
        self._added = 0
        metric.reset()
        if hasattr(metric, "persistent"):  # torchmetrics keep no state for a checkpoint unless they are asked to
            metric.persistent(True)

    def add(self, output: Any, targets: Any, samples: int | None = None) -> None:
        """Count a batch."""
        self._update(output, targets)
        self._added += 1

    def value(self, total: Total = own) -> Any:
        """The figure so far; nan if nothing was added. The object itself puts those of several processes together.

        Raises:
            InputError: it is not one.
        """
        if not self._added:
            return float("nan")
        figure: Any = self._compute()
        figure = figure[0] if isinstance(figure, list | tuple) and len(figure) == 1 else figure
        single = figure.numel() == 1 if isinstance(figure, Tensor) else hasattr(figure, "__float__")
        what = f"a tensor {tuple(figure.shape)}" if isinstance(figure, Tensor) else type(figure).__name__
        check(single, f"Metrics({self.name}=…): figure", what, "one figure", 'Give it reduction="mean", or a function.')
        return float(figure)

    def state_dict(self) -> dict[str, Any]:
        """What was added, if the metric can say it."""
        state = self.metric.state_dict() if hasattr(self.metric, "state_dict") else {}
        return {"metric": dict(state), "added": self._added}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if state["metric"]:
            self.metric.load_state_dict(state["metric"])
            self._added = state["added"]
        elif state["added"]:
            warnings.warn(
                f"Metrics({self.name}=…): {type(self.metric).__name__} keeps no state. Its figure of this epoch is "
                f"over the batches from here on; {state['added']} were before.",
                stacklevel=2,
            )


def mean_of(metric: Any, name: str) -> MetricMean | MetricOfBatches:
    """What gathers a metric over batches: a function's mean over samples, or the object's own."""
    return MetricOfBatches(metric, name) if _adds_up_itself(metric) else MetricMean(metric, name)


def _adds_up_itself(metric: Any) -> bool:
    return hasattr(metric, "reset") and (
        hasattr(metric, "aggregate") or (hasattr(metric, "update") and hasattr(metric, "compute"))
    )


def _sizes(output: Tensor, targets: Tensor) -> tuple[torch.Size, torch.Size]:
    return output.shape[1:], targets.shape[1:]

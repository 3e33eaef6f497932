"""Figures of an epoch: means over its samples, not over its batches."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .batches import count_samples

Metric = Callable[[Any, Any], Any]

# Elements of output that are pooled before a metric is computed once for all of them.
POOL = 1 << 14


def mean_over_samples(metric: Metric) -> Metric:
    """Mark a metric that is a mean over samples: of two batches together it is then computed once, which is faster."""
    metric.mean_over_samples = True  # pyright: ignore[reportFunctionMemberAccess]
    return metric


@mean_over_samples
def accuracy(output: Tensor, targets: Tensor) -> Tensor:
    """Share of samples whose largest output, along dimension 1, is that of the target class."""
    return (output.argmax(1) == targets).float().mean()


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

    def value(self) -> float:
        """The mean so far; nan if nothing was added."""
        self._flush()
        return self._total / self._samples if self._samples else float("nan")

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
            values = torch.stack([torch.as_tensor(value).reshape(()) for value in self._values]).tolist()
            self._total += sum(v * w for v, w in zip(values, self._weights, strict=True) if w)
            self._samples += sum(self._weights)
            self._values, self._weights = [], []


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
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._elements = 0

    def add(self, output: Any, targets: Any, samples: int | None = None) -> None:
        """Count a batch, of so many samples (by default as many as targets); no tensor in it may hold a graph.

        Raises:
            InputError: the metric cannot take the batch, or gives no single figure.
        """
        if not (self._pooled and isinstance(output, Tensor) and isinstance(targets, Tensor)):
            self._mean.add(
                self._figure(output, targets), count_samples(output, targets) if samples is None else samples
            )
            return
        if self._outputs and _sizes(output, targets) != _sizes(self._outputs[0], self._targets[0]):
            self._flush()  # images of another size cannot be joined with these
        self._outputs.append(output)
        self._targets.append(targets)
        self._elements += output.numel()
        if self._elements >= POOL or len(self._outputs) == 512:
            self._flush()

    def value(self) -> float:
        """The mean so far; nan if nothing was added."""
        self._flush()
        return self._mean.value()

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

    def _figure(self, output: Any, targets: Any) -> Any:
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
            single, what = figure.numel() == 1, f"a tensor {tuple(figure.shape)}"
        else:
            single, what = hasattr(figure, "__float__"), type(figure).__name__
        if not single:
            raise InputError(f"Metrics({self.name}=…): expected one figure of each batch, got {what}.")
        return figure


def _sizes(output: Tensor, targets: Tensor) -> tuple[torch.Size, torch.Size]:
    return output.shape[1:], targets.shape[1:]

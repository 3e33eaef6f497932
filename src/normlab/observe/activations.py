"""Mean and deviation of what each layer puts out, batch by batch."""

from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Hook


class ActivationStats:
    """Records mean and standard deviation of the modules' outputs at every training batch, while it is open.

        with ActivationStats(dict(model.named_children())) as stats:
            learner.fit(1)
        plot_activations(stats)

    Args:
        modules: by the name they shall have in a plot.

    Attributes:
        means: by name, a number a training batch.
        deviations: by name, likewise.
    """

    def __init__(self, modules: dict[str, nn.Module]):
        self.modules = modules
        self._values: dict[str, list[Tensor]] = {name: [] for name in modules}

    @property
    def means(self) -> dict[str, list[float]]:
        return self._figures(0)

    @property
    def deviations(self) -> dict[str, list[float]]:
        return self._figures(1)

    def __enter__(self) -> "ActivationStats":
        self._hooks = [Hook(module, self._recorder(self._values[name])) for name, module in self.modules.items()]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _recorder(values: list[Tensor]):
        def record(hook: Hook, module: nn.Module, inputs: Any, output: Tensor) -> None:
            if module.training:
                values.append(mean_and_deviation(output))

        return record

    def _figures(self, which: int) -> dict[str, list[float]]:
        return {name: torch.stack(values)[:, which].tolist() if values else [] for name, values in self._values.items()}


def mean_and_deviation(x: Tensor) -> Tensor:
    """(2,): mean and population standard deviation of all elements, in float32 at least, without a graph."""
    x = x.detach().flatten()
    var, mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), correction=0)
    return torch.stack((mean, var.sqrt()))


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The direct children of `model` that have parameters, named by place and kind: `0 Sequential`."""
    children = model.named_children()
    return {
        f"{name} {type(child).__name__}": child for name, child in children if any(True for _ in child.parameters())
    }

"""Which layer a norm follows, and which norms a rectifier follows: seen by running the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
RECTIFIERS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "threshold"}
HOMOGENEOUS = {"relu", "relu_", "leaky_relu", "leaky_relu_"}  # a norm after them takes no notice of a weight's length


class Neighbours(TorchFunctionMode):
    """Sees, while it is `watching`, what stands before and after each norm.

    Attributes:
        layer_before: the convolution or linear layer that a norm follows, directly or after a rectifier.
        rectified: the norms that a rectifier follows, or that are one.
    """

    def __init__(self, all_norms: list[nn.Module]):
        super().__init__()
        self.layer_before: dict[nn.Module, nn.Module] = {}
        self.rectified = {norm for norm in all_norms if getattr(norm, "activation", None) == "relu"}
        self._norms = set(all_norms)
        self._made: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensor too, so that its id is not another's

    def weights(self) -> list[Tensor]:
        """Those of the layers before norms."""
        return [layer.get_parameter("weight") for layer in self.layer_before.values()]

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        handles = [
            module.register_forward_hook(self._left)
            for module in model.modules()
            if module in self._norms or isinstance(module, LAYERS)
        ]
        handles += [norm.register_forward_pre_hook(self._given) for norm in self._norms]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._made.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if args and id(args[0]) in self._made:
            maker = self._made[id(args[0])][1]
            if maker in self._norms:
                self.rectified |= {maker} if name in RECTIFIERS else set()
            elif name in HOMOGENEOUS:
                self._made[id(output)] = output, maker
        return output

    def _left(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._made[id(output)] = output, module

    def _given(self, norm: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs and id(inputs[0]) in self._made:
            maker = self._made[id(inputs[0])][1]
            if maker not in self._norms:
                self.layer_before[norm] = maker

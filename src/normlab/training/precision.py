"""Mixed precision: what a training step does in bfloat16 or float16, and when it is left out."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check, unknown

DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Precision:
    """The precision of forward pass and loss, by its name.

    With float16 the loss is multiplied by a scale that adapts. A step whose gradient overflows is left out, and tells
    nothing to statistics: the model's buffers are then those from before the step's batches.

    Raises:
        InputError: the name is unknown.
    """

    def __init__(self, name: str):
        if name not in DTYPES:
            raise unknown("precision", name, DTYPES)
        self.name, self.dtype = name, DTYPES[name]
        self._scaler: torch.amp.GradScaler | None = None
        self._buffers: list[Tensor] | None = None  # before the batches of this step
        self._scales = False  # whether norms remember gradients with the scale

    def autocast(self, model: nn.Module) -> AbstractContextManager[Any]:
        """In which the forward pass runs."""
        if self.dtype is None:
            return nullcontext()
        device = next((part.device.type for part in model.parameters()), "cpu")
        if self.dtype is torch.float16 and model.training:
            if self._scaler is None:
                self._scaler = torch.amp.GradScaler(device)
            if not self._scales:
                self._scales = True
                _rescale_norms(model, self._scaler.get_scale())
            if self._buffers is None:
                self._buffers = [buffer.clone() for buffer in model.buffers()]
        return torch.autocast(device, self.dtype)

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss whose backward pass is taken."""
        return loss if self._scaler is None else self._scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divides the gradients by the scale."""
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer, model: nn.Module, closure: Callable[[], float] | None) -> bool:
        """A step of the optimizer, unless a gradient overflowed; whether it was made."""
        if self._scaler is None:
            optimizer.step() if closure is None else optimizer.step(closure)
            return True
        check(closure is None, "precision", self.name, f"float32 or bfloat16 with {type(optimizer).__name__}")
        scale = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        before, self._buffers = self._buffers, None
        stepped = self._scaler.get_scale() >= scale
        if not stepped:
            for buffer, value in zip(model.buffers(), before or (), strict=True):
                buffer.copy_(value)
        _rescale_norms(model, self._scaler.get_scale() / scale)
        return stepped

    def end(self, model: nn.Module) -> None:
        """After a fit: norms remember gradients without the scale."""
        self._buffers = None
        if self._scales and self._scaler is not None:
            self._scales = False
            _rescale_norms(model, 1 / self._scaler.get_scale())

    def state_dict(self) -> dict[str, Any]:
        """The loss scale, and buffers from before a step that is not made yet."""
        state: dict[str, Any] = {"precision": self.name}
        if self._scaler is not None:
            state["scaler"], state["scales"] = self._scaler.state_dict(), self._scales
        if self._buffers is not None:
            state["buffers"] = [buffer.clone() for buffer in self._buffers]
        return state

    def load_state_dict(self, state: dict[str, Any], device: str) -> None:
        """Go on with a saved scale.

        Raises:
            InputError: it is that of another precision.
        """
        check(state["precision"] == self.name, "precision", self.name, f"{state['precision']}, as in the saved state")
        if "scaler" in state:
            self._scaler = torch.amp.GradScaler(device)
            self._scaler.load_state_dict(state["scaler"])
            self._scales = state["scales"]
        self._buffers = state.get("buffers")


def _rescale_norms(model: nn.Module, factor: float) -> None:
    """Norms that remember gradients see those of the scaled loss."""
    for module in model.modules() if factor != 1 else ():
        rescale = getattr(module, "rescale_gradients", None)
        if rescale is not None:
            rescale(factor)

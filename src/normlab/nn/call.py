"""A call of a norm with whatever may stand for a tensor: subclasses, and what tracers hand in."""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import InputError

PLAIN = (Tensor, nn.Parameter)
Forward = TypeVar("Forward", bound=Callable[..., Tensor])
SPACES = {2: "", 3: ", L", 4: ", H, W", 5: ", D, H, W"}


class ShapeError(InputError, RuntimeError):
    """An input of another shape than a layer takes. Torch's layers raise either of ValueError and RuntimeError."""


def refuse(layer: Any, expected: str, found: object, cure: str = "", kind: type = InputError) -> NoReturn:
    """An error that names the layer, what it expected, what came instead, and the cure."""
    raise kind(f"{type(layer).__name__}({layer.num_features}): expected {expected}, got {found}.{cure}")


def refuse_shape(layer: Any, x: Tensor, channels: int, dims: Iterable[int] | None = None) -> NoReturn:
    """The same of an input, expected to be (N, `channels`, *space), of as many dimensions as one of `dims`."""
    spaces = [", *space"] if dims is None else [SPACES[number] for number in dims]
    refuse(
        layer, "input " + " or ".join(f"(N, {channels}{space})" for space in spaces), tuple(x.shape), kind=ShapeError
    )


def call(norm: Any, input: Tensor, mask: Tensor | None, *residual: Tensor | None) -> Tensor:
    """The norm's `_normalize`, of plain tensors; the output is of the class that torch's own norms would give.

    A proxy of `torch.fx` becomes a call of the whole layer, as for the layers in `torch.nn`.

    Raises:
        InputError: the input is no tensor, or of no floating dtype; or the mask or residual has another shape.
        RuntimeError: the storage of a tensor was freed.
    """
    if mask is None and type(input) in PLAIN and (not residual or residual[0] is None or type(residual[0]) in PLAIN):
        return _normalize(norm, input, None, *residual)
    if isinstance(input, fx.Proxy):
        return _node(norm, input, mask, *residual)
    if not isinstance(input, Tensor):
        refuse(norm, "a tensor as input", type(input).__name__)
    if has_torch_function((input, *residual)):
        return handle_torch_function(_Plain(norm), (input, *residual), input, mask, *residual)
    return _Plain(norm)(input, mask, *residual)


def _normalize(norm: Any, x: Tensor, mask: Tensor | None, *residual: Tensor | None) -> Tensor:
    if not x.is_floating_point():  # else whole numbers would be rounded, and imaginary parts lost
        refuse(norm, "an input of a floating dtype", x.dtype)
    if residual and residual[0] is not None and residual[0].shape != x.shape:
        refuse(norm, f"residual {tuple(x.shape)}, the shape of the input", tuple(residual[0].shape))
    if not norm._checks_memory:
        norm._check_memory(x)
    return norm._normalize(x, mask, *residual)


class _Plain:
    """A norm as one of torch's functions, on what is in memory of its arguments' classes."""

    def __init__(self, norm: Any):
        self.norm = norm
        self.__name__ = type(norm).__name__

    def __call__(self, input: Tensor, mask: Tensor | None, *residual: Tensor | None) -> Tensor:
        x = plain(input)
        over = None if mask is None else checked_mask(self.norm, plain(mask), x)
        return _normalize(self.norm, x, over, *(None if part is None else plain(part) for part in residual))


def plain(x: Tensor) -> Tensor:
    """`x` without its class, unless that says what operators do on memory, as `DTensor` does."""
    kind = type(x)
    on_memory = kind.__torch_dispatch__ is Tensor.__torch_dispatch__  # pyright: ignore[reportAttributeAccessIssue]
    return x.as_subclass(Tensor) if kind not in PLAIN and on_memory else x


def checked_mask(norm: Any, mask: Tensor, x: Tensor) -> Tensor:
    """A mask of (N, *space) for the input `x`, as (N, 1, *space).

    Raises:
        InputError: it is not bool, or of another shape.
    """
    expected = (x.shape[0], *x.shape[2:])
    if mask.dtype is not torch.bool or tuple(mask.shape) != expected:
        given = f"{mask.dtype} of {tuple(mask.shape)}"
        refuse(norm, f"mask torch.bool of {expected}, (N, *space) of the input", given)
    return mask.unsqueeze(1)


def _node(norm: nn.Module, input: fx.Proxy, mask: Any, *residual: Any) -> Any:
    """A call of the layer in the graph that is being traced.

    Raises:
        TraceError: the layer is all there is, or its class has a forward pass of its own, which a call would repeat.
    """
    kind, root = type(norm), getattr(input.tracer, "root", None)
    if norm is root or getattr(kind.forward, "__wrapped__", None) is not _in_script:
        where = "is the model itself" if norm is root else "has a forward pass of its own"
        raise TraceError(f"{kind.__name__} {where}: torch.fx calls our layers as a whole. Make it a leaf.")
    named = {"mask": mask, "residual": residual[0] if residual else None}
    named = {name: value for name, value in named.items() if value is not None}
    target = input.tracer.path_of_module(norm)  # pyright: ignore[reportAttributeAccessIssue]
    return input.tracer.create_proxy("call_module", target, (input,), named)


def for_script(forward: Forward) -> Forward:
    """Has TorchScript compile the norm's `_scripted`: it knows no keyword-only arguments.

    TorchScript takes the source of the function that is wrapped, everyone else the function.
    """
    forward.__signature__ = inspect.signature(forward)  # pyright: ignore[reportFunctionMemberAccess]
    forward.__wrapped__ = _in_script  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def _in_script(self, input: Tensor) -> Tensor:
    return self._scripted(input)

"""Runs a model and sees who made each tensor, how each norm was called, and who used what it was given."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .outputs import tensors
from .places import OWN
from .probe import version

LAYERS = (nn.modules.conv._ConvNd, nn.Linear)
CONVOLVES = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear"}
# Their output has the values of their input where it has its type, in evaluation mode.
KEEPS = {"contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type", "type_as", "cpu", "cuda"}
KEEPS |= {"dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
RECTIFIERS = {"relu", "relu_", "relu6", "hardtanh", "hardtanh_", "threshold"}
HOMOGENEOUS = {"relu", "relu_", "leaky_relu", "leaky_relu_"}  # a norm after them takes no notice of a weight's length
# Of a tensor these say what it is like, not what is in it.
LOOKS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point"}
LOOKS |= {"is_complex", "element_size", "get_device", "__len__", "storage_offset", "is_same_size", "has_names"}
VIEWS = {"T", "mT", "H", "mH", "data", "real", "imag", "grad"}  # attributes that are its values


class Made(NamedTuple):
    """A tensor that a layer put out, or that has its values.

    Attributes:
        tensor: kept, so that its id is not another's.
        layer: the one that made it.
        layer_input: what the layer was given.
        origin: the id of what the layer itself put out.
        version: of the layer's input then.
    """

    tensor: Tensor
    layer: nn.Module
    layer_input: Any
    origin: int
    version: int


class Call(NamedTuple):
    """How a norm was called.

    Attributes:
        input: what it normalises.
        key: by which keyword that came; None by position.
        args: what it was given beyond the input, by position.
        kwargs: by keyword, with the input if it came so.
        layer: the convolution or linear layer that made the input; None if none did.
        layer_input: what that layer was given.
    """

    input: Any
    key: str | None
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    layer: nn.Module | None
    layer_input: Any

    @property
    def why_not_replaced(self) -> str | None:
        """Why a module whose input is called `input` cannot be called so; None if it can."""
        return (
            None
            if self.key in (None, "input")
            else f"given its input as {self.key}=, which another module does not take"
        )

    @property
    def further(self) -> list[Any]:
        """What it was given beyond the input."""
        named = [value for key, value in self.kwargs.items() if key != self.key and value is not None]
        return [*(value for value in self.args if value is not None), *named]


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a norm normalises: its first argument, or `input=`, or the first that is given by keyword."""
    return args[0] if args else kwargs.get(str(_key(kwargs)))


def _key(kwargs: dict[str, Any]) -> str | None:
    return "input" if "input" in kwargs else next(iter(kwargs), None)


class Trace(TorchFunctionMode):
    """Sees one pass, inside `watching`; with `keep` the values too that a layer before a norm was given.

    Attributes:
        calls: each norm's calls, in order.
        outputs: what each norm put out in its last call.
        before: the convolution or linear layer that a norm follows, directly or after a rectifier.
        rectified: the norms that a rectifier follows, or that are one.
        outside: for each norm the functions that used its γ, β or statistics while it was not running.
    """

    def __init__(self, model: nn.Module, norms: list[nn.Module], keep: bool = False):
        super().__init__()
        self._keep = keep  # copies of values, since they may be written over
        self.model, self.names = model, {module: name for name, module in model.named_modules()}
        self.calls: dict[nn.Module, list[Call]] = {norm: [] for norm in norms}
        self.outputs: dict[nn.Module, Any] = {}
        self.before: dict[nn.Module, nn.Module] = {}
        self.rectified = {norm for norm in norms if getattr(norm, "activation", None) == "relu"}
        self.outside: dict[nn.Module, list[str]] = {}
        self._owners: dict[int, list[nn.Module]] = {}  # of weights
        for module in self.names:
            weight = None if isinstance(module, torch.jit.ScriptModule) else module._parameters.get("weight")
            if weight is not None:
                self._owners.setdefault(id(weight), []).append(module)
        self._parts: dict[int, list[nn.Module]] = {}  # the norms that have a tensor: several, if they share it
        for norm in norms:
            for part in (*norm._parameters.values(), *norm._buffers.values()):
                if part is not None:
                    self._parts.setdefault(id(part), []).append(norm)
        self._uses: dict[int, int] = {}  # of weights
        self._made: dict[int, Made] = {}  # by the tensor's id
        self._follows: dict[int, tuple[Tensor, nn.Module]] = {}  # made by it, or a rectifier after it
        self._users: dict[int, str] = {}  # by the id of the origin
        self._taken: dict[int, nn.Module] = {}  # the first norm that was given it, likewise
        self._hooked: dict[int, tuple[Tensor, str]] = {}  # what hooks of a module were given
        self._put_out: dict[int, tuple[Tensor, nn.Module]] = {}  # by layers, as modules
        self._running: list[nn.Module] = []

    def run(self, forward: Callable[[], Any]) -> Any:
        """What `forward` returns, while all is seen."""
        with self.watching():
            output = forward()
        for module, name in self.names.items() if self._keep else ():
            kept = {key: value for key, value in module.__dict__.items() if key not in OWN}
            for leaf in tree_leaves(kept):
                if id(leaf) in self._made:
                    self._users[self._made[id(leaf)].origin] = f"an attribute of {name or 'the model'}, which keeps it"
        for leaf in tensors(output):
            if id(leaf) in self._made:
                self._users[self._made[id(leaf)].origin] = "the model's output"
        return output

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what runs is seen."""
        handles = []
        for norm in self.calls:
            handles.append(norm.register_forward_pre_hook(self._begins, with_kwargs=True))
            handles.append(norm.register_forward_hook(self._ends, with_kwargs=True, always_call=True))
        layers = [module for module in self.names if isinstance(module, LAYERS)]
        handles += [layer.register_forward_hook(self._layer_ends) for layer in layers]
        hooked = [module for module in self.names if _has_hooks(module, self._own_hooks(module))]
        handles += [module.register_forward_hook(self._seen_by_hooks, with_kwargs=True) for module in hooked]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def why_used(self, call: Call) -> str | None:
        """Who else uses the tensor that a norm was given, of the layer before it; None if nobody does."""
        return self._users.get(self._made[id(call.input)].origin) if id(call.input) in self._made else None

    def hooks_on(self, call: Call, norm: nn.Module) -> str | None:
        """Which module's hooks were given the output of the layer before a norm; None if none were."""
        hooked = self._hooked.get(id(call.input), (None, None))[1]
        return self.names[norm] if hooked is None and _has_hooks(norm, own=0) else hooked

    def made_by(self, tensor: Any) -> nn.Module | None:
        """The module of a convolution's or linear layer's class that put a tensor out, whatever its weight."""
        return self._put_out.get(id(tensor), (None, None))[1]

    def weight_uses(self, layer: nn.Module) -> int:
        """How often a layer's weight was used, by itself or by others."""
        return self._uses.get(id(layer._parameters["weight"]), 0)

    def owners(self, layer: nn.Module) -> int:
        """How many modules have the weight of a layer."""
        return len(self._owners[id(layer._parameters["weight"])])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        look = name in LOOKS
        if name == "__get__":  # of an attribute
            name = func.__self__.__name__
            look = name not in VIEWS
        given = [] if look else [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        output = func(*args, **kwargs)
        if not look:
            self._see(name, given, args, kwargs, output)
        return output

    def _see(self, name: str, given: list[Tensor], args: Any, kwargs: Any, output: Any) -> None:
        for part in given:
            owners = self._parts.get(id(part), [])
            if not any(owner in self._running for owner in owners):
                for owner in owners:
                    self.outside.setdefault(owner, []).append(name)
            if id(part) in self._owners:
                self._uses[id(part)] = self._uses.get(id(part), 0) + 1
        if name in CONVOLVES:
            self._convolves(args, kwargs, output)
        made = [self._made[id(part)] for part in given if id(part) in self._made]
        if made and not self._running:
            if name in KEEPS and _keeps(made[0].tensor, output):
                self._made.setdefault(id(output), made[0]._replace(tensor=output))
            else:
                self._users.update((part.origin, name) for part in made)
        if args and isinstance(args[0], Tensor) and id(args[0]) in self._follows and isinstance(output, Tensor):
            self._rectifies(name, args[0], output)

    def _rectifies(self, name: str, given: Tensor, output: Tensor) -> None:
        maker = self._follows[id(given)][1]
        if maker in self.calls:
            self.rectified |= {maker} if name in RECTIFIERS else set()
        if name in KEEPS or (name in HOMOGENEOUS and maker not in self.calls):
            self._follows[id(output)] = output, maker

    def _convolves(self, args: Any, kwargs: Any, output: Any) -> None:
        """A convolution or product with a weight: whose it is."""
        x = args[0] if args else kwargs.get("input")
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        for layer in self._owners.get(id(weight), []):
            if layer._parameters.get("bias") is bias and isinstance(output, Tensor):
                self._made[id(output)] = Made(output, layer, x, id(output), version(x))
                self._follows[id(output)] = output, layer

    def _begins(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = input_of(args, kwargs)
        made = self._made.get(id(given))
        layer, layer_input = (None, None) if made is None else (made.layer, self._kept(made))
        if made is not None and self._taken.setdefault(made.origin, norm) is not norm:
            self._users[made.origin] = "another norm"
        self.calls[norm].append(Call(given, None if args else _key(kwargs), args[1:], kwargs, layer, layer_input))
        follows = self._follows.get(id(given), (None, None))[1]
        if follows is not None and follows not in self.calls:
            self.before[norm] = follows
        self._running.append(norm)

    def _kept(self, made: Made) -> Any:
        """A copy of what a layer was given; None if it was written over meanwhile."""
        given = made.layer_input
        if not self._keep or not isinstance(given, Tensor):
            return given
        written = given.is_inference() or given._version != made.version  # what is of inference does not say
        return None if written else given.detach().clone()

    def _ends(self, norm: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if norm in self._running:
            self._running.remove(norm)
        self.outputs[norm] = output.detach().clone() if self._keep and isinstance(output, Tensor) else output
        if isinstance(output, Tensor):
            self._follows[id(output)] = output, norm

    def _own_hooks(self, module: nn.Module) -> int:
        return 2 if module in self.calls else int(isinstance(module, LAYERS))

    def _layer_ends(self, layer: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._put_out[id(output)] = output, layer

    def _seen_by_hooks(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        for part in tensors((args, kwargs, output)):
            self._hooked.setdefault(id(part), (part, self.names[module]))


def _keeps(given: Tensor, output: Any) -> bool:
    """Whether the values went on as they were."""
    if not isinstance(output, Tensor) or output.shape != given.shape or output.dtype != given.dtype:
        return False
    return output.device == given.device and torch.equal(output.detach(), given.detach())


def _has_hooks(module: nn.Module, own: int) -> bool:
    """Whether it has other hooks beside the trace's own."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks) > own

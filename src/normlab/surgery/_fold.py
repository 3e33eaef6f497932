"""Norms folded into the convolutions and linear layers before them: fewer layers, the same function."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import check
from ..nn.activation import SLOPES
from .effect import evaluating
from .modules import Found, called, channels, copied, example, norms, put
from .report import Report, Row

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)
PARTS = ("weight", "bias", "running_mean", "running_var", "eps")  # of batch norm, whatever its class
TOLERANCE = 1e-5
# Of a tensor these say what it is like, not what is in it.
LOOKS = {"size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point"}
LOOKS |= {"is_complex", "element_size", "get_device", "__len__", "storage_offset", "is_same_size"}
VIEWS = {"T", "mT", "H", "mH", "data", "real", "imag"}  # attributes that are its values


def fold(model: nn.Module, *inputs: Any, **named_inputs: Any) -> tuple[nn.Module, Report]:
    """A copy of a model, for evaluation, whose norms are in the weights of the layers before them where that is exact.

        W ← W γ/√(σ² + eps)          b ← (b − μ) γ/√(σ² + eps) + β

    What follows what is seen by running the model: a norm with running statistics is folded if its input is the output
    of one convolution or linear layer, run once, and nothing else uses that output. In the norm's place comes its
    activation, if it has one, or `torch.nn.Identity`. So any model can be folded that runs, whatever its code is like;
    one that takes another way for other inputs has to take the usual one for these.

    Args:
        model: of any modules; is not changed.
        *inputs: of the model, real ones.
        **named_inputs: likewise.

    Returns:
        The folded model, in evaluation mode, and a report of every norm, folded or left, and why. Its `change` is the
        largest difference of the outputs for `inputs`, over their largest value; a model that draws random numbers
        draws the same ones for both.

    Raises:
        InputError: there are no inputs, or that change is above 1e-5 and not by rounding, which is seen by folding the
            model in float64; above 100 roundings, in half precision.
    """
    check(bool(inputs or named_inputs), "inputs", inputs, "inputs of the model")
    folded, report, eps = _folded(model, inputs, named_inputs)
    change = report.change or 0.0
    exact = change <= (TOLERANCE if eps < 1e-6 else 100 * eps) or _exact_in_float64(model, inputs, named_inputs)
    check(exact, "model", called(model), f"one whose folded output is its own, not another by {change:.2g}")
    return folded, report


def _folded(model: nn.Module, inputs: Any, named_inputs: Any) -> tuple[nn.Module, Report, float]:
    """The folded model, the report, and the relative rounding of the outputs."""
    folded = copied(model).eval()
    found = norms(folded)
    trace = _Trace(folded, [one.module for one in found])
    with evaluating(folded):
        before = trace.run(*_fresh(inputs), **_fresh(named_inputs))
    report = Report()
    for one in found:
        reason = trace.why_not(one)
        if reason is not None:
            report.rows.append(Row(one.name, called(one.module), None, reason))
            continue
        layer, activation = trace.layer_before(one.module), _activation(one.module)
        _fold(layer, one.module)
        folded = put(folded, one, activation)
        report.rows.append(Row(one.name, called(one.module), called(activation), f"in {trace.names[layer]}"))
    with evaluating(folded):
        after = folded(*_fresh(inputs), **_fresh(named_inputs))
    report.change = _difference(before, after)
    return folded, report, max((torch.finfo(part.dtype).eps for part in _values(before)), default=0.0)


def _exact_in_float64(model: nn.Module, inputs: Any, named_inputs: Any) -> bool:
    """Whether what differs is rounding, which the layers on the way may have magnified."""
    try:
        wide = _fresh((inputs, named_inputs), torch.float64)
        _, report, _ = _folded(copied(model).double(), *wide)
    except RuntimeError:  # the model makes tensors of a type of its own
        return False
    return report.change is not None and report.change <= TOLERANCE


def _fresh(inputs: Any, dtype: torch.dtype | None = None) -> Any:
    """Copies, since a model may write into what it is given; real numbers in another type, if one is given."""

    def copied_leaf(leaf: Any) -> Any:
        if not torch.is_tensor(leaf):
            return leaf
        return leaf.detach().clone().to(dtype if leaf.is_floating_point() else None)

    return tree_map(copied_leaf, inputs)


class _Trace(TorchFunctionMode):
    """Runs a model and sees which layer's output each norm is given, and who else uses that output."""

    def __init__(self, model: nn.Module, all_norms: list[nn.Module]):
        super().__init__()
        self.model, self.names = model, {module: name for name, module in model.named_modules()}
        self._norms = all_norms
        self._hooked = {module for module in self.names if module._forward_hooks or module._forward_pre_hooks}
        self._runs: dict[nn.Module, int] = {}
        self._made: dict[int, tuple[Tensor, nn.Module]] = {}  # the tensor too, so that its id is not another's
        self._given: dict[nn.Module, list[tuple[Any, ...]]] = {}
        self._users: dict[int, str] = {}
        self._inside: list[int] = []  # ids of what the norms that are running were given

    def run(self, *inputs: Any, **named_inputs: Any) -> Any:
        """The model's output."""
        handles = [module.register_forward_hook(self._left) for module in self.names if isinstance(module, LAYERS)]
        for norm in self._norms:
            handles.append(norm.register_forward_pre_hook(self._norm_begins, with_kwargs=True))
            handles.append(norm.register_forward_hook(self._norm_ends))
        try:
            with self:
                output = self.model(*inputs, **named_inputs)
        finally:
            for handle in handles:
                handle.remove()
        for leaf in tree_leaves(output):
            if id(leaf) in self._made:
                self._users[id(leaf)] = "the model's output"
        return output

    def layer_before(self, norm: nn.Module) -> nn.Module:
        """The layer whose output a norm is given."""
        return self._made[id(self._given[norm][0][0])][1]

    def why_not(self, found: Found) -> str | None:
        """Why a norm cannot be folded, or None."""
        norm, given = found.module, self._given.get(found.module, [])
        if getattr(norm, "running_mean", None) is None:
            return "has no running statistics: what it does depends on its input"
        if not is_affine(norm):
            return "is no scale and shift in evaluation"
        if len(given) != 1:
            return "run several times" if given else "not run with these inputs"
        if len(given[0]) != 1:
            return "given a residual"
        x = given[0][0]
        if id(x) not in self._made:
            return "what it is given does not come from a convolution or linear layer"
        layer = self._made[id(x)][1]
        name = self.names[layer]
        if self._runs[layer] != 1:
            return f"{name}, the layer before it, is run several times"
        if id(x) in self._users:
            return f"the output of {name}, the layer before it, is used elsewhere too: by {self._users[id(x)]}"
        if isinstance(layer, nn.Linear) and x.dim() != 2:
            return f"the channels of {name}, the layer before it, are not those of the norm"
        if parametrize.is_parametrized(layer):
            return f"the weight of {name}, the layer before it, is parametrized"
        if type(layer) not in LAYERS:
            return f"{name}, the layer before it, is a {called(layer)}, whose weight is not all it computes with"
        if sum(module._parameters.get("weight") is layer.weight for module in self.names) > 1:
            return f"the weight of {name}, the layer before it, is used by another layer too"
        if self._hooked & {layer, norm}:
            return "hooks see what is between it and the layer before it"
        return None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        look = name in LOOKS
        if name == "__get__":  # of an attribute
            name = func.__self__.__name__
            look = name not in VIEWS
        if not look:
            for leaf in tree_leaves((args, kwargs)):
                if id(leaf) in self._made and id(leaf) not in self._inside:
                    self._users[id(leaf)] = name
        return func(*args, **kwargs)

    def _left(self, layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._runs[layer] = self._runs.get(layer, 0) + 1
        self._made[id(output)] = output, layer

    def _norm_begins(self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = *args, *(value for value in kwargs.values() if value is not None)
        self._given.setdefault(norm, []).append(given)
        self._inside.append(id(given[0]))

    def _norm_ends(self, norm: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._inside.pop()


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Of each channel, in float64."""
    parts: Any = norm  # γ and β may be buffers too
    mean, var = parts.running_mean.double(), parts.running_var.double()
    scale = (var + parts.eps).rsqrt()
    if parts.weight is not None:
        scale = scale * parts.weight.detach().double()
    shift = -mean * scale
    return scale, shift if parts.bias is None else shift + parts.bias.detach().double()


def is_affine(norm: nn.Module) -> bool:
    """Whether in evaluation it is what its statistics, γ and β say, with the activation it has."""
    if not all(hasattr(norm, name) for name in PARTS):
        return False
    x = example(norm)
    scale, shift = _scale_and_shift(norm)
    along = (1, channels(norm), *[1] * (x.dim() - 2))
    with evaluating(norm):
        y = norm.forward(x)
        expected = _activation(norm)(scale.view(along) * x.double() + shift.view(along))
    close = 8 * max(torch.finfo(x.dtype).eps, 1e-5)
    return torch.allclose(y.double(), expected, rtol=close, atol=close * float(expected.abs().max()))


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    scale, shift = _scale_and_shift(norm)
    weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, …), the groups in the first dimension
        each = weight.shape[1]
        factor = scale.view(layer.groups, 1, each).expand(-1, len(weight) // layer.groups, -1).reshape(-1, each)
        factor = factor.view(*factor.shape, *[1] * (weight.dim() - 2))
    else:
        factor = scale.view(-1, *[1] * (weight.dim() - 1))
    new = shift if bias is None else shift + bias.detach().double() * scale
    layer.weight = nn.Parameter((weight.detach().double() * factor).to(weight.dtype), weight.requires_grad)
    layer.bias = nn.Parameter(new.to(weight.dtype), weight.requires_grad)


def _activation(norm: nn.Module) -> nn.Module:
    """The activation that a norm has, as a module of its own."""
    name = getattr(norm, "activation", None)
    if name is None:
        return nn.Identity()
    return nn.ReLU() if SLOPES[name] == 0 else nn.LeakyReLU(SLOPES[name])


def _values(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.is_floating_point()]


def _difference(before: Any, after: Any) -> float:
    """The largest difference of any value over the largest value of its tensor; infinite if only one of them is."""
    found = 0.0
    for one, other in zip(_values(before), _values(after), strict=True):
        finite = one.isfinite()
        if not torch.equal(finite, other.isfinite()):
            return float("inf")
        if finite.any():
            one, other = one[finite].double(), other[finite].double()
            largest = one.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
            found = max(found, ((one - other).abs().max() / largest).item())
    return found

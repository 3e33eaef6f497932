"""Norms folded into the convolutions and linear layers before them: fewer layers, the same function."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from ..errors import InputError, check
from .effect import looking
from .modules import Found, called, copied, norms, why_computed
from .operation import Operation
from .outputs import comparable, difference, tensors
from .probe import activation_of, is_affine, on_meta, scale_and_shift
from .report import Report, Row
from .trace import Call, Trace

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED, nn.Linear)
TOLERANCE = 1e-5


def fold(model: nn.Module, *inputs: Any, inplace: bool = False, **named_inputs: Any) -> Operation:
    """A copy of a model, for evaluation, whose norms are in the weights of the layers before them where that is exact.

        W ← W γ/√(σ² + eps)          b ← (b − μ) γ/√(σ² + eps) + β

    The model is run to see what follows what. A norm with running statistics is folded if its input is the output of
    one convolution or linear layer, which ran once, and nothing else uses that output. Modules that leave the values as
    they are, such as dropout in evaluation, may stand between. Its activation, if it has one, or `torch.nn.Identity`
    takes the norm's place. So any model that runs can be folded, whatever its code is like. If a model takes another
    way for other inputs, give inputs for which it takes the usual one.

    Every fold is checked on what the layer was given, and the outputs of the model are compared. A norm whose fold
    changes them is left, and its row says so.

    Args:
        model: of any modules. It is not changed, unless `inplace`.
        *inputs: of the model, real ones.
        inplace: fold the model itself, which is then in evaluation mode; for models that cannot be copied.
        **named_inputs: further inputs, by keyword.

    Returns:
        The folded model, in evaluation mode, and a report of every norm, folded or left, and why. Its `change` is the
        largest difference of the outputs for `inputs`, over their largest value; None if the model differs from itself,
        or gives no finite number, so that nothing can be compared. A model that draws random numbers draws the same
        ones for both.

    Raises:
        InputError: there are no inputs, or the outputs have no tensor in them.
    """
    check(bool(inputs or named_inputs), "inputs", inputs, "inputs of the model")
    target = model if inplace else copied(model)
    check_values(target)
    run = partial(_outputs, inputs=inputs, named_inputs=named_inputs)
    operation = Operation(target, Report())
    with operation.all_or_nothing():
        folding = _Folding(operation, run)
        folding.fold_all()
        for module in operation.model.modules():
            operation.on_undo(partial(setattr, module, "training", module.training))
            module.training = False
    return operation


def check_values(model: nn.Module) -> None:
    """An InputError for a model without values."""
    check(not on_meta(model), "model", called(model), "one with values: on the meta device nothing can be run")


def _outputs(model: nn.Module, inputs: Any, named_inputs: Any) -> dict[str, Tensor]:
    """What the model gives for copies of the inputs, in evaluation."""
    with looking(model):
        return comparable(model(*_fresh(inputs), **_fresh(named_inputs)), "inputs")


def _fresh(inputs: Any) -> Any:
    """Copies, since a model may write into what it is given."""
    return tree_map(lambda leaf: leaf.detach().clone() if torch.is_tensor(leaf) else leaf, inputs)


class _Folding:
    """Folds the norms of a model, and takes back what changes its outputs."""

    def __init__(self, operation: Operation, run: Any):
        self._operation, self._run = operation, run
        self._found = norms(operation.model)
        self._trace = Trace(operation.model, [one.module for one in self._found], keep=True)
        model, keywords = operation.model, run.keywords
        with looking(model):
            output = self._trace.run(lambda: model(*_fresh(keywords["inputs"]), **_fresh(keywords["named_inputs"])))
        self._before = comparable(output, "inputs")

    def fold_all(self) -> None:
        """Fold every norm whose fold is exact."""
        rows = {one.module: self._folded(one) for one in self._found}
        change = difference(self._before, self._run(self._operation.model))
        if change > self._tolerance():
            change = self._leave_the_guilty(rows, change)
        elif not any(part.isfinite().any() for part in self._before.values()):
            change = None
        self._operation.report.rows = list(rows.values())
        self._operation.report.change = change

    def _folded(self, one: Found) -> Row:
        """The row of a norm, which is folded where it can be."""
        reason = self._why_not(one)
        if reason is not None:
            return Row(one.name, called(one.module), None, reason)
        (call,) = self._trace.calls[one.module]
        layer, activation = call.layer, activation_of(one.module).train(one.module.training)
        assert layer is not None
        before = dict(layer._parameters)
        new = folded_parameters(layer, one.module)
        if not _gives(layer, new, activation, call, self._trace.outputs[one.module]):
            return Row(one.name, called(one.module), None, _changes("it gives something else than both together"))
        layer._parameters.update(new)
        self._operation.on_undo(partial(layer._parameters.update, before))
        self._operation.put(one, activation)
        return Row(one.name, called(one.module), called(activation), f"in {self._trace.names[layer]}")

    def _leave_the_guilty(self, rows: dict[nn.Module, Row], change: float) -> float | None:
        """Undo the folds that change the outputs; return the change that is left, None if it cannot be known."""
        folded = [one for one in self._found if rows[one.module].became is not None]
        self._take_back()
        unlike_itself = difference(self._before, self._run(self._operation.model))
        if unlike_itself > 0:
            self._again(folded)
            return None if unlike_itself >= change / 10 else change
        exact = self._exact_in_float64(folded)
        kept, guilty = [], []
        for one in folded:
            self._again([*kept, one])
            found = difference(self._before, self._run(self._operation.model))
            (kept if found <= self._tolerance() or exact else guilty).append(one)
            self._take_back()
        for one in guilty:
            was = called(one.module)
            rows[one.module] = Row(one.name, was, None, _changes("the model's output is another without it"))
        self._again(kept)
        return difference(self._before, self._run(self._operation.model))

    def _take_back(self) -> None:
        self._operation._revert()

    def _again(self, folded: list[Found]) -> None:
        for one in folded:
            self._folded(one)

    def _tolerance(self) -> float:
        """How much rounding may change: more where the model's outputs are of half precision."""
        eps = max((torch.finfo(part.dtype).eps for part in _numbers(self._operation.model)), default=0.0)
        return TOLERANCE if eps < 1e-6 else 100 * eps

    def _exact_in_float64(self, folded: list[Found]) -> bool:
        """Whether what differs is rounding, which the layers on the way may have magnified."""
        names = [one.names[0] for one in folded]
        try:
            wide = copied(self._operation.model).double()
            keywords = {
                name: tree_map(lambda leaf: leaf.double() if _is_real(leaf) else leaf, _fresh(value))
                for name, value in self._run.keywords.items()
            }
            operation = Operation(wide, Report())
            folding = _Folding(operation, partial(_outputs, **keywords))
            for one in folding._found:
                if one.names[0] in names:
                    folding._folded(one)
            return difference(folding._before, folding._run(operation.model)) <= TOLERANCE
        except (RuntimeError, InputError):  # the model makes tensors of a type of its own, or cannot be copied
            return False

    def _why_not(self, found: Found) -> str | None:
        """Why a norm cannot be folded, or None."""
        norm, calls = found.module, self._trace.calls[found.module]
        if found.held.stuck or found.hidden:
            return f"held by {(found.held.stuck or found.names)[0]}, where nothing can be put in its place"
        if isinstance(norm, torch.jit.ScriptModule):
            return "compiled by TorchScript: fold the model before it is scripted"
        if reason := why_computed(norm):
            return reason
        if getattr(norm, "running_mean", None) is None:
            return "has no running statistics: what it does depends on its input"
        if not all(part.isfinite().all() for part in _numbers(norm)):
            return "its statistics or parameters are infinite or NaN"
        if not is_affine(norm):
            return "is no scale and shift in evaluation"
        if len(calls) != 1:
            return "run several times" if calls else "not run with these inputs"
        if norm in self._trace.outside:
            return f"its tensors are used by {self._trace.outside[norm][0]} outside of it too"
        if calls[0].why_not_replaced:
            return calls[0].why_not_replaced
        if calls[0].further:
            return "given a residual, or something else beside its input"
        given = tensors(self._trace.outputs[norm])
        if not all(part.numel() for part in given):
            return "what it gives for these inputs is empty: nothing could be compared"
        if not all(part.isfinite().all() for part in given):
            return "what it gives for these inputs is infinite or NaN: nothing could be compared"
        return self._why_not_layer(norm, calls[0])

    def _why_not_layer(self, norm: nn.Module, call: Call) -> str | None:
        """Why the layer before a norm does not let it be folded, or None."""
        layer, trace = call.layer, self._trace
        if layer is None:
            return _unknown_layer(trace, norm)
        name = trace.names[layer]
        if trace.owners(layer) > 1:
            return f"the weight of {name}, the layer before it, is used by another layer too"
        if trace.weight_uses(layer) != 1:
            return f"{name}, the layer before it, is run several times, or its weight is used elsewhere too"
        used = trace.why_used(call)
        if used is not None:
            return f"the output of {name}, the layer before it, is used elsewhere too: by {used}"
        if isinstance(layer, nn.Linear) and call.input.dim() != 2:
            return f"the channels of {name}, the layer before it, are not those of the norm"
        if not isinstance(layer, LAYERS) or parametrize.is_parametrized(layer):
            return f"{name}, the layer before it, is a {called(layer)}, whose weight is not all it computes with"
        if trace.hooks_on(call, norm) is not None:
            return f"hooks of {trace.hooks_on(call, norm)} see what is between it and the layer before it"
        return None


def _changes(why: str) -> str:
    return f"left: folded, {why}"


def _unknown_layer(trace: Trace, norm: nn.Module) -> str:
    """Why a norm is not folded whose input comes from no layer's own weight."""
    before = trace.made_by(trace.calls[norm][0].input)
    if before is not None and parametrize.is_parametrized(before):
        return f"the weight of {trace.names[before]}, the layer before it, is parametrized"
    return "what it is given does not come from a convolution or linear layer whose weight is its own"


def _is_real(leaf: Any) -> bool:
    return torch.is_tensor(leaf) and leaf.is_floating_point()


def _numbers(module: nn.Module) -> list[Tensor]:
    return [part for part in (*module.parameters(), *module.buffers()) if part.is_floating_point()]


def folded_parameters(layer: nn.Module, norm: nn.Module) -> dict[str, nn.Parameter]:
    """Weight and bias of a layer with a norm after it, as one."""
    scale, shift = scale_and_shift(norm)
    weight, bias = layer.get_parameter("weight"), layer._parameters["bias"]
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, …), the groups in the first dimension
        each = weight.shape[1]
        factor = scale.view(layer.groups, 1, each).expand(-1, len(weight) // layer.groups, -1).reshape(-1, each)
        factor = factor.view(*factor.shape, *[1] * (weight.dim() - 2))
    else:
        factor = scale.view(-1, *[1] * (weight.dim() - 1))
    new = shift if bias is None else shift + bias.detach().double() * scale
    layout = weight.detach().clone(memory_format=torch.preserve_format)
    layout.copy_(weight.detach().double() * factor)
    learns = weight.requires_grad if bias is None else bias.requires_grad
    return {
        "weight": nn.Parameter(layout, weight.requires_grad),
        "bias": nn.Parameter(new.to(weight.dtype), learns),
    }


def _gives(layer: Any, new: dict[str, nn.Parameter], activation: nn.Module, call: Call, expected: Any) -> bool:
    """Whether the layer with new parameters gives what the norm after it gave, on what it was given then."""
    if channels_of(layer) != len(new["bias"]):
        return False
    padded = getattr(layer, "padding_mode", "zeros") != "zeros"  # the input that was seen, already
    if call.layer_input is None or padded or type(layer) not in LAYERS:  # written over, or another class's forward
        return True
    kept = dict(layer._parameters)
    layer._parameters.update(new)
    try:
        with torch.no_grad():
            given = call.layer_input.detach()
            if not given.dtype == expected.dtype == layer.weight.dtype:  # under autocast: to the narrower type's digits
                layer._parameters.update({name: nn.Parameter(part.float()) for name, part in new.items()})
                given = given.float()
            y = activation(type(layer).forward(layer, given))
    finally:
        layer._parameters.update(kept)
    eps = 8 * max(torch.finfo(expected.dtype).eps, torch.finfo(call.input.dtype).eps, 1e-5)
    y, expected = y.double(), expected.double()
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    return y.shape == expected.shape and torch.allclose(y, expected, rtol=eps, atol=eps * max(largest, 1e-30))


def channels_of(layer: Any) -> int:
    """How many channels a layer's output has."""
    weight = layer.weight
    return weight.shape[1] * layer.groups if isinstance(layer, TRANSPOSED) else weight.shape[0]

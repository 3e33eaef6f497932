"""What the tests of situations share: the mark of a situation, trained models, and what every report promises."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

OUTCOMES = ("held", "mended", "left and said")


class Situation(NamedTuple):
    """A row of the table.

    Attributes:
        link: the public report, as owner/repository#number.
        kind: of issue 17.
        verbs: of the API that the user reaches for.
        outcome: held before issue 17, mended by it, or left with a row or an error that says why.
        need: the test's docstring.
    """

    link: str
    kind: str
    verbs: str
    outcome: str
    need: str

    @property
    def url(self) -> str:
        """Of the report."""
        name, number = self.link.split("#")
        return f"https://github.com/{name}/issues/{number}"


def situation(link: str, kind: str, verbs: str, outcome: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Marks a test as one situation; its docstring is the need."""
    assert outcome in OUTCOMES, outcome

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        need = " ".join((test.__doc__ or "").strip().split("\n\n")[0].split())
        test.__dict__["situation"] = Situation(link, kind, verbs, outcome, need)
        return test

    return mark


def numbers(*shape: int, seed: int = 0, mean: float = 0.0, deviation: float = 1.0) -> Tensor:
    """Normal numbers, the same each time."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * deviation + mean


def with_drawn_state(model: nn.Module, seed: int = 1) -> nn.Module:
    """Every norm as after a training: γ of both signs, β, statistics and a counter that say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name in ("weight", "bias", "running_mean", "running_var"):
                part = getattr(module, name, None)
                if isinstance(part, Tensor) and part.dim() == 1:
                    drawn = torch.randn(part.shape, generator=generator)
                    part.copy_(drawn.square() + 0.5 if name == "running_var" else drawn + 0.2)
            counter = getattr(module, "num_batches_tracked", None)
            if isinstance(counter, Tensor):
                counter.fill_(1000)
    return model


def evaluated(model: nn.Module, *inputs: Any, **named: Any) -> Any:
    """The model's output in evaluation mode; the model is as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return model(*inputs, **named)
    finally:
        for module, training in modes:
            module.training = training


def by_hand(x: Tensor, norm: Any, eps: float | None = None) -> Tensor:
    """Batch norm in evaluation, in float64: γ (x − μ) / √(σ² + eps) + β over dimension 1."""
    along = (1, -1, *[1] * (x.dim() - 2))
    mean, var = (part.double().view(along) for part in (norm.running_mean, norm.running_var))
    y = (x.double() - mean) / (var + (norm.eps if eps is None else eps)).sqrt()
    if norm.weight is not None:
        y = y * norm.weight.detach().double().view(along)
    return y if norm.bias is None else y + norm.bias.detach().double().view(along)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """No value is further off than this share of 1 + the largest expected one."""
    assert actual.shape == expected.shape
    off = (actual.double() - expected.double()).abs().max()
    assert off <= tolerance * (1 + expected.double().abs().max()), f"off by {off:.3g}"


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a verb has to leave alone: classes, modes, gradient switches, hooks, and every value."""
    state: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks)
        state[f"{name}: module"] = type(module), module.training, hooks
    for name, parameter in model.named_parameters(remove_duplicate=False):
        state[f"{name}: learns"] = parameter.requires_grad
    for name, value in model.state_dict().items():
        state[f"{name}: value"] = value.detach().clone() if isinstance(value, Tensor) else value
    return state


def assert_same_as(before: dict[str, Any], model: nn.Module) -> None:
    """Bit by bit."""
    now = state_of(model)
    assert list(now) == list(before)
    for key, value in before.items():
        if isinstance(value, Tensor):
            assert value.is_meta or torch.equal(now[key], value), key
        else:
            assert now[key] == value, key


def operated(verb: Callable[..., Any], model: nn.Module, *inputs: Any, **options: Any) -> Any:
    """What a verb makes of a copy of a model, held to what its report says; undone, it is as before bit by bit.

    Held: the model itself is untouched; every norm that torch knows has a row; where all rows of changed norms say "the
    same in evaluation", the output for `inputs` is the same; a model without a changed norm is the same altogether.
    """
    before = state_of(model)
    expected = None if not inputs else evaluated(model, *inputs)
    operation = verb(model, **options)
    assert_same_as(before, model)
    named = [name for row in operation.report for name in row.name.split(", ")]
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, (_NormBase, nn.GroupNorm)):
            assert name in named, f"{name} has no row"
    touched = operation.report.touched
    assert all(row.note for row in operation.report)
    if not touched:
        assert_same_as(before, operation.model)
    if expected is not None and all("the same in evaluation" in row.note for row in touched):
        assert_near(evaluated(operation.model, *inputs), expected)
    assert_same_as(before, verb(model, **options).undo())
    return operation


def copied(model: nn.Module) -> nn.Module:
    """A copy."""
    return copy.deepcopy(model)


def moments(x: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel, in float64."""
    values = x.detach().double().transpose(0, dim).flatten(1)
    return values.mean(1), values.var(1)


def assert_statistics(norm: Any, x: Tensor, dim: int = 1) -> None:
    """The norm's running statistics are those of `x`."""
    mean, var = moments(x, dim)
    assert_near(norm.running_mean, mean)
    assert_near(norm.running_var, var)


def rows(operation_or_report: Any) -> dict[str, Any]:
    """By name."""
    report = getattr(operation_or_report, "report", operation_or_report)
    return {row.name: row for row in report}

"""What the tests of the norms share: inputs of many shapes, types and layouts, a step, and how results compare."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest.mock import patch

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from normlab.kernels import library, policy

LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.movedim(1, -1).contiguous().movedim(-1, 1),
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
}
layouts = st.sampled_from(list(LAYOUTS)).map(LAYOUTS.get)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


class Case(NamedTuple):
    """An input, the gradient of its output, γ and β."""

    x: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None


@st.composite
def cases(draw) -> Case:
    """Of 0 to 3 space dimensions, with and without γ and β."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 6)), *draw(st.lists(st.integers(1, 5), max_size=3))
    dtype = draw(dtypes)
    param_dtype = draw(st.sampled_from([dtype, statistics_dtype(dtype)]))
    x = torch.randn(shape) * draw(st.sampled_from([0.5, 4.0])) + draw(st.sampled_from([0.0, 3.0]))
    weight, bias = (torch.randn(shape[1]).to(param_dtype) if draw(st.booleans()) else None for _ in range(2))
    return Case(draw(layouts)(x.to(dtype)), draw(layouts)(torch.randn(shape).to(dtype)), weight, bias)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """That of the statistics of values of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_drawn_parameters(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def double(values) -> list[Tensor | None]:
    return [None if value is None else value.detach().double() for value in values]


def gradients(function, grad: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """The output and the gradients of the inputs, None for those that are not given."""
    leaves = [None if value is None else value.detach().requires_grad_() for value in inputs]
    y = function(*leaves)
    y.backward(grad)
    return [y.detach(), *(None if value is None else value.grad for value in leaves)]


def step(layer: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor | None]:
    """The output and the gradients of the input and of the parameters."""
    layer.zero_grad()
    return [*gradients(layer, grad, x), *(parameter.grad for parameter in layer.parameters())]


def assert_close(actual: list, expected: list, tolerance: float) -> None:
    """No value is further off than this share of 1 + the largest expected one."""
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert one.shape == other.shape
            error = (one.double() - other.double()).abs().max()
            assert error <= tolerance * (1 + other.abs().max()), f"off by {error}"


def assert_same_state(one: nn.Module, other: nn.Module) -> None:
    assert list(one.state_dict()) == list(other.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@contextmanager
def composed() -> Iterator[None]:
    """Inside, no kernel is used."""
    with patch.object(policy, "_CLASSES", ()):
        yield


@contextmanager
def operators_in_python() -> Iterator[None]:
    """Inside, those of a CPU are as where torch lacks what the compiled ones need."""
    names = [name for name in vars(library) if name.endswith(("_forward", "_backward")) and name[0] != "_"]
    with torch.library._scoped_library("normlab", "IMPL") as registered, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are to override the others
        for name in names:
            registered.impl(name, getattr(library, name), "CPU", allow_override=True)
        yield

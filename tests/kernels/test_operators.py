"""The operators that compilers use: what they declare is true, and compiled layers give what plain ones do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import assert_close, layouts, step, with_drawn_parameters
from normlab.kernels import native, operators
from normlab.kernels.ops import GradientMemory
from normlab.nn import BatchNorm2d, GroupNorm, RunningBatchNorm2d, build_norm

pytestmark = pytest.mark.skipif(native.PATH.startswith("composed"), reason=native.PATH)

C, GROUPS, SLOPE, EPS = 4, 2, 0.25, 1e-5
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.sampled_from([(3, C), (2, C, 5), (2, C, 3, 4), (1, C, 2, 3, 2)])


def arguments(name, x, affine):
    """Of an operator: tensors of the right sizes, and numbers."""
    weight, bias = (torch.randn(C) if affine else None for _ in range(2))
    grad = torch.randn_like(x)
    saved, of_groups = torch.rand(2, C) + 0.5, torch.rand(2, len(x) * GROUPS) + 0.5
    statistics = torch.zeros(C), torch.ones(C), torch.tensor(3)
    memory = GradientMemory.empty(C)
    return {
        "batch_forward": (x, weight, bias, *statistics, SLOPE, 0.1, EPS),
        "batch_backward": (grad, x, weight, bias, saved, SLOPE),
        "running_forward": (
            *(x, weight, bias, *statistics, torch.ones(()), torch.zeros(C), torch.ones(()), *memory[:2]),
            *(SLOPE, 0.1, EPS, 0.001, 0.01, 0.2),
        ),
        "running_backward": (grad, x, weight, bias, saved, torch.tensor(0.5), *memory, SLOPE, 0.006, affine),
        "group_forward": (x, weight, bias, GROUPS, SLOPE, EPS),
        "group_backward": (grad, x, weight, bias, of_groups, GROUPS, SLOPE),
    }[name]


NAMES = [name for name in vars(operators) if name.endswith(("_forward", "_backward")) and name[0] != "_"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(shapes, dtypes, layouts, st.booleans())
def test_operators_do_what_they_declare(name, shape, dtype, layout, affine):
    x = layout(torch.randn(shape, dtype=dtype))
    tests = ("test_schema", "test_faketensor")  # the gradients are those of the norms, below
    torch.library.opcheck(getattr(torch.ops.normlab, name), arguments(name, x, affine), test_utils=tests)


LAYERS = {
    "batch": lambda **options: BatchNorm2d(16, **options),
    "group": lambda **options: GroupNorm(16, **options),
    "running": lambda **options: RunningBatchNorm2d(16, **options),
}


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layers_use_them_and_equal_plain_ones(name, activation, backend):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = with_drawn_parameters(LAYERS[name](activation=activation))
    plain = LAYERS[name](activation=activation)
    plain.load_state_dict(layer.state_dict())
    used = []
    real = native.forward

    def counted(*args):
        used.append(args[6])
        return real(*args)

    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    shape = (4, 16, 64, 40)  # so many values that a compiler's own code is slower
    for seed in range(3):
        torch.manual_seed(seed)
        x, grad = torch.randn(shape), torch.randn(shape)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "forward", counted)
            mine = step(compiled, x, grad)
        assert_close(mine, step(plain, x, grad), 1e-5)
    assert used == [f"{name}_forward"] * 3
    for (key, value), other in zip(layer.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_any_batch_size_and_layout_in_one_graph(layout):
    torch.compiler.reset()
    layer, plain = RunningBatchNorm2d(3), RunningBatchNorm2d(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for images in (2, 5, 3):
        x = torch.randn(images, 3, 4, 6).to(memory_format=layout)
        grad = torch.randn(images, 3, 4, 6)
        with torch.compiler.set_stance("fail_on_recompile" if images == 3 else "default"):
            assert_close(step(compiled, x, grad), step(plain, x, grad), 1e-5)


@pytest.mark.parametrize("name", ["batch", "running"])
def test_small_batch_norms_and_frozen_ones_are_left_to_the_compiler(name, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr(native, "forward", lambda *_: pytest.fail("a kernel was used"))
    layer = build_norm(name, 4)
    if name == "running":
        layer.eval()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 4, 3, 3))

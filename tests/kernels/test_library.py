"""The operators that compilers use: what they declare is true, and compiled layers give what plain ones do."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks import assert_close, layouts, operators_in_python, step, with_drawn_parameters
from normlab.kernels import cpu, launch, library
from normlab.kernels.running import READ, State
from normlab.nn import BatchNorm2d, GroupNorm, RunningBatchNorm2d, RunningInstanceNorm2d, build_norm

pytestmark = pytest.mark.skipif(cpu.PATH.startswith("composed"), reason=cpu.PATH)

C, GROUPS, SLOPE, EPS = 4, 2, 0.25, 1e-5
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
shapes = st.sampled_from([(3, C), (2, C, 5), (2, C, 3, 4), (1, C, 2, 3, 2)])


def arguments(name, x, affine):
    """Of an operator: tensors of the right sizes, and numbers."""
    weight, bias = (torch.randn(C) if affine else None for _ in range(2))
    grad, residual = torch.randn_like(x), torch.randn(x.shape).to(x.dtype) if affine else None
    saved, of_groups = torch.rand(2, C) + 0.5, torch.rand(2, len(x) * GROUPS) + 0.5
    of_both = torch.rand(2, C * (1 + len(x))) + 0.5
    statistics = torch.zeros(C), torch.ones(C), torch.tensor(3)
    state = State.empty(C)
    return {
        "batch_forward": (x, weight, bias, residual, *statistics, SLOPE, 0.1, EPS),
        "frozen_forward": (x, weight, bias, residual, *statistics[:2], SLOPE, EPS),
        "batch_backward": (grad, x, weight, bias, saved, SLOPE, 1.0),
        "running_forward": (
            *(x, weight, bias, residual, *statistics, *state[READ][3:]),
            *(SLOPE, 0.1, EPS, not affine),
        ),
        "running_backward": (grad, x, weight, bias, saved, torch.tensor(0.5), *state.memory, SLOPE, 0.006, affine),
        "running_instance_forward": (
            *(x, weight, bias, torch.rand(C) / 4, residual, *statistics, *state[READ][3:]),
            *(4.0, 0.5, SLOPE, 0.1, EPS, not affine),
        ),
        "running_instance_backward": (
            *(grad, x, weight, bias, torch.rand(C) / 4, of_both, torch.tensor(0.5), *state.memory),
            *(4.0, 0.5, SLOPE, 0.006, affine),
        ),
        "group_forward": (x, weight, bias, GROUPS, SLOPE, EPS),
        "group_backward": (grad, x, weight, bias, of_groups, GROUPS, SLOPE),
    }[name]


NAMES = [name for name in vars(library) if name.endswith(("_forward", "_backward")) and name[0] != "_"]
IN_CPP_ALONE = ["running_instance_forward", "running_instance_backward"] if library.COMPILED else []


def written_in(language):
    """The operators on a CPU."""
    return nullcontext() if language == "C++" else operators_in_python()


@contextmanager
def calls():
    """The names of the operators that are called, afterwards."""
    found = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield found
    names = (event.name for event in profile.events())
    found += [name.removeprefix("normlab::") for name in names if name.startswith("normlab::")]


languages = pytest.mark.parametrize("language", ["C++", "Python"] if library.COMPILED else ["Python"])
in_cpp = pytest.mark.skipif(not library.COMPILED, reason="torch lacks what they need")


def test_torch_calls_the_compiled_ones_from_2_10_on():
    assert (torch.__version__ >= (2, 10)) == library.COMPILED


def test_those_in_python_are_for_a_torch_that_lacks_a_function(monkeypatch):
    address = cpu._address
    monkeypatch.setattr(cpu, "_address", lambda name: address(name.replace("torch_library_impl", "torch_lacks_it")))
    assert not cpu._register_operators()


@languages
@pytest.mark.parametrize("name", [*NAMES, *IN_CPP_ALONE])
@settings(max_examples=15, deadline=None)
@given(shapes, dtypes, layouts, st.booleans())
def test_operators_do_what_they_declare(name, language, shape, dtype, layout, affine):
    x = layout(torch.randn(shape, dtype=dtype))
    tests = ("test_schema", "test_faketensor")  # the gradients are those of the norms, below
    with written_in(language):
        torch.library.opcheck(getattr(torch.ops.normlab, name), arguments(name, x, affine), test_utils=tests)


def tensors(values):
    return [value for value in values if isinstance(value, torch.Tensor)]


@in_cpp
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30, deadline=None)
@given(shapes, dtypes, layouts, layouts, st.booleans())
def test_compiled_ones_do_what_those_in_python_do(name, shape, dtype, layout, grad_layout, affine):
    given = arguments(name, layout(torch.randn(shape, dtype=dtype)), affine)
    if name.endswith("_backward"):
        given = grad_layout(given[0]), *given[1:]
    others = [part.clone() if torch.is_tensor(part) and part.is_contiguous() else part for part in given]  # to change
    with pytest.MonkeyPatch.context() as patch:
        for function in ("describe", "forward", "backward"):
            patch.setattr(launch, function, lambda *_: pytest.fail("Python was called"))
        found = getattr(torch.ops.normlab, name)(*given)
    expected = getattr(library, name)(*others)
    for one, other in zip((*found, *tensors(given)), (*expected, *tensors(others)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
        assert one.stride() == other.stride()


@in_cpp
@pytest.mark.parametrize("name", [*NAMES, *IN_CPP_ALONE])
def test_compiled_ones_keep_nothing(name):
    given = arguments(name, torch.randn(2, C, 3, 4)[..., ::2], affine=True)
    references = [part._use_count() for part in tensors(given)]
    found = getattr(torch.ops.normlab, name)(*given)
    assert [part._use_count() for part in tensors(given)] == references
    assert [part._use_count() for part in found] == [1] * len(found)
    wrong = given[0].double(), *given[1:]
    with pytest.raises(RuntimeError, match="normlab: "):
        getattr(torch.ops.normlab, name)(*wrong)
    assert [part._use_count() for part in tensors(given[1:])] == references[1:]


WRONG = {  # the operator, its argument's index, what it becomes, what is said
    "values of float64": ("batch_forward", 0, lambda x: x.double(), "x must be float32"),
    "no values": ("batch_forward", 0, lambda x: x[:0], "not empty"),
    "no channels": ("group_forward", 0, lambda x: x.flatten(), "N, C"),
    "a weight of float16": ("batch_forward", 1, lambda weight: weight.half(), "weight must be contiguous, float32"),
    "a short bias": ("group_forward", 2, lambda bias: bias[1:], f"bias must be .* {C}"),
    "every other weight": ("batch_forward", 1, lambda weight: weight.repeat_interleave(2)[::2], "weight must be"),
    "a mean without a count": ("batch_forward", 6, lambda _: None, "all there, or none"),
    "a count of float32": ("running_forward", 6, lambda count: count.float(), "num_batches_tracked must be .* int64"),
    "a short gate": ("running_instance_forward", 3, lambda gate: gate[1:], f"gate must be .* {C}"),
    "a gate of float64": ("running_instance_backward", 4, lambda gate: gate.double(), "gate must be .*float32"),
    "a short average": ("running_forward", 10, lambda average: average[0], f"gradient_average must be .* {2 * C}"),
    "a residual of another type": ("frozen_forward", 3, lambda residual: residual.half(), "residual must have"),
    "a short mean": ("frozen_forward", 4, lambda mean: mean[1:], f"mean must be .* {C}"),
    "a gradient of another type": ("batch_backward", 0, lambda grad: grad.half(), "grad must have"),
    "a gradient of another shape": ("group_backward", 0, lambda grad: grad[:1], "grad must have"),
    "statistics of another norm": ("group_backward", 4, lambda saved: saved[:, 1:].contiguous(), "saved must be"),
    "no weight to learn": ("running_backward", 2, lambda _: None, "to be learned"),
    "groups that are no divisor": ("group_forward", 3, lambda _: 3, "num_groups"),
    "no groups": ("group_backward", 5, lambda _: 0, "num_groups"),
}


@in_cpp
@pytest.mark.parametrize("case", WRONG)
def test_compiled_ones_refuse_what_is_not_theirs(case):
    name, index, change, message = WRONG[case]
    given = list(arguments(name, torch.randn(2, C, 3, 3), affine=True))
    given[index] = change(given[index])
    with pytest.raises(RuntimeError, match=f"normlab: .*{message}"):
        getattr(torch.ops.normlab, name)(*given)


@pytest.mark.parametrize("index", [0, 1, 4])
def test_a_tensor_of_another_device_is_not_computed_with(index):
    given = list(arguments("batch_forward", torch.randn(2, C, 3, 3), affine=True))
    given[index] = given[index].to("meta")
    before = [part.clone() for part in tensors(given[4:])]
    torch.ops.normlab.batch_forward(*given)  # tells what would come out
    for part, other in zip(tensors(given[4:]), before, strict=True):
        assert part.is_meta or part.equal(other)


def test_a_sparse_tensor_is_refused():
    x, *rest = arguments("batch_forward", torch.randn(2, C, 3, 3), affine=True)
    with pytest.raises(NotImplementedError, match="normlab::batch_forward"):
        torch.ops.normlab.batch_forward(x.to_sparse(), *rest)


@languages
@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_storage_that_was_freed_or_cut_short_is_not_read(name, left, language):
    """As sharded training frees parameters between uses; neither are the statistics written by halves."""
    given = arguments(name, torch.randn(2, C, 3, 3), affine=True)
    for index in [index for index, part in enumerate(given) if torch.is_tensor(part)]:
        others = [part.clone() if torch.is_tensor(part) else part for part in given]
        size = others[index].untyped_storage().nbytes()
        others[index].untyped_storage().resize_(left and size - 1)
        before = [part.clone() if part is not others[index] else None for part in tensors(others)]
        with written_in(language), pytest.raises(RuntimeError, match=rf"normlab: .* needs {size} bytes of storage"):
            getattr(torch.ops.normlab, name)(*others)
        for part, was in zip(tensors(others), before, strict=True):
            assert was is None or part.equal(was)


@languages
def test_a_view_may_take_a_part_of_its_storage(language):
    x, *rest = arguments("frozen_forward", torch.randn(2, C, 3, 3), affine=True)
    view = torch.cat([x, x, x])[2:4]
    with written_in(language):
        expected = torch.ops.normlab.frozen_forward(x, *rest)[0]
        assert torch.equal(torch.ops.normlab.frozen_forward(view, *rest)[0], expected)
        view.untyped_storage().resize_(4 * view.storage_offset() + 4 * view.numel())  # what follows is not needed
        assert torch.equal(torch.ops.normlab.frozen_forward(view, *rest)[0], expected)
        view.untyped_storage().resize_(4 * view.numel())
        with pytest.raises(RuntimeError, match="x needs"):
            torch.ops.normlab.frozen_forward(view, *rest)


def negated(x):
    return torch._neg_view(-x)


def conjugated(x):
    return torch.complex(x, -x).conj().imag if x.dim() > 1 else negated(x)


def expanded(x):
    return x[:1].expand(x.shape)


def zero(x):
    return torch._efficientzerotensor(x.shape)


@languages
@pytest.mark.parametrize("view", [negated, conjugated, expanded, zero])
@pytest.mark.parametrize("name", NAMES)
def test_views_that_only_say_what_their_values_are_give_the_same(name, view, language):
    """Parameters and statistics are contiguous to the kernels: they can be negated at most."""
    operator = getattr(torch.ops.normlab, name)
    given = list(arguments(name, torch.randn(2, C, 3, 3), affine=True))
    kept = [part.alias_info is None for part in operator.default._schema.arguments]
    here = [index for index, part in enumerate(given) if torch.is_tensor(part) and kept[index]]
    for index in here if view is negated else [index for index in here if given[index].dim() == 4]:
        viewed, plain = list(given), list(given)
        viewed[index] = view(given[index])
        plain[index] = torch.zeros_like(given[index]) if view is zero else viewed[index].clone().resolve_neg()
        with written_in(language):
            found, expected = operator(*copies(viewed, index)), operator(*copies(plain, index))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def copies(given, index):
    """The same arguments, to change, but for that of this index."""
    return [part.clone() if torch.is_tensor(part) and i != index else part for i, part in enumerate(given)]


LAYERS = {
    "batch": lambda **options: BatchNorm2d(16, **options),
    "group": lambda **options: GroupNorm(16, **options),
    "running": lambda **options: RunningBatchNorm2d(16, **options),
    **({"running_instance": lambda **options: RunningInstanceNorm2d(16, **options)} if library.COMPILED else {}),
}


@languages
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("name", LAYERS)
def test_compiled_layers_use_them_and_equal_plain_ones(name, activation, backend, language):
    torch.compiler.reset()
    torch.manual_seed(0)
    layer = with_drawn_parameters(LAYERS[name](activation=activation))
    plain = LAYERS[name](activation=activation)
    plain.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    shape = (4, 16, 64, 40)  # so many values that a compiler's own code is slower
    with written_in(language):
        for seed in range(3):
            torch.manual_seed(seed)
            x, grad = torch.randn(shape), torch.randn(shape)
            with calls() as called:
                mine = step(compiled, x, grad)
            assert_close(mine, step(plain, x, grad), 1e-5)
    assert called == [f"{name}_forward", f"{name}_backward"]  # by the last of them: the first is traced too
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
def test_small_batch_norms_and_frozen_ones_are_left_to_the_compiler(name):
    torch.compiler.reset()
    layer = build_norm(name, 4)
    if name == "running":
        layer.eval()
    with calls() as called:
        torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 4, 3, 3))
    assert not called

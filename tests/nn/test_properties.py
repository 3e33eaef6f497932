"""What holds for every registered norm, whatever its rule; a new norm enters these tests by being registered."""

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from checks import assert_close, composed
from normlab.errors import InputError
from normlab.nn import NORMS, CenteredConv2d, WeightStandardizedConv2d, build_norm


class Tagged(torch.Tensor):
    """A tensor of someone's own class."""


CHANNELS = 8
SPACE = {1: (6,), 2: (4, 3), 3: (2, 3, 2)}
# Gradients of a loss that is a mean over images are small; some norms bound larger ones.
LOSS = 0.005
NAMES = sorted(NORMS)
ALL = [(name, dims) for name in NAMES for dims in (1, 2, 3)]
TRACKING = [name for name in NAMES if any(True for _ in build_norm(name, CHANNELS).buffers())]

every_norm = pytest.mark.parametrize("name", NAMES)
every_norm_and_dims = pytest.mark.parametrize(("name", "dims"), ALL)
every_tracking_norm = pytest.mark.parametrize("name", TRACKING)


def images(batch: int = 4, dims: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A batch whose channels differ in mean and deviation."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, CHANNELS, *SPACE[dims], generator=generator, dtype=torch.float64)
    along = (-1, *[1] * dims)
    scale = torch.linspace(0.5, 3, CHANNELS, dtype=torch.float64).view(along)
    return (x * scale + torch.linspace(-2, 2, CHANNELS, dtype=torch.float64).view(along)).to(dtype)


def trained(name: str, dims: int = 2, steps: int = 3, **options) -> nn.Module:
    """A layer with drawn parameters that has seen some batches."""
    torch.manual_seed(0)
    layer = build_norm(name, CHANNELS, dims, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    for seed in range(steps):
        step(layer, images(dims=dims, seed=10 + seed, dtype=options.get("dtype", torch.float32)))
    return layer


def step(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and input gradient (over LOSS) of one training step without an update."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x)
    of_this_batch = 1 + x.detach().double().mean()  # a gradient that is always the same is nobody's
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape) * of_this_batch
    (y * weights.to(y.dtype) * LOSS).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad / LOSS


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in layer.named_buffers()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], **tolerance, equal_nan=True, msg=lambda m, k=key: f"{k}: {m}")


def gradients(layer: nn.Module) -> dict[str, Tensor]:
    """Of the parameters, over LOSS."""
    return {key: value.grad / LOSS for key, value in layer.named_parameters() if value.grad is not None}


class TestPrecision:
    @every_norm
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_input_of_a_float32_layer(self, name, dtype):
        layer, exact = trained(name), trained(name)
        x = images(dtype=dtype)
        y, grad = step(layer, x)
        expected, expected_grad = step(exact, x.float())
        assert y.dtype == dtype
        assert grad.dtype == dtype
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=4 * tolerance)
        scale = expected_grad.abs().max().item()
        torch.testing.assert_close(grad.float(), expected_grad, rtol=4 * tolerance, atol=4 * tolerance * scale)

    @every_norm
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_a_layer_cast_to_half_precision_keeps_float32_statistics(self, name, dtype):
        layer = trained(name).to(dtype)
        y, _ = step(layer, images(dtype=dtype))
        assert y.dtype == dtype
        assert y.isfinite().all()
        halves = [key for key, value in layer.named_buffers() if value.dtype == dtype]
        assert not halves

    @every_norm_and_dims
    def test_float64_is_computed_in_float64(self, name, dims):
        layer = trained(name, dims, dtype=torch.float64)
        single = trained(name, dims)
        x = images(dims=dims, dtype=torch.float64)
        y, grad = step(layer, x)
        assert y.dtype == grad.dtype == torch.float64
        y32, _ = step(single, x.float())
        torch.testing.assert_close(y.float(), y32, rtol=1e-3, atol=1e-3)
        # Digits beyond float32 must reach the output.
        nudged, _ = step(trained(name, dims, dtype=torch.float64), x * (1 + 1e-10))
        assert name == "none" or not torch.equal(nudged, y)


class TestLayout:
    @every_norm
    def test_channels_last(self, name):
        x = images()
        y, grad = step(trained(name), x)
        y_last, grad_last = step(trained(name), x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(y_last, y, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad_last, grad, rtol=1e-4, atol=1e-5)

    @every_norm_and_dims
    def test_permuted_and_strided_input(self, name, dims):
        x = images(dims=dims)
        permuted = x.transpose(0, -1).contiguous().transpose(0, -1)
        strided = torch.stack([x, x + 1], -1)[..., 0]
        expected, expected_grad = step(trained(name, dims), x)
        for other in (permuted, strided):
            y, grad = step(trained(name, dims), other)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
}
GRADIENTS = {
    "drawn": lambda y, grad: y.backward(grad),
    "of a sum": lambda y, grad: (y * LOSS).sum().backward(),
    "of each channel": lambda y, grad: y.backward(grad[:1, :, :1, :1].expand(y.shape)),
}


class TestFarFrom0:
    """A channel of mean m and deviation d loses as many digits as m/d has, and no more, in outputs and gradients."""

    @every_norm
    @pytest.mark.parametrize("kernels", [nullcontext, composed])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_loses_a_digit_for_each_tenfold_mean(self, name, layout, dtype, kernels):
        for ratio in (0, 100, 10_000 if dtype == torch.float64 else 1000):
            for backward in GRADIENTS.values():
                torch.manual_seed(0)
                x, other = ((torch.randn(3, CHANNELS, 9, 9) + ratio).to(dtype) for _ in range(2))
                grad = torch.randn(x.shape).to(dtype) * LOSS
                layer = build_norm(name, CHANNELS, dtype=torch.float64) if name != "none" else nn.Identity()
                layer(other.double())
                exact = copy.deepcopy(layer)
                layer.to(torch.promote_types(dtype, torch.float32))
                with kernels():
                    found = self.all_of(layer, LAYOUTS[layout](x), lambda y: backward(y, grad))  # noqa: B023
                expected = self.all_of(exact, x.double(), lambda y: backward(y, grad.double()))  # noqa: B023
                single = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
                tolerance = 4 * torch.finfo(dtype).eps + 100 * single * (1 + ratio)
                assert_close(found, expected, tolerance)

    def all_of(self, layer: nn.Module, x: Tensor, backward: Callable[[Tensor], None]) -> list[Tensor]:
        """The output, the gradients of the input and of the parameters over LOSS, and the statistics."""
        x = x.detach().requires_grad_()
        y = layer(x)
        backward(y)
        assert x.grad is not None
        count = y.numel() / CHANNELS  # the gradient of a parameter is a sum of so many
        return [y.detach(), x.grad / LOSS, *(value / count for value in gradients(layer).values()), *layer.buffers()]


class TestCompile:
    @every_norm
    @pytest.mark.parametrize("kernels", [nullcontext, composed])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_training_is_as_without_a_compiler(self, name, dtype, kernels):
        """In one graph: outputs, gradients and, after each of several steps, every buffer."""
        with kernels():
            self.train_beside_plain(name, dtype, "aot_eager")

    @pytest.mark.parametrize("backend", ["eager", "inductor"])
    @pytest.mark.parametrize("name", ["running", "running_lesson"])
    def test_statistics_in_float64_are_as_without_a_compiler(self, name, backend):
        """A compiler loses what is written to a float64 tensor without dimensions, as a count or a share is."""
        self.train_beside_plain(name, torch.float64, backend)

    def train_beside_plain(self, name: str, dtype: torch.dtype, backend: str) -> None:
        torch.compiler.reset()
        of_layer = {"dtype": dtype} if dtype == torch.float64 else {}
        layer, plain = trained(name, **of_layer), trained(name, **of_layer)
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        tolerance = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 0.03}[dtype]
        for seed in range(3):
            layer.zero_grad(), plain.zero_grad()
            y, grad = step(compiled, images(seed=seed, dtype=dtype))
            expected, expected_grad = step(plain, images(seed=seed, dtype=dtype))
            torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(grad, expected_grad, rtol=tolerance, atol=tolerance)
            assert_same(buffers(layer), buffers(plain), rtol=tolerance, atol=tolerance)
            assert_same(gradients(layer), gradients(plain), rtol=tolerance, atol=2 * tolerance)

    @every_norm
    def test_evaluation_has_no_graph_break(self, name):
        torch.compiler.reset()
        layer = trained(name).eval()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(images()), layer(images()), rtol=1e-4, atol=1e-5)


class TestExport:
    @every_norm
    def test_exported_program(self, name):
        layer = trained(name).eval()
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (images(),), dynamic_shapes=({0: batch},))
        for size in (2, 5):
            x = images(size, seed=1)
            torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-5, atol=1e-5)

    @every_norm
    def test_onnx(self, name):
        layer = trained(name).eval()
        program = torch.onnx.export(layer, (images(),), dynamo=True, verbose=False)
        assert program is not None
        session = ReferenceEvaluator(program.model_proto)
        x = images(seed=1)
        (y,) = session.run(None, {session.input_names[0]: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), layer(x).detach(), rtol=1e-4, atol=1e-5)


class TestCopies:
    @every_norm
    def test_state_dict_round_trip(self, name):
        layer = trained(name)
        file = io.BytesIO()
        torch.save(layer.state_dict(), file)
        file.seek(0)
        other = build_norm(name, CHANNELS)
        other.load_state_dict(torch.load(file, weights_only=True))
        one, two = step(layer, images()), step(other, images())
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
        assert_same(buffers(layer), buffers(other), rtol=0, atol=0)

    @every_norm
    def test_a_deep_copy_goes_its_own_way(self, name):
        layer = trained(name)
        before = buffers(layer)
        other = copy.deepcopy(layer)
        step(other, images())
        assert_same(buffers(layer), before, rtol=0, atol=0)
        y, grad = step(layer, images())
        again, grad_again = step(copy.deepcopy(trained(name)), images())
        assert torch.equal(y, again)
        assert torch.equal(grad, grad_again)

    @every_norm
    def test_averaged_copy(self, name):
        layer = trained(name)
        average = AveragedModel(layer, use_buffers=True)
        average.update_parameters(layer)
        torch.testing.assert_close(average.eval()(images()), layer.eval()(images()), rtol=1e-5, atol=1e-6)


class TestCheckpointing:
    @every_norm
    @pytest.mark.parametrize("use_reentrant", [False, True])
    def test_recomputed_forward_changes_nothing(self, name, use_reentrant):
        plain, layer = trained(name), trained(name)
        for seed in range(2):
            plain.zero_grad(), layer.zero_grad()
            expected, expected_grad = step(plain, images(seed=seed))
            y, grad = step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), images(seed=seed))  # pyright: ignore[reportArgumentType]
            assert torch.equal(y, expected)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
            assert_same(gradients(layer), gradients(plain), rtol=1e-5, atol=1e-5)
            assert_same(buffers(layer), buffers(plain), rtol=1e-6, atol=1e-6)


class TestAccumulation:
    @every_norm
    def test_two_forward_passes_before_the_backward_pass(self, name):
        layer = trained(name)
        one, two = (images(seed=seed).requires_grad_() for seed in (0, 1))
        (layer(one).square().sum() + layer(two).pow(3).sum()).backward()
        for x in (one, two):
            assert x.grad is not None
            assert x.grad.isfinite().all()


class TestPoison:
    @every_tracking_norm
    @pytest.mark.parametrize("poison", [float("inf"), float("-inf"), float("nan")])
    def test_a_poisoned_batch_leaves_the_buffers_as_they_were(self, name, poison):
        layer = trained(name)
        before = buffers(layer)
        x = images()
        x[1, 3, 0, 0] = poison
        step(layer, x)
        counters = {key for key, value in before.items() if not value.is_floating_point()}
        kept = {key: value for key, value in buffers(layer).items() if key not in counters}
        assert_same(kept, {key: value for key, value in before.items() if key not in counters}, rtol=0, atol=0)
        y, grad = step(layer, images())
        assert y.isfinite().all()
        assert grad.isfinite().all()

    @every_tracking_norm
    def test_a_poisoned_gradient_leaves_the_buffers_finite(self, name):
        layer = trained(name)
        x = images().requires_grad_()
        layer(x).backward(torch.full_like(x, float("nan")))
        assert all(value.isfinite().all() for value in buffers(layer).values())

    @every_tracking_norm
    def test_overflow_of_half_precision(self, name):
        layer = trained(name)
        layer(images(dtype=torch.float16) * 6e4)  # beyond the largest half
        assert all(value.isfinite().all() for value in buffers(layer).values())


class TestSmall:
    @every_norm_and_dims
    @pytest.mark.parametrize("training", [True, False])
    def test_empty_batch(self, name, dims, training):
        layer = trained(name, dims).train(training)
        before = buffers(layer)
        x = torch.zeros(0, CHANNELS, *SPACE[dims], requires_grad=True)
        y = layer(x)
        assert y.shape == x.shape
        y.sum().backward()
        assert x.grad is not None
        assert all(gradient.isfinite().all() for gradient in gradients(layer).values())
        assert_same(buffers(layer), before, rtol=0, atol=0)

    @every_norm_and_dims
    @pytest.mark.parametrize("steps", [0, 3])
    def test_one_image_of_one_pixel(self, name, dims, steps):
        layer = trained(name, dims, steps=steps)
        x = images(1, dims)[(..., *[slice(0, 1)] * dims)]
        for _ in range(3):
            y, grad = step(layer, x)
            assert y.isfinite().all()
            assert grad.isfinite().all()
        assert all(value.isfinite().all() for value in buffers(layer).values())
        assert layer.eval()(x).isfinite().all()

    @every_norm_and_dims
    def test_a_constant_batch(self, name, dims):
        layer = trained(name, dims, steps=0)
        for _ in range(3):
            y, grad = step(layer, torch.full((2, CHANNELS, *SPACE[dims]), 7.0))
            assert y.isfinite().all()
            assert grad.isfinite().all()


class TestEvaluation:
    @every_tracking_norm
    def test_changes_no_buffer(self, name):
        layer = trained(name).eval()
        before = buffers(layer)
        step(layer, images())
        assert_same(buffers(layer), before, rtol=0, atol=0)

    @every_norm
    def test_each_image_is_by_itself(self, name):
        layer = trained(name).eval()
        x = images(5)
        torch.testing.assert_close(layer(x)[:2], layer(x[:2]), rtol=1e-5, atol=1e-5)

    @every_norm
    def test_functional_transforms(self, name):
        layer = trained(name).eval()
        x = images()
        state = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}

        def loss(state: dict[str, Tensor], image: Tensor) -> Tensor:
            return torch.func.functional_call(layer, state, (image[None],)).square().sum()

        each = torch.stack([torch.func.grad(loss, argnums=1)(state, image) for image in x])
        at_once = torch.func.vmap(torch.func.grad(loss, argnums=1), in_dims=(None, 0))(state, x)
        torch.testing.assert_close(at_once, each, rtol=1e-4, atol=1e-5)


class TestTraining:
    @pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
    def test_gradient_of_a_function_of_the_parameters(self, name):
        """`torch.func.grad` through a training step gives what `backward` gives, where parameters are concerned."""
        layer, plain = trained(name), trained(name)
        x = images()
        parameters = {key: value.detach() for key, value in layer.named_parameters()}

        def loss(parameters: dict[str, Tensor], state: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(layer, {**parameters, **state}, (x,)).pow(3).sum() * LOSS * 1e-3

        found = torch.func.grad(loss)(parameters, buffers(layer))
        plain.zero_grad()
        (plain(x).pow(3).sum() * LOSS * 1e-3).backward()
        found = {key: value / LOSS for key, value in found.items()}
        assert_same({k: v for k, v in found.items() if k in gradients(plain)}, gradients(plain), rtol=1e-4, atol=1e-6)

    @every_norm
    def test_wrong_number_of_channels_is_refused(self, name):
        if name == "none":
            pytest.skip("takes any tensor")
        with pytest.raises((ValueError, RuntimeError)):
            build_norm(name, CHANNELS)(torch.randn(2, CHANNELS + 2, 4, 3))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.bool])
    @pytest.mark.parametrize("training", [True, False])
    @every_norm
    def test_whole_and_complex_numbers_are_refused(self, name, training, dtype):
        """As by torch's layers: they would be rounded to whole numbers, or lose their imaginary parts."""
        if name == "none":
            pytest.skip("takes any tensor")
        layer = build_norm(name, CHANNELS).train(training)
        before = buffers(layer)
        x = torch.ones(2, CHANNELS, 4, 3, dtype=dtype)
        for given, options in ((x, {}), (x.as_subclass(Tagged), {}), (x, {"mask": x[:, 0] == 1})):
            with pytest.raises((ValueError, RuntimeError), match="dtype"):
                layer(given, **options)
        assert_same(buffers(layer), before, rtol=0, atol=0)

    @every_norm
    def test_what_is_no_tensor_is_refused(self, name):
        if name == "none":
            pytest.skip("takes anything")
        with pytest.raises(InputError, match="expected a tensor as input, got list"):
            build_norm(name, CHANNELS)([images()])

    @every_norm
    @pytest.mark.parametrize("steps", [0, 1])
    def test_storage_that_was_freed_raises(self, name, steps):
        """As sharded training frees it between uses; torch's operators read it, and end the process."""
        parts = ["input"] if name != "none" else []
        parts += [part for part, _ in build_norm(name, CHANNELS).named_parameters() if "." not in part]
        parts += [part for part in ("running_mean", "running_var") if part in buffers(build_norm(name, CHANNELS))]
        for part in parts:
            layer, x = trained(name, steps=steps), images()
            (x if part == "input" else getattr(layer, part)).untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match=r"storage|not allocated"):
                layer(x)

    @pytest.mark.parametrize("road", ["mask", "class", "double", "small", "residual"])
    @every_norm
    def test_storage_that_was_freed_raises_where_the_kernels_do_not_look(self, name, road):
        """After steps that they took: with a mask, a class, in float64, on a few values, in what is added."""
        layer, x, options = trained(name, steps=2), images(), {}
        part = layer.weight if name != "none" else x
        if road == "mask" and name != "none":
            options = {"mask": torch.ones(len(x), *x.shape[2:], dtype=torch.bool)}
        elif road == "class":
            x = x.as_subclass(Tagged)
        elif road == "double":
            x = x.double()
        elif road == "small":
            x = x[:1, :, :1, :1]
        elif road == "residual" and name in ("batch", "running", "running_instance"):
            x, part = x.double(), images().double()
            options = {"residual": part}
        if name != "none":
            part.untyped_storage().resize_(0)
            with pytest.raises(RuntimeError, match=r"storage|not allocated"):
                layer(x, **options)

    def test_a_threshold_or_a_convolutions_weight_that_was_freed_raises(self):
        activates = build_norm("filter_response", CHANNELS)
        activates.activation.tau.untyped_storage().resize_(0)
        layers = [activates]
        for kind in (CenteredConv2d, WeightStandardizedConv2d):
            layers.append(kind(CHANNELS, CHANNELS, 1))
            layers[-1].weight.untyped_storage().resize_(0)
        for layer in layers:
            with pytest.raises(RuntimeError, match="storage"):
                layer(images())

"""What torch's own layers hold to, held to by every registered norm: calls, attributes, switches and transforms."""

import copy
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.export import Dim, export
from torch.func import functional_call, grad, stack_module_state, vmap

import normlab.nn as norms
from normlab.errors import InputError
from normlab.nn import NORMS, build_norm

NAMES = [name for name in NORMS if name != "none"]
LAYERS = {"torch batch": lambda: nn.BatchNorm2d(8), "torch group": lambda: nn.GroupNorm(4, 8)}
LAYERS |= {name: lambda name=name: build_norm(name, 8) for name in NAMES}
TRACKING = [name for name, make in LAYERS.items() if getattr(make(), "num_batches_tracked", None) is not None]
TRACKED = [name for name in TRACKING if name in NAMES]
# Those that TorchScript has a form of; the others say so.
SCRIPTED = ["batch", "frozen", "running", "running_instance", "sync", "renorm", "ghost", "running_lesson", "mabn"]
SCRIPTED += ["group", "group_ws", "layer", "instance"]

every = pytest.mark.parametrize("name", LAYERS)
ours = pytest.mark.parametrize("name", NAMES)
both_modes = pytest.mark.parametrize("training", [True, False])


def needs_statistics(name):
    return getattr(build_norm(name, 8), "needs_statistics", False)


def made(name, training=True):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    for value in layer.parameters():
        nn.init.normal_(value, 1.0, 0.1)
    for _ in range(2):
        layer(images() + 1)
    return layer.train(training)


def images(n=4, *space, seed=0):
    shape = (n, 8, *(space or (5, 6)))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def near(one, other, tolerance=1e-5):
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@ours
def test_the_input_has_torchs_name_and_the_rest_is_by_keyword_only(name):
    first, *rest = inspect.signature(build_norm(name, 8).forward).parameters.values()
    assert first.name == "input"
    assert all(part.kind is inspect.Parameter.KEYWORD_ONLY for part in rest)
    near(made(name)(input=images()), made(name)(images()))
    with pytest.raises(TypeError):
        made(name)(images(), images())


@pytest.mark.parametrize("name", [name for name in TRACKED if name != "frozen"])
def test_arguments_come_in_torchs_order(name):
    torchs = nn.SyncBatchNorm if name == "sync" else nn.BatchNorm2d
    expected = list(inspect.signature(torchs).parameters.values())
    found = inspect.signature(NORMS[name].layers[1]).parameters
    positional = [part.name for part in expected if part.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert list(found)[: len(positional)] == positional
    assert {part.name for part in expected} <= set(found)


@ours
def test_a_norm_without_a_bias_learns_none(name):
    if name == "rms":
        pytest.skip("it has no β")
    layer = build_norm(name, 8, bias=False)
    assert "bias" not in dict(layer.named_parameters())
    assert layer.bias is None
    assert layer.weight is not None
    with_bias = build_norm(name, 8)
    for training in (True, False):
        x, y = (images().requires_grad_() for _ in range(2))
        one, other = layer.train(training)(x), with_bias.train(training)(y)
        near(one, other)
        (one * images(seed=1)).sum().backward()
        (other * images(seed=1)).sum().backward()
        if not name.startswith("running"):  # which learns γ and β together
            near(x.grad, y.grad)
            near(layer.weight.grad, with_bias.weight.grad, 1e-4)


@pytest.mark.parametrize("name", TRACKING)
def test_statistics_stay_while_tracking_is_switched_off(name):
    layer = made(name)
    kept, expected = copy.deepcopy(layer.state_dict()), copy.deepcopy(layer)
    layer.track_running_stats = False
    x, y = (images().requires_grad_() for _ in range(2))
    one, other = layer(x), expected(y)
    near(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    near(x.grad, y.grad, 1e-4)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, kept[key]), key
    layer.track_running_stats = True
    layer(images())
    assert layer.num_batches_tracked == kept["num_batches_tracked"] + (name != "frozen")


@pytest.mark.parametrize("name", [name for name in TRACKED if not needs_statistics(name)])
def test_without_statistics_evaluation_is_as_training(name):
    layer = build_norm(name, 8, track_running_stats=False)
    assert layer.running_var is None
    near(layer(images()), layer.eval()(images()))


@pytest.mark.parametrize("name", [name for name in TRACKED if needs_statistics(name)])
def test_a_norm_that_needs_its_statistics_says_so(name):
    with pytest.raises(InputError, match="this norm needs its statistics"):
        build_norm(name, 8, track_running_stats=False)


@pytest.mark.parametrize("name", [name for name in NAMES if NORMS[name].averages])
def test_momentum_none_is_the_mean_of_all_batches(name):
    layer, torchs = build_norm(name, 8, momentum=None), nn.BatchNorm2d(8, momentum=None)
    for seed in range(3):
        layer(images(seed=seed))
        torchs(images(seed=seed))
    near(layer.running_var, torchs.running_var, 0.05 if name == "renorm" else 1e-4)  # which averages deviations


@every
def test_compiled_it_is_one_graph_and_the_same(name):
    layer = made(name)
    torch._dynamo.reset()  # it counts compilations of a forward pass, which many norms share
    compiled = copy.deepcopy(layer)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager", dynamic=False)
    x, y = images().requires_grad_(), images().requires_grad_()
    one, other = run(x), layer(y)
    near(one, other)
    one.square().sum().backward()
    other.square().sum().backward()
    near(x.grad, y.grad, 1e-4)
    for found, expected in zip(compiled.buffers(), layer.buffers(), strict=True):
        near(found, expected, 1e-4)


@every
@both_modes
def test_tensor_subclasses_keep_their_class(name, training):
    class Named(torch.Tensor):
        pass

    layer, plain = made(name, training), made(name, training)
    x, y = images().requires_grad_(), images().requires_grad_()
    found = nn.ReLU(inplace=True)(layer(x.as_subclass(Named)))
    assert type(found) is Named
    expected = nn.ReLU(inplace=True)(plain(y))
    assert torch.equal(found.as_subclass(torch.Tensor), expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    assert torch.equal(x.grad, y.grad)
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


@every
@pytest.mark.parametrize("dims", [{0: Dim("n")}, {2: Dim("h"), 3: Dim("w")}])
def test_export_with_any_batch_and_any_space(name, dims):
    layer = made(name, training=False)
    program = export(layer, (images(3),), dynamic_shapes=(dims,)).module()
    other = images(200) if 0 in dims else images(3, 70, 81)
    near(program(other), layer(other))


@every
@pytest.mark.parametrize("gradients", [True, False])
@both_modes
def test_trace(name, gradients, training):
    if training and name in (*TRACKING, "torch batch") and name != "frozen":
        pytest.skip("two runs in training mode differ, in torch too")
    layer = made(name, training)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(layer, images())
    near(traced(images(2, 7, 3)), layer(images(2, 7, 3)), 1e-4)


@pytest.mark.parametrize("name", ["torch batch", "torch group", *NAMES])
def test_script_in_evaluation_or_a_refusal(name):
    net = nn.Sequential(made(name)).eval()
    inside = net[0]
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            scripted = torch.jit.script(net)
        except InputError:
            with pytest.raises(InputError, match=r"no form for torch\.jit\.script"):
                torch.jit.script(net)
            assert name not in SCRIPTED
            return
        torch.jit.save(scripted, file)
        file.seek(0)
        loaded = torch.jit.load(file)
    near(loaded(images()), net(images()))
    assert net[0] is inside  # the model is as it was


def test_a_lesson_norm_of_few_images_is_scripted_with_its_least_variance():
    layer = build_norm("running_lesson", 8)
    layer(images() / 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        near(torch.jit.script(layer.eval())(images()), layer(images()))


@every
@both_modes
def test_a_traced_graph_calls_the_layer(name, training):
    net = nn.Sequential(nn.Conv2d(8, 8, 1), made(name), nn.ReLU()).train(training)
    traced = torch.fx.symbolic_trace(copy.deepcopy(net))
    assert [node.op for node in traced.graph.nodes] == ["placeholder", *["call_module"] * 3, "output"]
    near(traced(images()), net(images()))


@ours
def test_a_class_of_ones_own_is_not_traced_as_the_layer_it_comes_from(name):
    class Doubled(type(build_norm(name, 8))):
        def forward(self, input, *, mask=None):
            return 2 * super().forward(input, mask=mask)

    for net in (nn.Sequential(nn.ReLU(), Doubled(8)), build_norm(name, 8)):
        with pytest.raises(torch.fx.proxy.TraceError, match="Make it a leaf"):
            torch.fx.symbolic_trace(net)


def test_a_scripted_running_norm_refuses_to_train():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(build_norm("running", 8))
    with pytest.raises(torch.jit.Error, match="scripted for evaluation"):
        scripted(images())


@every
@both_modes
def test_an_ensemble_by_vmap(name, training):
    layers = [made(name, training) for _ in range(3)]
    for scale, layer in enumerate(layers):
        layer.weight.data.mul_(1 + scale)
    alone = [copy.deepcopy(layer) for layer in layers]
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    x = images()
    found = vmap(lambda p, b: functional_call(base, (p, b), (x,)))(parameters, buffers)
    near(found, torch.stack([layer(x) for layer in alone]), 1e-4)
    for key, value in buffers.items():
        near(value, torch.stack([layer.get_buffer(key) for layer in alone]), 1e-4)


@every
def test_gradients_of_an_ensemble_by_vmap(name):
    layers = [made(name) for _ in range(3)]
    parameters, buffers = stack_module_state(layers)
    base = copy.deepcopy(layers[0]).to("meta")
    x, of_loss = images(), images(seed=1)
    found = vmap(grad(lambda p, b: (functional_call(base, (p, b), (x,)) * of_loss).sum()))(parameters, buffers)
    (layers[0](x) * of_loss).sum().backward()
    for key, value in found.items():
        near(value[1], layers[0].get_parameter(key).grad, 1e-3)
    for key, value in buffers.items():
        near(value[1], layers[0].get_buffer(key), 1e-3)


@every
@both_modes
def test_copies_pickles_and_states_go_on_alike(name, training):
    layer = made(name, training)
    loaded = LAYERS[name]().train(training)
    loaded.load_state_dict(layer.state_dict())
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), loaded]
    for one in copies:
        assert list(one.state_dict()) == list(layer.state_dict())
    expected = [layer(images(seed=seed)) for seed in range(2)]
    for one in copies:
        for seed in range(2):
            assert torch.equal(one(images(seed=seed)), expected[seed])


@every
def test_half_precision(name):
    layer = made(name).to(torch.bfloat16)
    y = layer(images().bfloat16())
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


@every
@both_modes
def test_the_meta_device_knows_the_shape(name, training):
    with torch.device("meta"):
        layer = LAYERS[name]().train(training)
        assert layer(torch.empty(4, 8, 5, 6)).shape == (4, 8, 5, 6)


@every
def test_made_on_meta_and_reset_is_a_new_layer(name):
    new = LAYERS[name]()
    with torch.device("meta"):
        layer = LAYERS[name]()
    layer.to_empty(device="cpu")
    for value in (*layer.parameters(), *layer.buffers()):
        value.data.fill_(77)
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    for key, value in new.state_dict().items():
        assert torch.equal(layer.state_dict()[key], value), key


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_activation_survives_torchs_conversion_to_sync(dims):
    kind = getattr(norms, f"BatchNorm{dims}d")
    net = nn.Sequential(kind(8, activation="relu"), kind(8))
    x = torch.randn(4, 8, *[3] * dims)
    expected = copy.deepcopy(net).eval()(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net).eval()
    assert isinstance(converted[1], nn.SyncBatchNorm)
    assert (converted[0](x) >= 0).all()
    near(converted(x), expected)
    assert isinstance(pickle.loads(pickle.dumps(net[0])), getattr(norms, f"BatchNormAct{dims}d"))
    assert isinstance(kind(8), getattr(nn, f"BatchNorm{dims}d"))


def test_a_class_of_ones_own_with_an_activation_is_told_which_to_derive_from():
    class Mine(norms.BatchNorm2d):
        pass

    assert isinstance(Mine(8), nn.BatchNorm2d)
    with pytest.raises(InputError, match="BatchNormAct"):
        Mine(8, activation="relu")


@ours
@pytest.mark.parametrize("affine", [True, False])
def test_the_next_layer_may_change_the_output_in_place(name, affine):
    def gradient(change):
        layer = build_norm(name, 8, affine=affine)
        x = images().requires_grad_()
        change(layer(x)).square().sum().backward()
        return x.grad

    near(gradient(lambda y: y.mul_(2).add_(1)), gradient(lambda y: 2 * y + 1))


@pytest.mark.parametrize("name", [name for name in TRACKED if name != "frozen"])
def test_a_layer_without_parameters_trains_on_double_precision_as_in_it(name):
    layer, double = build_norm(name, 8, affine=False), build_norm(name, 8, affine=False).double()
    for _ in range(3):
        x = images(seed=1).double().requires_grad_()
        x_double = x.detach().clone().requires_grad_()
        layer(x).square().sum().backward()
        double(x_double).square().sum().backward()
        near(x.grad, x_double.grad)


def expected_input(layer, dims):
    """As an error says it."""
    if not hasattr(layer, "accepted_dims"):
        return "(N, 8, *space)"
    return {1: "(N, 8) or (N, 8, L)", 2: "(N, 8, H, W)", 3: "(N, 8, D, H, W)"}[dims]


@ours
@both_modes
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("shape", [(8,), (2, 4, 3, 3), (2, 4, 3), (2, 4, 3, 3, 3)])
def test_an_input_of_another_shape_is_told_the_layer_and_what_it_expects(name, training, dims, shape):
    layer = build_norm(name, 8, dims).train(training)
    with pytest.raises(InputError) as error:
        layer(torch.randn(shape))
    expected = f"{type(layer).__name__}(8): expected input {expected_input(layer, dims)}, got {shape}."
    assert str(error.value) == expected

"""What users of batch norm complain of: each complaint that a layer or surgery can answer has a test named after it.

A test shows the complaint first, with torch's own layer or with a few lines that stand for another library's; then that
it is answered here. Its docstring names the threads.
"""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import normlab
from checks import assert_same_state, composed
from normlab.data import TensorBatches
from normlab.nn import (
    NORMS,
    BatchNorm1d,
    BatchNorm2d,
    BatchRenorm2d,
    RunningBatchNorm1d,
    RunningBatchNorm2d,
    SyncBatchNorm2d,
    build_norm,
)
from normlab.training import Learner

# By number in the survey of the field that the project began with.
COMPLAINTS = {
    1: (
        "pytorch/pytorch#4534",
        "pytorch/pytorch#1381",
        "pytorch/pytorch#2961",
        "pytorch/pytorch#77014",
        "discuss.pytorch.org/t/26274",
        "discuss.pytorch.org/t/129688",
    ),
    2: ("pyg-team/pytorch_geometric#5530",),
    3: ("xuebinqin/BASNet#42",),
    4: ("intel/ipex-llm#2256", "torch/nn#1133", "constantinpape/torch-em#499", "constantinpape/torch-em#510"),
    5: ("Lightning-AI/pytorch-lightning#14085",),
    6: ("chemprop/chemprop#607",),
    7: ("pytorch/pytorch#19916", "keras-team/keras#7265", "keras-team/keras#12851"),
    8: ("patrick-kidger/equinox#955",),
    9: ("pytorch/pytorch#1206", "MCC-WH/Token#9"),
    10: ("pytorch/pytorch#90342", "pytorch/pytorch#115500", "pytorch/pytorch#88929", "open-mmlab/mmcv#1910"),
    11: ("vacancy/Synchronized-BatchNorm-PyTorch#40", "ultralytics/yolov5#3754", "facebookresearch/SLIP#30"),
    12: ("pytorch/pytorch#62967", "pytorch/pytorch#64039"),
    13: ("pytorch/pytorch#41081", "open-mmlab/mmocr#398"),
    14: ("huggingface/pytorch-image-models#1254", "pytorch/pytorch#187298"),
    15: ("pytorch/pytorch#22095", "pytorch/pytorch#110363", "pytorch/pytorch#175024"),
    16: ("pytorch/pytorch#194504", "pytorch/pytorch#195827", "pytorch/pytorch#70444"),
    17: ("pytorch/pytorch#75252", "pytorch/pytorch#45333"),
    18: ("pytorch/pytorch#60063", "pytorch/pytorch#48919"),
    19: (
        "pytorch/pytorch#46516",
        "andreped/GradientAccumulator#6",
        "andreped/GradientAccumulator#47",
        "giotto-ai/giotto-deep#75",
    ),
    20: ("pytorch/pytorch#96136", "m2lines/Samudra#572"),
    21: ("lucidrains/ema-pytorch#29", "pytorch/ignite#2590", "pytorch/pytorch#49082"),
    22: (
        "ppwwyyxx/GroupNorm-reproduce#2",
        "Res2Net/Res2Net-PretrainedModels#74",
        "qubvel-org/segmentation_models.pytorch#488",
        "real-stanford/diffusion_policy#151",
        "huggingface/lerobot#1886",
        "huggingface/lerobot#1887",
    ),
    23: ("pytorch/pytorch#66073", "pytorch/pytorch#86590", "pytorch/vision#5443", "pytorch/vision#6543"),
    24: ("kreshuklab/panseg#577",),
}
# What neither a layer nor surgery can answer, and why.
NOT_OURS = {
    "vacancy/Synchronized-BatchNorm-PyTorch#40": "its layer waits for threads of DataParallel; ours knows processes",
    "ultralytics/yolov5#3754": "one process alone ran the model again, to trace it: the others cannot know",
    "pytorch/pytorch#60063": "the time of a kernel for GPUs in torch; benchmarks/norms.py has the times of ours",
}
LINK = re.compile(r"[\w.-]+/[\w.-]+#\d+|discuss\.pytorch\.org/t/\d+")
TRACKING = [name for name in NORMS if any(True for _ in build_norm(name, 8).buffers())]


def test_every_complaint_is_answered_by_a_test_or_named_as_not_ours():
    answered: list[str] = []
    for name, test in list(globals().items()):
        links = LINK.findall(test.__doc__ or "") if name.startswith("test_") else []
        if links:
            assert re.split(r"\D", links[0])[-1] in name.split("_"), f"{name} is about {links[0]}"
        answered += links
    assert len(answered) == len(set(answered))
    assert list(COMPLAINTS) == list(range(1, 25))
    assert {*answered, *NOT_OURS} == {link for links in COMPLAINTS.values() for link in links}
    assert not set(answered) & set(NOT_OURS)


# --- what the tests share ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine two would wait for one another most of the time, with nets as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def numbers(*shape: int, mean: float = 0.0, deviation: float = 1.0, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * deviation + mean


def bright_images(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, brighter by two deviations in class 1: what the statistics of a single image would take away."""
    targets = torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed))
    return numbers(n, 1, 4, 4, seed=seed) + 2.0 * targets.view(-1, 1, 1, 1), targets


def net(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3, padding=1), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8, 2))


def fit(model: nn.Module, batch_size: int, images: int = 400, lr: float = 0.1, seed: int = 1) -> nn.Module:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr)
    batches = TensorBatches(*bright_images(images, seed), batch_size=batch_size)
    Learner(model, batches, optimizer=optimizer).fit(1)
    return model


def accuracy(model: nn.Module, batch_size: int = 256) -> float:
    images, targets = bright_images(256, seed=2)
    with torch.no_grad():
        output = torch.cat([model.eval()(part) for part in images.split(batch_size)])
    return (output.argmax(1) == targets).double().mean().item()


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(model).eval()(x)


def is_finite(module: nn.Module) -> bool:
    return all(bool(value.isfinite().all()) for value in module.state_dict().values())


# --- batches of one and two -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["batch", "running"])
def test_pytorch_4534_a_last_batch_of_one_image(to):
    """Training ends with an error where one image is left over.

    pytorch/pytorch#4534, pytorch/pytorch#77014, discuss.pytorch.org/t/26274.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fit(model, batch_size=2, images=5)
    normlab.convert(model, to, inplace=True)
    fit(model, batch_size=2, images=5)
    assert is_finite(model)


def test_pytorch_1381_one_value_a_channel_puts_no_nan_into_the_variance():
    """Without torch's check n/(n − 1) makes the variance NaN: pytorch/pytorch#1381, pytorch/pytorch#2961."""
    x, mean, var = numbers(1, 3, 1, 1), torch.zeros(3), torch.ones(3)
    torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False)  # what is below the check
    assert var.isnan().all()
    layer = BatchNorm2d(3)
    layer(x)
    assert torch.equal(layer.running_var, torch.ones(3))
    torch.testing.assert_close(layer.running_mean, 0.1 * x.flatten())


def test_forum_129688_evaluation_of_one_image_at_a_time():
    """Accuracy falls to that of chance at batch size 1 in evaluation: discuss.pytorch.org/t/129688."""
    torchs = fit(net(lambda n: nn.BatchNorm2d(n, track_running_stats=False)), batch_size=2)
    assert accuracy(torchs) > 0.95
    assert accuracy(torchs, batch_size=1) < 0.6
    ours = fit(net(RunningBatchNorm2d), batch_size=2)
    assert accuracy(ours) == accuracy(ours, batch_size=1) > 0.95


def test_pytorch_geometric_5530_a_single_element_is_normalised_as_in_evaluation():
    """A batch of one node should fall back to the running statistics: pyg-team/pytorch_geometric#5530."""
    single = numbers(1, 4, mean=3, deviation=2, seed=1)
    torchs = nn.BatchNorm1d(4)
    for x in numbers(50, 8, 4, mean=3, deviation=2):
        torchs(x)
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        torchs(single)
    expected = evaluated(torchs, single)
    assert expected.abs().min() > 0.1
    for to, options, closeness in (
        ("frozen", {}, 1e-5),
        ("renorm", {"r_ramp": (0, 1), "d_ramp": (0, 1)}, 1e-5),
        ("running", {}, 0.1),  # the element enters the statistics first, with a share of 0.1
    ):
        layer = normlab.convert(torchs, to, **options).model.train()
        torch.testing.assert_close(layer(single), expected, rtol=closeness, atol=closeness)


def test_basnet_42_one_image_a_batch_trains_as_well_as_eight():
    """Training with batch size 1 ends far worse than with 8: xuebinqin/BASNet#42."""
    assert accuracy(fit(net(nn.BatchNorm2d), batch_size=8)) > 0.95
    assert accuracy(fit(net(nn.BatchNorm2d), batch_size=1)) < 0.6
    assert accuracy(fit(net(RunningBatchNorm2d), batch_size=1)) > 0.95


def test_torch_nn_1133_batch_renorm_is_there_by_name():
    """Batch renorm is missing: torch/nn#1133, intel/ipex-llm#2256, constantinpape/torch-em#499."""
    assert not [name for name in dir(nn) if "renorm" in name.lower()]
    model = normlab.convert(net(nn.BatchNorm2d), "renorm", r_ramp=(0, 1), d_ramp=(0, 1)).model
    assert isinstance(model[1], BatchRenorm2d)
    assert accuracy(fit(model, batch_size=2)) > 0.95
    x, _ = bright_images(2, seed=3)
    expected = evaluated(model, x)
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-3, atol=1e-3)  # what renorm is for


def test_torch_em_510_batch_renorm_in_mixed_precision():
    """A port of batch renorm gives NaN after some steps of mixed precision: constantinpape/torch-em#510."""
    steps = [numbers(4, 3, 8, 8, deviation=400, seed=seed).half() for seed in range(3)]
    running_mean, running_std = torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)
    for x in steps:  # the formulas in the type of the input: 400² is no number of half precision
        std = (x.var((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        mean = x.mean((0, 2, 3), keepdim=True)
        r = (std / running_std).clamp(1 / 3, 3)
        y = (x - mean) / std * r + ((mean - running_mean) / running_std).clamp(-5, 5)
        running_mean, running_std = running_mean.lerp(mean.float(), 0.1), running_std.lerp(std.float(), 0.1)
    assert y.isnan().any()
    layer, exact = (build_norm("renorm", 3, r_ramp=(0, 1), d_ramp=(0, 1)) for _ in range(2))
    for x in steps:
        with torch.autocast("cpu", dtype=torch.float16):
            y = layer(x)
        torch.testing.assert_close(y.float(), exact(x.float()), rtol=2e-3, atol=2e-3)


# --- between training and evaluation ----------------------------------------------------------------------------------


def test_lightning_14085_validation_loss_is_that_of_training():
    """Loss is near 1 in training and explodes in validation: Lightning-AI/pytorch-lightning#14085."""
    batches = [numbers(16, 4, mean=1e4, deviation=1, seed=seed) for seed in range(10)]
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))

    def losses(model: nn.Module) -> Tensor:
        return torch.stack([model(x).square().mean().detach() for x in batches])

    in_training = losses(model)
    assert losses(model.eval()).mean() > 1e5 * in_training.mean()
    normlab.recalibrate(model, batches)
    torch.testing.assert_close(losses(model).mean(), in_training.mean(), rtol=0.2, atol=0)


def test_chemprop_607_early_statistics_are_not_biased_to_0_and_1():
    """Running statistics start at 0 and 1 and stay near them for long: chemprop/chemprop#607."""
    x = numbers(64, 4, mean=5, deviation=3)
    torchs, ours = nn.BatchNorm1d(4), RunningBatchNorm1d(4)
    torchs(x), ours(x)
    torch.testing.assert_close(torchs.running_mean, 0.1 * x.mean(0))
    torch.testing.assert_close(ours.running_mean, x.mean(0))
    torch.testing.assert_close(ours.running_var, x.var(0, correction=0))
    normlab.recalibrate(torchs, [x])  # and for the layer as it is
    torch.testing.assert_close(torchs.running_mean, x.mean(0))
    torch.testing.assert_close(torchs.running_var, x.var(0))


def test_pytorch_19916_evaluation_divides_by_the_variance_of_training():
    """Of two values a channel evaluation takes twice the variance that training takes: pytorch/pytorch#19916."""
    x = numbers(2, 4, 1, 1, deviation=5)
    for layer, ratio in ((nn.BatchNorm2d(4), 2**-0.5), (RunningBatchNorm2d(4), 1.0)):
        for _ in range(200):
            y = layer(x)
        torch.testing.assert_close(evaluated(layer, x), ratio * y.detach(), rtol=1e-3, atol=1e-4)


def test_keras_7265_the_same_images_have_the_same_loss_in_training_and_evaluation():
    """Loss of the same data differs between fit and evaluate: keras-team/keras#7265, keras-team/keras#12851."""
    x, targets = bright_images(8, seed=3)
    differences = []
    for norm in (nn.BatchNorm2d, RunningBatchNorm2d):
        model = fit(net(norm), batch_size=8).train()
        loss = nn.functional.cross_entropy(model(x), targets)
        differences.append(abs(loss - nn.functional.cross_entropy(evaluated(model, x), targets)).item())
    assert differences[0] > 1e-3
    assert differences[1] < 1e-5


@pytest.mark.parametrize("name", TRACKING)
def test_equinox_955_evaluation_before_training_explodes_nothing(name):
    """A variance that starts at 0 makes an untrained net explode in inference: patrick-kidger/equinox#955."""
    x = numbers(4, 8, 5, 5)
    zero = nn.BatchNorm2d(8).eval()
    zero.running_var.zero_()
    assert zero(zero(x)).abs().max() > 1e4
    model = nn.Sequential(*(build_norm(name, 8) for _ in range(6)))
    assert model.eval()(x).abs().max() < 10 * x.abs().max()


# --- values that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_pytorch_1206_a_spoilt_batch_is_not_found_out_only_at_test_time(poison):
    """Training goes on, evaluation is NaN for good: pytorch/pytorch#1206, MCC-WH/Token#9."""
    clean, spoilt = numbers(4, 3, 5, 5), numbers(4, 3, 5, 5, seed=1)
    spoilt[1, 2, 0, 0] = poison
    for norm in (nn.BatchNorm2d, BatchNorm2d, RunningBatchNorm2d):
        model = nn.Sequential(norm(3))
        for x in (clean, spoilt, clean):
            y = model(x)
        assert y.isfinite().all()
        survives = norm is not nn.BatchNorm2d
        assert bool(evaluated(model, clean).isfinite().all()) is survives
        _, report = normlab.recalibrate(model, [clean])  # mends the model that has it already
        assert ("was not finite" in report.rows[0].note) is not survives
        assert evaluated(model, clean).isfinite().all()


def test_pytorch_90342_a_step_that_the_scaler_skips_leaves_the_statistics_alone():
    """The step of a batch with inf can be skipped, its running statistics not: pytorch/pytorch#90342."""
    for norm, survives in ((nn.BatchNorm2d, False), (BatchNorm2d, True), (RunningBatchNorm2d, True)):
        model = net(norm)
        before = copy.deepcopy(model)
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu")
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(1e6 * bright_images(4, seed=3)[0]).float().square().sum()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model[5].weight, before[5].weight)  # skipped
        assert is_finite(model) is survives
        if survives:
            assert torch.equal(model[1].running_mean, before[1].running_mean)
            assert torch.equal(model[1].running_var, before[1].running_var)


def test_pytorch_115500_an_overflow_before_the_norm_leaves_its_statistics_finite():
    """Under autocast a layer before the norm overflows, and its mean is NaN: pytorch/pytorch#115500."""
    torch.manual_seed(0)
    linear, x = nn.Linear(10, 10), numbers(2, 10).abs() * 1e6
    for norm, survives in ((nn.BatchNorm1d, False), (BatchNorm1d, True), (RunningBatchNorm1d, True)):
        layer = norm(10)
        with torch.autocast("cpu", dtype=torch.float16):
            assert not linear(x).isfinite().all()
            layer(linear(x))
        assert is_finite(layer) is survives


@pytest.mark.parametrize("name", TRACKING)
def test_pytorch_88929_statistics_stay_in_single_precision(name):
    """Norms should stay in float32 where the rest is half: pytorch/pytorch#88929, open-mmlab/mmcv#1910."""
    assert nn.BatchNorm2d(8).half().running_mean.dtype == torch.float16
    model = nn.Sequential(build_norm(name, 8)).half()
    assert all(value.dtype != torch.float16 for value in model.buffers())
    layer, exact = build_norm(name, 8), build_norm(name, 8)
    x = numbers(4, 8, 5, 5, mean=100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.bfloat16())
    torch.testing.assert_close(y.float(), exact(x.bfloat16().float()), rtol=0.01, atol=0.01)  # rounded once, at the end
    for value, other in zip(layer.buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    """A process group, of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_slip_30_a_spoilt_batch_does_not_spoil_predictions_after_it():
    """With sync batch norm predictions become NaN in the middle of training: facebookresearch/SLIP#30."""
    x, _ = bright_images(4, seed=3)
    spoilt = x.clone()
    spoilt[0, 0, 0, 0] = float("inf")
    # Torch's sync batch norm takes no CPU: its batch norm stands for it, which keeps statistics by the same rule.
    for model, survives in ((net(nn.BatchNorm2d), False), (normlab.sync(net(nn.BatchNorm2d)).model, True)):
        model(spoilt)
        assert bool(evaluated(model, x).isfinite().all()) is survives


def test_pytorch_62967_sync_of_permuted_inputs():
    """Sync batch norm is wrong on permuted inputs, and its gradient: pytorch/pytorch#62967, pytorch/pytorch#64039."""
    layer = SyncBatchNorm2d(3)  # of one process: batch norm; tests/nn/test_sync.py has permuted inputs of three
    x, grad = numbers(2, 4, 7, 3, 1)  # (N, T, C, 1): channels are brought forward by a transposition

    def step(layer: nn.Module, order: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = layer(order(leaf.transpose(1, 2)))
        y.backward(order(grad.transpose(1, 2)))
        return y.detach(), leaf.grad

    expected = step(nn.BatchNorm2d(3), lambda value: value.contiguous())
    for order in (lambda value: value, lambda value: value.contiguous()):
        torch.testing.assert_close(step(layer, order), expected)


def test_pytorch_41081_sync_batch_norm_goes_back_to_batch_norm(one_process):
    """There is no way back from sync batch norm, nor to a CPU: pytorch/pytorch#41081, open-mmlab/mmocr#398."""
    model = fit(net(nn.BatchNorm2d), batch_size=8).train()
    x, _ = bright_images(4, seed=3)
    torchs = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    with pytest.raises(ValueError, match="expected input tensor to be on"):
        copy.deepcopy(torchs)(x)
    ours = normlab.sync(model).model
    torch.testing.assert_close(copy.deepcopy(ours)(x), copy.deepcopy(model)(x))
    for synced in (torchs, ours):
        back = normlab.unsync(synced).model
        assert type(back[1]) is BatchNorm2d
        assert_same_state(back, model)
        torch.testing.assert_close(evaluated(back, x), evaluated(model, x))


def test_timm_1254_a_conversion_never_drops_an_activation():
    """Sync conversion drops the activation of a subclass in silence.

    huggingface/pytorch-image-models#1254, pytorch/pytorch#187298.
    """

    class BatchNormAct2d(nn.BatchNorm2d):
        def __init__(self, num_features: int):
            super().__init__(num_features)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(super().forward(x))

    model, x = nn.Sequential(BatchNormAct2d(3)).eval(), numbers(4, 3, 5, 5)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))(x).min() < 0
    for to in ("sync", "running", "group", "frozen"):
        conversion = normlab.convert(model, to)
        assert torch.equal(conversion.model(x), model(x))
        assert "would be lost: act" in conversion.report.rows[0].note
    own = nn.Sequential(BatchNorm2d(3, activation="relu")).eval()
    assert normlab.sync(own).model(x).min() == 0


@pytest.mark.parametrize("name", TRACKING)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kernels", [nullcontext, composed])
def test_pytorch_175024_two_forward_passes_before_the_backward_pass(name, training, kernels):
    """The broadcast of buffers breaks two forward passes before a backward pass.

    pytorch/pytorch#175024, pytorch/pytorch#22095, pytorch/pytorch#110363.
    """

    def gradient(norm: nn.Module, broadcast: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 1), norm).train(training)
        loss = torch.zeros(())
        for seed in range(2):
            for buffer in model.buffers():
                if broadcast:  # as DistributedDataParallel does it, before each forward pass
                    buffer.copy_(buffer.clone())
            loss = loss + model(numbers(4, 3, 5, 5, seed=seed)).pow(3).mean()
        loss.backward()
        return model[0].weight.grad

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(nn.BatchNorm2d(8), broadcast=True)
    with kernels():
        expected = gradient(build_norm(name, 8), broadcast=False)
        torch.testing.assert_close(gradient(build_norm(name, 8), broadcast=True), expected)


# --- compiler, export, memory -----------------------------------------------------------------------------------------


def test_pytorch_194504_the_mean_of_all_batches_compiles_in_one_graph():
    """Compiled as one graph, `momentum=None` is an error: pytorch/pytorch#194504, pytorch/pytorch#195827."""
    torch.compiler.reset()
    with pytest.raises(Exception, match=r"data-dependent|momentum"):
        torch.compile(nn.BatchNorm2d(3, momentum=None), fullgraph=True, backend="eager")(numbers(2, 3, 4, 4))
    layer, plain = BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for seed in range(3):
        x = numbers(2, 3, 4, 4, seed=seed)
        torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", TRACKING)
def test_pytorch_70444_buffers_stay_in_their_memory(name):
    """A counter that is another tensor each step corrupts CUDA graphs: pytorch/pytorch#70444."""
    layer = build_norm(name, 8)
    before = [(buffer, buffer.data_ptr()) for buffer in layer.buffers()]
    for seed in range(2):
        layer(numbers(4, 8, 5, 5, seed=seed)).square().mean().backward()
    assert all(new is old for new, (old, _) in zip(layer.buffers(), before, strict=True))
    assert [buffer.data_ptr() for buffer in layer.buffers()] == [place for _, place in before]


def test_pytorch_75252_onnx_without_running_statistics():
    """ONNX export fails or is wrong with `track_running_stats=False`: pytorch/pytorch#75252, pytorch/pytorch#45333."""
    layer, x = BatchNorm2d(3, track_running_stats=False).eval(), numbers(2, 3, 4, 4, mean=5, deviation=3)
    program = torch.onnx.export(layer, (x,), dynamo=True, verbose=False)
    session = ReferenceEvaluator(program.model_proto)
    (y,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 7])
@pytest.mark.parametrize("to", ["batch", "running", "group"])
def test_pytorch_48919_channels_last_stays_channels_last(to, side):
    """Channels last needs kernels of its own on a CPU, or is brought into another order: pytorch/pytorch#48919."""
    layer, other = build_norm(to, 16), build_norm(to, 16)
    x = numbers(4, 16, side, side + 1)
    last = x.to(memory_format=torch.channels_last).requires_grad_()
    y = layer(last)
    y.backward(x.to(memory_format=torch.channels_last))
    leaf = x.clone().requires_grad_()
    expected = other(leaf)
    expected.backward(x)
    for value, plain in ((y, expected), (last.grad, leaf.grad)):
        assert value.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(value, plain, rtol=1e-4, atol=1e-5)


# --- accumulation, checkpoints, averages ------------------------------------------------------------------------------


def test_pytorch_46516_batches_in_parts_are_near_to_the_whole():
    """Under accumulation statistics are those of each part.

    pytorch/pytorch#46516, andreped/GradientAccumulator#6, andreped/GradientAccumulator#47, giotto-ai/giotto-deep#75.
    """
    x, targets = bright_images(32, seed=3)

    def gradient(model: nn.Module, parts: int) -> Tensor:
        model = copy.deepcopy(model).train()
        model.zero_grad()
        for images, wanted in zip(x.chunk(parts), targets.chunk(parts), strict=True):
            (nn.functional.cross_entropy(model(images), wanted) / parts).backward()
        return model[0].weight.grad

    def difference(model: nn.Module) -> float:
        whole = gradient(model, 1)
        return ((gradient(model, 16) - whole).norm() / whole.norm()).item()

    trained = fit(net(nn.BatchNorm2d), batch_size=8, images=64)
    assert difference(trained) > 0.2
    assert difference(normlab.freeze(trained).model) < 1e-4
    assert difference(normlab.convert(trained, "group").model) < 1e-4
    # What parts have for statistics is not theirs alone with `running`: it reaches back over many of them.
    whole = nn.functional.batch_norm(trained[0](x), None, None, training=True)
    errors = []
    for norm in (nn.BatchNorm2d(8, affine=False), RunningBatchNorm2d(8, affine=False)):
        for seed in range(5):
            for images in bright_images(64, seed)[0].split(2):
                norm(trained[0](images))
        errors.append((torch.cat([norm(trained[0](images)) for images in x.split(2)]) - whole).norm().item())
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_pytorch_96136_a_checkpoint_counts_its_batch_once(use_reentrant):
    """Activation checkpoints update running statistics twice: pytorch/pytorch#96136, m2lines/Samudra#572."""
    for norm, counted in ((nn.BatchNorm2d, 2), (BatchNorm2d, 1), (RunningBatchNorm2d, 1)):
        layer, plain = norm(3), norm(3)
        x = numbers(4, 3, 5, 5, mean=2).requires_grad_()
        checkpoint(layer, x, use_reentrant=use_reentrant).square().mean().backward()
        plain(x).square().mean().backward()
        assert layer.num_batches_tracked == counted
        assert torch.equal(layer.running_mean, plain.running_mean) is (counted == 1)


def test_ema_pytorch_29_an_average_of_weights_has_statistics_of_its_own():
    """What to do with batch norm's buffers in an average of weights: lucidrains/ema-pytorch#29, pytorch/ignite#2590."""
    model = net(nn.BatchNorm2d)
    average = AveragedModel(model)  # of parameters; buffers are those of the first day
    for seed in range(5):
        fit(model, batch_size=8, seed=seed)
        average.update_parameters(model)
    images, targets = bright_images(256, seed=2)
    stale = nn.functional.cross_entropy(evaluated(average, images), targets)
    _, report = normlab.recalibrate(average, bright_images(400, seed=1)[0].split(2))
    assert [row.name for row in report.touched] == ["module.1"]
    assert nn.functional.cross_entropy(evaluated(average, images), targets) < 0.7 * stale
    given = average.module[0](bright_images(400, seed=1)[0]).detach()
    torch.testing.assert_close(average.module[1].running_mean, given.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_pytorch_49082_statistics_of_a_model_with_several_inputs():
    """`update_bn` cannot feed a model of two inputs: pytorch/pytorch#49082."""

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, one: Tensor, other: Tensor) -> Tensor:
            return self.norm(one + other)

    batches = [(numbers(8, 4, mean=2, seed=seed), numbers(8, 4, seed=10 + seed)) for seed in range(5)]
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        update_bn(batches, Pair())
    model = Pair()
    normlab.recalibrate(model, batches, forward=lambda model, batch: model(*batch))
    sums = torch.cat([one + other for one, other in batches])
    torch.testing.assert_close(model.norm.running_mean, sums.mean(0))
    torch.testing.assert_close(model.norm.running_var, sums.var(0))


# --- conversion -------------------------------------------------------------------------------------------------------


def test_groupnorm_reproduce_2_what_a_conversion_to_group_norm_changes_is_measured():
    """Weights of batch norm in a net of group norm are "very bad", unforeseen.

    ppwwyyxx/GroupNorm-reproduce#2, Res2Net/Res2Net-PretrainedModels#74, huggingface/lerobot#1886,
    huggingface/lerobot#1887.
    """
    model = fit(net(nn.BatchNorm2d), batch_size=8)
    x, _ = bright_images(256, seed=2)
    group = copy.deepcopy(model)
    group[1] = nn.GroupNorm(8, 8)
    group[1].load_state_dict(model[1].state_dict(), strict=False)  # no error, no word
    before, after = evaluated(model, x), evaluated(group, x)
    change = ((after - before).square().mean().sqrt() / before.std(correction=0)).item()
    assert change > 0.5
    told = normlab.convert(model, "group", num_groups=8, batches=[x])
    assert told.report.change == pytest.approx(change, rel=1e-3)
    assert "another function" in told.report.rows[0].note
    fitted = normlab.convert(model, "group", num_groups=2, batches=[x], fit=True).report
    assert fitted.rows[0].change < normlab.convert(model, "group", num_groups=2, batches=[x]).report.rows[0].change
    exact = normlab.convert(model, "running", batches=[x]).report
    assert exact.change < 1e-4


def test_smp_488_modules_are_not_replaced_while_they_are_gone_through():
    """The loop that replaces norms fails, "mutated during iteration": qubvel-org/segmentation_models.pytorch#488."""

    def deep() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.Sequential(nn.BatchNorm2d(4)))

    def replace(model: nn.Module) -> None:
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                model._modules[name] = nn.GroupNorm(2, 4)

    with pytest.raises(RuntimeError, match=r"changed size|mutated"):
        replace(deep())
    for to in NORMS:
        model = normlab.convert(deep(), to, inplace=True).model
        assert not [module for module in model.modules() if type(module) is nn.BatchNorm2d]


def test_diffusion_policy_151_a_shared_backbone_is_converted_wherever_it_is_used():
    """A backbone that several cameras share keeps its batch norm: real-stanford/diffusion_policy#151."""
    shared, norm = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)), nn.BatchNorm2d(4)
    model = nn.ModuleDict({"left": shared, "right": shared})
    model.add_module("one", norm), model.add_module("other", norm)
    naive = copy.deepcopy(model)
    for name, module in list(naive.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, key = name.rpartition(".")
            naive.get_submodule(parent)._modules[key] = nn.GroupNorm(2, 4)
    assert isinstance(naive["other"], nn.BatchNorm2d)
    conversion = normlab.convert(model, "group")
    assert not [module for module in conversion.model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert conversion.model["left"] is conversion.model["right"]
    assert conversion.model["one"] is conversion.model["other"]
    assert [row.name for row in conversion.report] == ["left.1, right.1", "one, other"]


# --- freezing ---------------------------------------------------------------------------------------------------------


def test_pytorch_66073_frozen_stays_frozen_when_the_model_is_set_to_train():
    """`requires_grad=False` freezes no statistics, and `train()` undoes `eval()`.

    pytorch/pytorch#66073, pytorch/pytorch#86590.
    """
    model = fit(net(nn.BatchNorm2d), batch_size=8)
    for value in model[1].parameters():
        value.requires_grad_(False)
    model[1].eval()
    torchs = copy.deepcopy(model)
    fit(torchs, batch_size=2, seed=5)
    assert not torch.equal(torchs[1].running_mean, model[1].running_mean)
    frozen = normlab.freeze(model).model
    fit(frozen, batch_size=2, seed=5)
    assert_same_state(frozen[1], model[1])
    assert not torch.equal(frozen[0].weight, model[0].weight)


def test_vision_5443_statistics_that_no_batch_made_do_not_freeze_unnoticed():
    """Batch norm was frozen with the statistics of a new layer: pytorch/vision#5443."""
    new = normlab.freeze(net(nn.BatchNorm2d)).report
    assert "no batch" in new.rows[0].note
    trained = normlab.freeze(fit(net(nn.BatchNorm2d), batch_size=8)).report
    assert "no batch" not in trained.rows[0].note


def test_vision_6543_fine_tuning_at_batch_1_does_not_undo_what_was_learned():
    """Fine-tuning with few images a batch gets worse unless batch norm is frozen: pytorch/vision#6543."""
    images, targets = bright_images(256, seed=2)
    model = fit(net(nn.BatchNorm2d), batch_size=8)

    def loss(model: nn.Module) -> float:
        return nn.functional.cross_entropy(evaluated(model, images), targets).item()

    def fine_tuned(model: nn.Module) -> nn.Module:
        return fit(copy.deepcopy(model), batch_size=1, images=150, lr=0.3, seed=5)

    assert loss(fine_tuned(model)) > 2 * loss(model)
    assert loss(fine_tuned(normlab.freeze(model).model)) < 0.2 * loss(model)
    assert loss(fine_tuned(normlab.convert(model, "running").model)) < 0.2 * loss(model)


def test_panseg_577_a_tile_comes_out_as_in_the_whole_image():
    """Group norm gives each tile of a large image another exposure: kreshuklab/panseg#577."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GroupNorm(2, 8)]
    model = nn.Sequential(*layers)
    ramp = torch.linspace(0, 5, 24).view(1, 1, 1, -1) + numbers(1, 1, 24, 24)

    def seam(model: nn.Module) -> float:
        whole, tile = evaluated(model, ramp), evaluated(model, ramp[..., :12])
        return (tile - whole[..., :8]).abs().max().item()

    assert seam(model) > 0.5
    tiles = list(ramp.split(12, dim=-1))
    for to in ("running", "batch"):
        converted = normlab.convert(model, to).model
        normlab.recalibrate(converted, tiles)
        assert seam(converted) < 1e-5

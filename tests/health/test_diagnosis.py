"""Planted faults are found, healthy models are left in peace, and the model stays as it was."""

import json
from copy import deepcopy
from functools import cache, partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normlab
from checks import assert_same_state
from normlab.data import TensorBatches, load_dataset
from normlab.errors import InputError
from normlab.health import FAULTS
from normlab.models import build_model
from normlab.nn import BatchNorm2d, build_norm


@cache
def digits():
    mnist = load_dataset("mnist")
    mean, deviation = mnist.x_train.mean(), mnist.x_train.std()
    return (mnist.x_train[:6000] - mean) / deviation, mnist.y_train[:6000]


def train(model, batch_size, lr=0.1, images=4000):
    """One pass over some digits, by hand."""
    x, y = (part[:images] for part in digits())
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    model.train()
    for images_of_batch, labels in TensorBatches(x, y, batch_size=batch_size, shuffle=True):
        optimizer.zero_grad()
        F.cross_entropy(model(images_of_batch), labels).backward()
        optimizer.step()
    return model


def batches(size, count=16):
    """Of digits that no model here was trained on."""
    x, y = (part[4000:] for part in digits())
    return [(x[i * size : (i + 1) * size], y[i * size : (i + 1) * size]) for i in range(count)]


def enough(size):
    """Batches for 256 images or more."""
    return batches(size, max(16, 256 // size))


def mean_loss(model, size):
    """Of each batch by itself: in training a norm would move from one to the next."""
    with torch.no_grad():
        losses = [F.cross_entropy(deepcopy(model)(x), y).item() for x, y in enough(size)]
    return sum(losses) / len(losses)


def sound(make, batch_size, lr=0.1, images=4000):
    """A model trained from the first seed that leaves it as good in evaluation as in training, on digits it never saw.

    Not every seed does: a channel that seldom speaks may have statistics of other weights. Rounding decides which seeds
    those are.
    """
    for seed in range(16):
        torch.manual_seed(seed)
        model = train(make(), batch_size, lr, images)
        if mean_loss(deepcopy(model).eval(), batch_size) <= mean_loss(model, batch_size):
            return model
    pytest.fail("no seed gives a sound model")


@cache
def lesson_net(norm, batch_size, lr=0.1, images=4000):
    return sound(partial(build_model, "convnet", norm, 10), batch_size, lr, images)


def conv_norm_relu(norm=nn.BatchNorm2d):
    """The usual order, three times, to a last map of 1×1."""
    widths = 1, 8, 16, 32
    blocks = [
        nn.Sequential(nn.Conv2d(a, b, 3, 3, bias=False), norm(b), nn.ReLU(inplace=True)) for a, b in pairwise(widths)
    ]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32, 10))


@cache
def usual_net(norm=nn.BatchNorm2d, batch_size=64, lr=0.1, images=4000):
    return sound(partial(conv_norm_relu, norm), batch_size, lr, images)


class Residual(nn.Module):
    """A block whose last γ is 0 at first, as residual nets are usually initialised."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Positions(nn.Module):
    """Layer norm of torch over the last dimension, on rows of the image."""

    def __init__(self):
        super().__init__()
        self.rows, self.norm, self.head = nn.Linear(28, 32), nn.LayerNorm(32), nn.Linear(32 * 28, 10)

    def forward(self, x):
        return self.head(F.gelu(self.norm(self.rows(x[:, 0]))).flatten(1))


class Shared(nn.Module):
    """One norm for two branches."""

    def __init__(self, apart):
        super().__init__()
        self.apart = apart
        self.conv, self.norm, self.head = nn.Conv2d(1, 8, 5, 4), nn.BatchNorm2d(8), nn.Linear(8 * 36, 10)

    def forward(self, x):
        h = self.conv(x)
        return self.head((self.norm(h) + self.norm(h + self.apart)).flatten(1))


class Noisy(nn.Module):
    """Draws random numbers, in evaluation too."""

    def forward(self, x):
        return x + torch.randn_like(x)


def recalibrated(model, size=16):
    normlab.recalibrate(model, [x for x, _ in batches(size)])
    return model


def untrained(make, size=16):
    torch.manual_seed(0)
    return recalibrated(make(), size)


def frozen_model():
    return deepcopy(lesson_net("batch", 64)).requires_grad_(False).eval()


HEALTHY = {  # name: model, batch size
    "batch norm at 64": lambda: (lesson_net("batch", 64), 64),
    "batch norm at 16": lambda: (lesson_net("batch", 16), 16),
    "batch norm, then rectifier, at 64": lambda: (usual_net(), 64),
    "running norm at 2": lambda: (lesson_net("running", 2, 0.02, 1000), 2),
    # Not the lesson's net: its last norm is given one rectified value, and evaluates badly from half of all seeds.
    "running norm at 1": lambda: (usual_net(partial(build_norm, "running"), 1, 0.02, 500), 1),
    "group norm at 2": lambda: (lesson_net("group", 2, 0.05, 500), 2),
    "layer norm at 1": lambda: (lesson_net("layer", 1, 0.02, 300), 1),
    "batch renorm at 32": lambda: (lesson_net("renorm", 32, images=2000), 32),
    "no norm": lambda: (lesson_net("none", 64, 0.01), 64),
    "frozen for batch 2": lambda: (normlab.freeze(lesson_net("batch", 64)).model, 2),
    "frozen but for γ and β": lambda: (normlab.freeze(lesson_net("batch", 64), affine=False).model, 2),
    "converted for batch 2": lambda: (normlab.convert(lesson_net("batch", 64), "running").model, 2),
    "recalibrated at 2": lambda: (recalibrated(deepcopy(lesson_net("batch", 64)), 2), 64),
    "for inference only": lambda: (frozen_model(), 64),
    "without γ and β, mean of all batches": lambda: (
        untrained(partial(conv_norm_relu, partial(nn.BatchNorm2d, affine=False, momentum=None)), 64),
        64,
    ),
    "residual, last γ 0": lambda: (
        untrained(lambda: nn.Sequential(nn.Conv2d(1, 8, 3, 2), Residual(8), nn.Flatten(), nn.Linear(8 * 169, 10))),
        16,
    ),
    "random numbers of its own": lambda: (nn.Sequential(usual_net(), Noisy()), 64),
    "layer norm of torch": lambda: (Positions(), 2),
    "shared by like inputs": lambda: (untrained(lambda: Shared(0.01)), 16),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_found_in_a_healthy_model(name):
    model, size = HEALTHY[name]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = normlab.diagnose(model, enough(size), loss=F.cross_entropy, optimizer=optimizer, limit=256)
    assert found.healthy, str(found)


PLANTED = {}


def plants(fault, *at, besides=()):
    """Registers a model with a fault: its name, the norms that have it, and faults that come of it."""

    def register(make):
        PLANTED[make.__name__] = make, fault, set(at), set(besides)
        return make

    return register


def usual():
    return deepcopy(usual_net())


def lesson():
    return deepcopy(lesson_net("batch", 64))


NORMS = ("0.1", "1.1", "2.1")  # of the usual net


@plants("given inf or NaN", "1.1", "2.1")
def an_infinite_weight():
    model = usual()
    model[1][0].weight.data[0, 0, 0, 0] = float("inf")
    return model, batches(64)


@plants("parameters not finite", "2.1")
def a_gamma_that_is_nan():
    model = usual()
    model[2][1].weight.data[3] = float("nan")
    return model, batches(64)


@plants("statistics not finite", "2.1")
def a_poisoned_running_variance():
    model = usual()
    model[2][1].running_var[3] = float("inf")
    return model, batches(64)


@plants("statistics not finite", "2.1")
def a_negative_running_variance():
    model = usual()
    model[2][1].running_var[3] = -1.0
    return model, batches(64)


@plants("single value", "2.1", besides={"batch too small"})
def a_last_map_of_one_pixel_at_batch_1():
    return usual(), batches(1, 64)


@plants("statistics never updated", "0.1", besides={"running statistics off"})
def statistics_that_were_not_loaded():
    model = usual()
    model[0][1].reset_running_stats()
    return model, batches(64)


@plants("too few updates", "1.1", "2.1")
def three_steps_with_a_small_momentum():
    model = usual()
    for block in model[:3]:
        block[1].reset_running_stats()
        block[1].momentum = 0.01
    return train(model, 64, lr=1e-6, images=192), batches(64)


@plants("running statistics off", *NORMS)
def images_that_were_not_scaled():
    return usual(), [(x * 78 + 33, y) for x, y in batches(64)]


@plants("running statistics off", *NORMS)
def few_updates_but_of_other_images():
    return recalibrated(usual(), 32), [(x * 78 + 33, y) for x, y in batches(64)]


@plants("running statistics off", "1.1", "2.1")
def weights_of_another_run():
    model = usual()
    model[1][0].weight.data *= 4
    return model, batches(64)


@plants("settled too early", "1.1", "2.1")
def settled_statistics_of_other_weights():
    model = normlab.convert(usual(), "running", momentum=0.02).model
    model[1][0].weight.data *= 4
    return model.train(), batches(8)


@plants("settled for moving weights", *NORMS)
def a_conversion_in_the_middle_of_a_fast_training():
    model = normlab.convert(usual(), "running", momentum=0.02).model.train()
    return model, batches(8), {"optimizer": torch.optim.Adam(model.parameters(), lr=0.01), "loss": F.cross_entropy}


@plants("batch too small", "2.1")
def batch_norm_at_batch_2():
    return usual(), batches(2, 64)


@plants("momentum too large", "2.1")
def momentum_as_elsewhere():
    model = usual()
    model[2][1].momentum = 0.99
    return model, batches(16)


@plants("evaluates by the batch", *NORMS)
def no_running_statistics():
    torch.manual_seed(0)
    return conv_norm_relu(partial(nn.BatchNorm2d, track_running_stats=False)), batches(16)


@plants("constant channels", "0.1")
def dead_filters():
    model = usual()
    model[0][0].weight.data[:2] = 0
    return recalibrated(model, 64), batches(64)


@plants("constant channels", "0.1")
def images_that_eps_swallows():
    model = usual()
    small = [(x * 1e-3, y) for x, y in batches(64)]
    normlab.recalibrate(model, small)
    return model, small


@plants("channels switched off", "1.1")
def gammas_that_decayed():
    model = usual()
    model[1][1].weight.data[:5] *= 1e-6
    return recalibrated(model, 64), batches(64)


@plants("closed channels", "1.1")
def betas_far_below_0():
    model = usual()
    model[1][1].bias.data[:8] = -20
    return recalibrated(model, 64), batches(64)


@plants("output constant", "2.1")
def instance_norm_of_one_pixel():
    return normlab.convert(usual(), "instance", only="2.1").model, batches(16)


@plants("frozen by halves", *NORMS)
def gamma_and_beta_fixed_but_not_the_statistics():
    model = usual().train()
    for block in model[:3]:
        block[1].requires_grad_(False)
    return model, batches(64)


@plants("frozen by mode", "1.1", "2.1")
def evaluation_mode_that_train_will_undo():
    model = usual().train()
    model[1][1].eval()
    model[2][1].eval()
    return model, batches(64)


@plants("shared by different inputs", "norm")
def one_norm_for_two_domains():
    return untrained(lambda: Shared(apart=3.0)), batches(16)


@plants("statistics in half precision", *NORMS)
def a_model_in_bfloat16():
    return usual().bfloat16(), [(x.bfloat16(), y) for x, y in batches(64)]


@plants("not in the optimizer", *NORMS)
def an_optimizer_older_than_the_norms():
    optimizer = torch.optim.SGD((model := usual()).parameters(), lr=0.1)
    for block in model[:3]:
        block[1].weight = nn.Parameter(block[1].weight.detach().clone())
    return model, batches(64), {"optimizer": optimizer}


@plants("turns too fast", *NORMS)
def a_learning_rate_far_too_high():
    model = usual()
    return model, batches(64), {"optimizer": torch.optim.SGD(model.parameters(), lr=1000), "loss": F.cross_entropy}


@plants("turns too fast", *NORMS)
def a_learning_rate_far_too_high_for_adam():
    model = usual()
    return model, batches(64), {"optimizer": torch.optim.Adam(model.parameters(), lr=1), "loss": F.cross_entropy}


@plants("hardly turns", "1.1")
def a_weight_that_grew_without_bound():
    model = usual()
    model[1][0].weight.data *= 1e4
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return recalibrated(model, 64), batches(64), {"optimizer": optimizer, "loss": F.cross_entropy}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name):
    make, fault, at, besides = PLANTED[name]
    model, of_model, *arguments = make()
    found = normlab.diagnose(model, of_model, limit=64, **dict(*arguments))
    by_fault = {finding.fault: finding for finding in found.findings}
    assert fault in by_fault, str(found)
    assert set(by_fault[fault].modules) == at, str(found)
    assert set(by_fault) - {fault} <= besides, str(found)


def test_as_many_faults_are_planted_as_can_be_found():
    planted = {fault for _, fault, _, _ in PLANTED.values()}
    assert planted == {fault.name for fault in FAULTS}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, partial(build_norm, "running")])
def test_the_model_stays_as_it_was(training, norm):
    torch.manual_seed(0)
    model = nn.Sequential(conv_norm_relu(norm), nn.Dropout()).train(training)
    model[0][1][1].eval()
    before, modes = deepcopy(model), [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.get_rng_state()
    normlab.diagnose(model, batches(4), loss=F.cross_entropy, optimizer=optimizer)
    assert_same_state(model, before)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_it_stays_so_when_the_model_fails():
    model = usual()
    before = deepcopy(model)
    with pytest.raises(RuntimeError):
        normlab.diagnose(model, [*batches(4, 3), torch.zeros(2, 7, 28, 28)])
    assert_same_state(model, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_figures_are_those_of_the_images():
    model, of_model = usual(), batches(32, 4)
    x = torch.cat([model[0][0](x) for x, _ in of_model]).detach().transpose(0, 1).flatten(1).double()
    norm = model[0][1]
    norm.running_mean.copy_(x.mean(1) + 2 * x.std(1))
    norm.running_var.copy_(x.var(1) * 4)
    each = torch.stack([model[0][0](x).detach().transpose(0, 1).flatten(1).double() for x, _ in of_model])
    mean, deviation = x.mean(1), x.std(1, correction=0)
    of_means = ((each.mean(2) - mean) / deviation) ** 2
    of_deviations = (each.std(2, correction=0) / deviation - 1) ** 2
    layer = normlab.diagnose(model, of_model).layers[0]
    assert layer.values == 32 * 81
    assert layer.updates == 63
    assert layer.noise == pytest.approx((of_means + of_deviations).mean().sqrt().item(), rel=1e-4)
    assert layer.offset == pytest.approx((1**2 + 0.5**2) ** 0.5, abs=0.01)  # 2 σ of the images are 1 σ of the norm's


def test_the_turn_is_that_of_a_step():
    model, of_model = usual(), batches(32, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    found = normlab.diagnose(model, of_model, loss=F.cross_entropy, optimizer=optimizer).layers[1].turn
    weight = model[1][0].weight
    before = weight.detach().clone()
    model.train()
    (x, y), *_ = of_model
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    cosine = F.cosine_similarity(before.flatten(), weight.detach().flatten(), dim=0)
    assert found == pytest.approx(cosine.double().acos().item(), rel=0.02)


def test_faults_are_ranked_by_effect_and_every_verdict_names_a_norm_and_a_remedy():
    model = usual()
    model[2][1].running_var[3] = float("nan")
    model[0][1].running_mean += 30
    found = normlab.diagnose(model, batches(2, 64))
    effects = [finding.effect for finding in found.findings]
    assert len(effects) > 1
    assert effects == sorted(effects, reverse=True)
    for finding in found.findings:
        assert finding.modules[0] in finding.verdict
        assert finding.remedy
        assert finding.fault in str(found)
        assert finding.command in str(found)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_every_command_is_python(fault):
    compile(fault.command, fault.name, "exec")


def test_the_remedies_help():
    model, of_model = usual(), batches(2, 64)
    assert [finding.fault for finding in normlab.diagnose(model, of_model).findings] == ["batch too small"]
    assert normlab.diagnose(normlab.convert(model, "running").model, of_model).healthy
    assert normlab.diagnose(normlab.freeze(model).model, of_model).healthy
    scaled = [x * 78 + 33 for x, _ in batches(64)]
    assert not normlab.diagnose(model, scaled).healthy
    normlab.recalibrate(model, scaled)
    assert normlab.diagnose(model, scaled).healthy


def test_it_is_saved_as_json_and_as_a_picture(tmp_path):
    model = usual()
    model[2][1].running_var[3] = float("inf")
    found = normlab.diagnose(model, batches(64, 2), loss=F.cross_entropy)
    found.save(tmp_path / "new" / "diagnosis.json")
    read = json.loads((tmp_path / "new" / "diagnosis.json").read_text(), parse_constant=pytest.fail)
    assert read["findings"][0]["fault"] == "statistics not finite"
    assert read["findings"][0]["effect"] == "inf"
    assert [layer["name"] for layer in read["layers"]] == list(NORMS)
    found.save(tmp_path / "diagnosis.png")
    assert (tmp_path / "diagnosis.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["diagnosis.png", "new"]
    with pytest.raises(InputError, match=r"diagnosis.txt.*\.json or \.png"):
        found.save(tmp_path / "diagnosis.txt")


def test_bad_arguments_are_named():
    model = usual()
    with pytest.raises(InputError, match=r"batches=.*at least one batch"):
        normlab.diagnose(model, [])
    with pytest.raises(InputError, match="limit=0"):
        normlab.diagnose(model, batches(2), limit=0)
    with pytest.raises(InputError, match=r"batches='Tensor'.*inputs and targets"):
        normlab.diagnose(model, [x for x, _ in batches(2)], loss=F.cross_entropy)


def test_a_model_of_several_inputs_and_outputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm2d(3)

        def forward(self, a, b):
            return {"sum": self.norm(a) + b, "count": 2}

    torch.manual_seed(0)
    pairs = [{"a": torch.randn(8, 3, 4, 4), "b": torch.randn(8, 3, 4, 4)} for _ in range(4)]
    found = normlab.diagnose(Two(), pairs, forward=lambda model, batch: model(**batch))
    assert found.layers[0].name == "norm"
    assert found.output.images == 32


def test_a_network_whose_statistics_settled_before_they_were_measured_is_seen():
    """0 and 1 that were loaded as if they had had their time: such a network learned nothing."""
    segresnet = pytest.importorskip("monai.networks.nets").SegResNet
    torch.manual_seed(0)
    sizes = {"blocks_down": (1, 1, 1), "blocks_up": (1, 1)}
    model = normlab.convert(segresnet(2, 8, 1, 1, norm=("batch", {}), **sizes), "running").model
    images = [torch.randn(2, 1, 32, 32) for _ in range(8)]
    assert "settled too early" not in [finding.fault for finding in normlab.diagnose(model, images).findings]
    settled = [module for module in model.modules() if isinstance(module, normlab.nn.RunningBatchNorm2d)]
    for norm in settled:
        norm.share.fill_(0.01)
        norm.num_batches_tracked.fill_(1000)
    model.train()
    (finding,) = [one for one in normlab.diagnose(model, images).findings if one.fault == "settled too early"]
    assert len(finding.modules) > len(settled) / 2
    exec(finding.command, {"model": model})
    assert all(float(norm.share) == 1 for norm in settled)


def test_a_model_without_norms_has_a_picture_too(tmp_path, recwarn):
    normlab.diagnose(nn.Conv2d(1, 1, 3), [torch.zeros(1, 1, 4, 4)]).save(tmp_path / "d.png")
    assert (tmp_path / "d.png").stat().st_size > 0
    assert not recwarn.list

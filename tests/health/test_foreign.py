"""Norms of other people's classes, weights that are no parameters, batches and outputs of any structure."""

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import normlab
from checks import assert_same_state
from normlab.errors import InputError


class ConditionalBatchNorm(nn.BatchNorm2d):
    """Scales by the class of the image."""

    def forward(self, x, gamma):
        return super().forward(x) * gamma[:, :, None, None]


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.gammas = nn.Conv2d(3, 4, 1), ConditionalBatchNorm(4), nn.Embedding(5, 4)

    def forward(self, x, label):
        return self.norm(self.conv(x), self.gammas(label))


class TokenBatchNorm(nn.BatchNorm1d):
    """Of (N, L, C)."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class OwnRMSNorm(nn.Module):
    """Over the last dimension, of any length."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class ABN(nn.Module):
    """Batch norm and activation, over its input; its name does not say so."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.eps = 1e-5

    def forward(self, x):
        statistics = self.running_mean, self.running_var, self.weight, self.bias
        return x.copy_(F.leaky_relu(F.batch_norm(x.clone(), *statistics, self.training, 0.1, self.eps)))


class Strict(nn.BatchNorm2d):
    """Takes a batch of 8 only."""

    def forward(self, x):
        if len(x) != 8:
            raise ValueError("a batch of 8, please")
        return super().forward(x)


def pooled(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    rows = x.double().movedim(dim, 0).flatten(1)
    return rows.mean(1), rows.var(1, correction=0)


def expected_offset(given: Tensor, dim: int, norm) -> float:
    (mean, var), deviation = pooled(given, dim), (norm.running_var.double() + norm.eps).sqrt()
    squares = ((mean - norm.running_mean) / deviation) ** 2 + ((var + norm.eps).sqrt() / deviation - 1) ** 2
    return squares.mean().sqrt().item()


def test_batch_norm_over_tokens_is_measured_along_its_channels_though_there_are_as_many_tokens():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), TokenBatchNorm(7))
    x = torch.randn(64, 7, 5) + 3
    layer = normlab.diagnose(model, [x]).layers[0]
    assert (layer.channels, layer.values, layer.unmeasured) == (7, 64 * 7, None)
    assert layer.offset == pytest.approx(expected_offset(model[0](x).detach(), 2, model[1]), rel=1e-3)


def test_a_conditional_batch_norm_is_measured():
    torch.manual_seed(0)
    model, x, label = Generator(), torch.randn(8, 3, 6, 6) + 2, torch.randint(0, 5, (8,))
    layer = normlab.diagnose(model, [(x, label)], forward=lambda model, batch: model(*batch)).layers[0]
    assert layer.offset == pytest.approx(expected_offset(model.conv(x).detach(), 1, model.norm), rel=1e-3)


def test_an_abn_that_writes_over_its_input_is_measured_by_what_it_was_given():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), ABN(4)), torch.randn(8, 3, 6, 6) + 2
    layer = normlab.diagnose(model, [x]).layers[0]
    assert layer.offset == pytest.approx(expected_offset(model[0](x).detach(), 1, model[1]), rel=1e-3)


@pytest.mark.parametrize("lengths", [(6, 7, 9), (8, 8)])
def test_a_norm_of_the_last_dimension_takes_batches_of_any_length(lengths):
    model = nn.Sequential(nn.Linear(5, 8), OwnRMSNorm(8))
    found = normlab.diagnose(model, [torch.randn(4, length, 5) for length in lengths])
    assert found.healthy
    assert found.layers[0].channels == 8


def test_what_cannot_be_measured_has_a_reason():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Strict(4), nn.LayerNorm(6), nn.BatchNorm2d(4))
    found = normlab.diagnose(model, [torch.randn(8, 3, 6, 6) for _ in range(2)])
    strict, layer_norm, plain = found.layers
    assert "a batch of 8, please" in strict.unmeasured
    assert layer_norm.unmeasured
    assert plain.unmeasured is None
    assert strict.unmeasured in str(found).replace("\n", "")
    assert found.to_dict()["layers"][0]["unmeasured"] == strict.unmeasured


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_norm_has_a_reason():
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    (layer,) = normlab.diagnose(model, [torch.randn(4, 3, 5, 5)]).layers
    assert "TorchScript" in layer.unmeasured
    assert layer.untouched


def test_a_norm_that_sees_no_batch_has_a_reason():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    found = normlab.diagnose(model, [torch.randn(8, 3)], forward=lambda model, batch: model[0](batch))
    assert found.layers[0].unmeasured == "not run by these batches"


class Counting(nn.BatchNorm2d):
    """Counts its calls."""

    calls = 0

    def forward(self, input):
        self.calls += 1
        return super().forward(input)


def test_foreign_norms_stay_as_they_were():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), ABN(4), Strict(4), Counting(4)), torch.randn(8, 3, 6, 6)
    before, state = copy.deepcopy(model), torch.get_rng_state()
    normlab.diagnose(model, [x])
    assert_same_state(model, before)
    assert model[3].calls == 2  # in evaluation and in training, as the model calls it
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def old_spectral_norm(layer):
    return nn.utils.spectral_norm(layer)


def pruned(layer):
    return prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.parametrize(
    "wrap",
    [lambda layer: layer, parametrizations.spectral_norm, parametrizations.weight_norm, old_spectral_norm, pruned],
)
def test_the_turn_of_a_weight_that_is_no_parameter_is_that_of_a_step(wrap):
    torch.manual_seed(0)
    layer = wrap(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 2)).eval()
    x, y = torch.randn(8, 3, 6, 6), torch.randint(0, 2, (8,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    found = normlab.diagnose(model, [(x, y)], loss=F.cross_entropy, optimizer=optimizer).layers[0].turn
    model[1].train()
    F.cross_entropy(model(x), y).backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    model(x)  # old ones compute their weight then
    after = layer.weight.detach()
    angle = F.cosine_similarity(before.double().flatten(), after.double().flatten(), dim=0).acos().item()
    assert found == pytest.approx(angle, rel=0.02)


@pytest.mark.parametrize("kind", ["parametrized", "lora"])
def test_a_weight_computed_in_another_way_has_a_reason(kind):
    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    class LoRA(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 8, 3)
            self.low = nn.Parameter(torch.zeros(8, 2))
            self.high = nn.Parameter(torch.randn(2, 27))
            self.weight.requires_grad_(False)

        def forward(self, x):
            return F.conv2d(x, self.weight + (self.low @ self.high).view_as(self.weight), self.bias)

    halved = nn.Conv2d(3, 8, 3)
    parametrize.register_parametrization(halved, "weight", Half())
    layer = {"parametrized": halved, "lora": LoRA()}[kind]
    model = nn.Sequential(layer, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 16, 2))
    batches = [(torch.randn(8, 3, 6, 6), torch.randint(0, 2, (8,)))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    layer = normlab.diagnose(model, batches, loss=F.cross_entropy, optimizer=optimizer).layers[0]
    assert layer.turn is None
    assert "computed from other parameters" in layer.unmeasured


@dataclass
class Result:
    logits: Tensor
    name: str = "logits"


@pytest.mark.parametrize("wrap", [lambda y: (y, None), lambda y: {"logits": y}, Result, lambda y: [[y], 2]])
def test_the_gap_is_the_same_whatever_holds_the_output(wrap):
    class Net(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.norm, self.wrap = nn.BatchNorm2d(3), wrap

        def forward(self, x):
            return self.wrap(self.norm(x))

    x = torch.randn(8, 3, 4, 4) * 3 + 1
    gap = normlab.diagnose(Net(wrap), [x]).output.gap
    assert gap == pytest.approx(normlab.diagnose(Net(lambda y: y), [x]).output.gap)
    assert gap > 1


@pytest.mark.parametrize("outputs", [lambda y, n: y[:n], lambda y, n: n])
def test_outputs_that_cannot_be_compared_are_not(outputs):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return outputs(self.norm(x), 1 + self.norm.training)

    assert normlab.diagnose(Detector(), [torch.randn(8, 3, 4, 4)]).output.gap is None


def test_dict_batches_are_asked_for_forward():
    model, image = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), torch.randn(8, 3)
    batches = [{"image": image, "label": torch.randint(0, 2, (8,))} for _ in range(3)]
    with pytest.raises(InputError, match=r"dict with the keys 'volume', 'label'.*forward=lambda model, batch"):
        normlab.diagnose(model, [{"volume": image, "label": batch["label"]} for batch in batches])
    assert normlab.diagnose(model, batches).output.images == 24, "what the learner takes"
    found = normlab.diagnose(model, batches, forward=lambda model, batch: model(batch["image"]), loss=F.cross_entropy)
    losses = [F.cross_entropy(copy.deepcopy(model).eval()(image), batch["label"]).item() for batch in batches]
    assert found.output.evaluation_loss == pytest.approx(sum(losses) / 3)
    unusual = [{"image": image, "class": batch["label"]} for batch in batches]
    with pytest.raises(InputError, match=r"target=lambda batch: batch\['class'\]"):
        normlab.diagnose(model, unusual, forward=lambda model, batch: model(batch["image"]), loss=F.cross_entropy)
    found = normlab.diagnose(
        model,
        unusual,
        forward=lambda model, batch: model(batch["image"]),
        loss=F.cross_entropy,
        target=lambda batch: batch["class"],
    )
    assert found.output.evaluation_loss == pytest.approx(sum(losses) / 3)


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([torch.randint(0, 5, (8, 3, 4, 4))], r"int64 \(8, 3, 4, 4\).*floating point"),
        ([torch.zeros(0, 3, 4, 4)], "batch 1 has no images"),
        ([torch.zeros(2, 3, 4, 4), torch.zeros(2, 7, 4, 4)], r"batch 2, .*\(2, 7, 4, 4\).*7 channels"),
        (torch.zeros(2, 3, 4, 4), r"\[images\] for one"),
        ([[]], "batch 1, list without tensors"),
    ],
)
def test_batches_that_the_model_does_not_take_are_named(batches, said):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with pytest.raises(InputError, match=said):
        normlab.diagnose(model, batches)


def test_an_error_of_the_models_own_is_its_own():
    class Failing(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        normlab.diagnose(Failing(), [torch.zeros(1)])


def test_a_norm_called_by_keyword_in_half_precision_is_measured():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(input=x)

    x = torch.randn(8, 3, 5, 5) + 2
    layer = normlab.diagnose(Net().bfloat16(), [x.bfloat16()]).layers[0]
    assert layer.unmeasured is None
    assert layer.offset == pytest.approx(expected_offset(x.bfloat16(), 1, nn.BatchNorm2d(3)), rel=0.01)


def test_nested_tensors_do_not_end_it():
    model = nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), OwnRMSNorm(8))
    tokens = torch.nested.nested_tensor([torch.randn(3, 5), torch.randn(4, 5)], layout=torch.jagged)
    found = normlab.diagnose(model, [[tokens]])
    assert "nested" in found.layers[1].unmeasured


def test_an_instance_norm_of_one_image_without_a_batch_is_measured():
    x = torch.randn(3, 6, 6) + 2
    layer = normlab.diagnose(nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True)), [x]).layers[0]
    assert (layer.channels, layer.values, layer.unmeasured) == (3, 36, None)
    assert layer.offset == pytest.approx(expected_offset(x, 0, nn.BatchNorm2d(3)), rel=1e-3)


@pytest.mark.parametrize("norm", ["batch", "running"])
def test_what_a_mask_leaves_out_is_not_counted(norm):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = normlab.nn.build_norm(norm, 4, 1)

        def forward(self, x, mask):
            return self.norm(x, mask=mask)

    torch.manual_seed(0)
    mask = torch.arange(10)[None] < torch.randint(3, 10, (8, 1))
    x = torch.randn(8, 4, 10)
    padded = x + 1000 * (~mask)[:, None]
    layer = normlab.diagnose(Net(), [(padded, mask)], forward=lambda model, batch: model(*batch)).layers[0]
    assert layer.values == mask.sum()
    assert layer.offset == pytest.approx(expected_offset(x.transpose(0, 1)[:, mask].T, 1, nn.BatchNorm1d(4)), rel=1e-3)


def test_a_norm_that_evaluation_mode_does_not_reach_is_named_and_stays_as_it_was():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = [nn.BatchNorm1d(4)]

        def forward(self, x):
            return self.norms[0](x)

    torch.manual_seed(0)
    model = Hidden()
    before = copy.deepcopy(model.norms[0])
    found = normlab.diagnose(model, [torch.randn(8, 4) for _ in range(2)])
    (finding,) = [one for one in found.findings if one.fault == "evaluates by the batch"]
    assert finding.modules == ["norms[0]"]
    assert "model.eval() does not reach it" in finding.verdict
    assert_same_state(model.norms[0], before)


def classifier(*norms):
    return nn.Sequential(nn.Conv2d(3, 8, 3), *norms, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def test_commands_say_forward_where_batches_need_it():
    batches = [{"scan": 5 + torch.randn(8, 3, 8, 8), "class": torch.zeros(8, dtype=torch.long)} for _ in range(3)]

    def forward(model, batch):
        return model(batch["scan"])

    model = classifier(nn.BatchNorm2d(8))
    (finding,) = normlab.diagnose(model, batches, forward=forward).findings
    exec(finding.command, {"normlab": normlab, "model": model, "batches": batches, "forward": forward})
    assert normlab.diagnose(model, batches, forward=forward).healthy


@pytest.mark.parametrize("images", [1, 2, 5])
def test_images_that_come_without_a_batch_are_counted(images):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(torch.stack(images))

    def given(batch):
        return [part["image"] for part in batch] if isinstance(batch[0], dict) else batch[0]

    parts = [torch.randn(3, 6, 6) for _ in range(images)]
    for batch in ([{"image": part, "height": 6} for part in parts], (parts, [{"boxes": torch.zeros(0, 4)}] * images)):
        found = normlab.diagnose(Detector(), 2 * [batch], forward=lambda model, batch: model(given(batch)))
        assert found.output.images == 2 * images


def test_one_batch_of_few_values_is_not_taken_for_other_images():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    for _ in range(200):
        norm(torch.randn(64, 8))
    found = normlab.diagnose(nn.Sequential(norm), [torch.randn(2, 8)])
    assert [finding.fault for finding in found.findings] == ["batch too small"]
    (note,) = found.notes
    assert note.startswith("Noise is not measured")
    apart = normlab.diagnose(nn.Sequential(norm), [3 + torch.randn(64, 8)])
    assert [finding.fault for finding in apart.findings] == ["running statistics off"]


def test_a_norm_that_only_training_calls_is_said_to_be_so():
    class Either(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.a(x) if self.a.training else self.b(x)

    layers = normlab.diagnose(Either(), [torch.randn(4, 3, 5, 5) for _ in range(2)]).layers
    assert layers[0].unmeasured == "not run in evaluation"
    assert layers[2].unmeasured == "not run by these batches"


@pytest.mark.parametrize("make", [torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta, torch.optim.Rprop])
def test_the_turn_by_an_optimizer_of_another_kind_has_a_reason(make):
    model = classifier(nn.BatchNorm2d(8))
    batches = [(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long)) for _ in range(2)]
    optimizer = make(model.parameters())
    (layer,) = normlab.diagnose(model, batches, loss=F.cross_entropy, optimizer=optimizer).layers
    assert layer.turn is None
    assert layer.unmeasured == f"turn: how long a step of {make.__name__} is, is not known here"


@pytest.mark.parametrize(
    "loss", [lambda y, t: {"ce": y.sum()}, lambda y, t: F.cross_entropy(y, t, reduction="none"), lambda y, t: 1.0]
)
def test_a_loss_that_is_no_single_value_is_named(loss):
    model = classifier(nn.BatchNorm2d(8))
    batches = [(torch.randn(8, 3, 8, 8), torch.zeros(8, dtype=torch.long))]
    with pytest.raises(InputError, match=r"loss's result.*a tensor of one value"):
        normlab.diagnose(model, batches, loss=loss)


def test_a_model_without_values_is_named():
    with pytest.raises(InputError, match="meta device"):
        normlab.diagnose(classifier(nn.BatchNorm2d(8)).to("meta"), [torch.zeros(2, 3, 8, 8, device="meta")])


def test_a_loader_that_shuffles_leaves_the_generators_as_they_were():
    images = torch.utils.data.TensorDataset(torch.randn(32, 3, 8, 8), torch.zeros(32, dtype=torch.long))
    batches = torch.utils.data.DataLoader(images, batch_size=8, shuffle=True)
    model = classifier(nn.BatchNorm2d(8))
    for options in ({}, {"loss": F.cross_entropy}):
        before = torch.get_rng_state()
        normlab.diagnose(model, batches, **options)
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("off", "value"), [(2, 0.0), (4, 0.0), (6, 0.0), (6, 1e-9)])
def test_channels_that_were_slimmed_away_are_off_however_many(off, value):
    model = classifier(nn.BatchNorm2d(8))
    model[1].weight.data[:off] = value
    found = normlab.diagnose(model, [torch.randn(8, 3, 8, 8) for _ in range(2)])
    assert found.layers[0].off == off / 8
    assert "channels switched off" in [finding.fault for finding in found.findings]
    assert "output constant" not in [finding.fault for finding in found.findings]

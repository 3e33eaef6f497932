"""What stays what it was: modes, gradient switches, statistics, counters, attributes, checkpoints, the way back."""

import io
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

import normlab
from normlab.errors import InputError
from normlab.nn import RunningBatchNorm1d, RunningBatchNorm2d
from situation import (
    assert_near,
    assert_same_as,
    assert_statistics,
    by_hand,
    copied,
    evaluated,
    numbers,
    operated,
    rows,
    situation,
    state_of,
    with_drawn_state,
)


@situation("Lightning-AI/pytorch-lightning#15062", "D", "convert, freeze, unfreeze", "mended")
def test_a_norm_that_a_callback_froze_by_its_flag_is_understood():
    """A callback sets `track_running_stats = False` to freeze: evaluation uses the statistics, here as in torch."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    model[1].track_running_stats = False
    x = numbers(4, 3, 5, 5)
    expected = by_hand(model[0](x), model[1])
    for verb in (partial(normlab.convert, to="batch"), normlab.freeze):
        operation = operated(verb, model, x)
        assert_near(evaluated(operation.model, x), expected)
    ours = normlab.convert(model, "batch").model.train()
    before = ours[1].running_mean.clone()
    assert_near(ours(x), F.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, training=True))
    assert torch.equal(ours[1].running_mean, before)
    back = normlab.unfreeze(normlab.freeze(model).model).model
    assert back[1].track_running_stats is False


@situation("facebookresearch/FixRes#9", "0b", "freeze", "held")
def test_all_but_the_last_norm_are_frozen():
    """All norms but the last are frozen while the net trains: its statistics move, those of others do not."""
    model = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))])
    with_drawn_state(model)
    frozen = operated(partial(normlab.freeze, skip="5"), model).model.train()
    frozen(numbers(8, 3, 4, 4, mean=5.0))
    moved = [not torch.equal(frozen[i].running_mean, model[i].running_mean) for i in (1, 3, 5)]
    assert moved == [False, False, True]


@situation("pgniewko/gt-pyg#112", "0b", "freeze", "held")
def test_a_frozen_norm_outlives_train():
    """The loop calls `model.train()` each epoch: frozen norms stay so, and no row depends on its batch."""
    model = with_drawn_state(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    frozen = operated(normlab.freeze, model, numbers(4, 3)).model
    x = numbers(6, 3)
    for _ in range(2):
        frozen.train()
        together = frozen(x)
    assert_near(together[:1], frozen(x[:1]))
    assert torch.equal(frozen[1].running_mean, model[1].running_mean)
    assert not any(parameter.requires_grad for parameter in frozen[1].parameters())


@situation("kdexd/virtex#16", "0b", "freeze", "held")
def test_a_frozen_backbone_gives_the_same_features_in_training():
    """Linear evaluation of a backbone in training mode: with `only="backbone.*"` frozen its features do not drift."""
    model = nn.ModuleDict({
        "backbone": nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)),
        "head": nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)),
    })  # fmt: skip
    with_drawn_state(model)
    operation = operated(partial(normlab.freeze, only="backbone.*"), model)
    report = rows(operation)
    assert report["backbone.1"].became is not None
    assert report["head.1"].became is None
    frozen: Any = operation.model.train()
    x = numbers(8, 3)
    features = frozen["backbone"](x)
    for seed in range(3):
        frozen["head"](frozen["backbone"](numbers(8, 3, seed=seed)))
    assert torch.equal(frozen["backbone"](x), features)


class LoraConv(nn.Module):
    """A convolution and a low-rank one beside it."""

    def __init__(self, base: nn.Conv2d, rank: int):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Conv2d(base.in_channels, rank, 1, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Conv2d(rank, base.out_channels, 1, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


@situation("huggingface/peft#1732", "G", "freeze, diagnose, fold", "mended")
def test_adapters_alone_reproduce_a_model_whose_norms_were_frozen():
    """Adapters are saved without the base's statistics: with frozen norms, they and the base give the same again."""
    torch.manual_seed(0)

    def base() -> nn.Module:
        torch.manual_seed(1)
        return with_drawn_state(nn.Sequential(LoraConv(nn.Conv2d(3, 4, 1), 2), nn.BatchNorm2d(4), nn.ReLU()))

    model = operated(normlab.freeze, base(), numbers(2, 3, 4, 4)).model.train()
    optimizer = torch.optim.SGD([part for part in model.parameters() if part.requires_grad], 0.1)
    for seed in range(3):
        optimizer.zero_grad()
        model(numbers(4, 3, 4, 4, seed=seed, mean=2.0)).square().mean().backward()
        optimizer.step()
    adapters = {name: value for name, value in model.state_dict().items() if "lora" in name}
    again = base()
    again.load_state_dict(adapters, strict=False)
    x = numbers(2, 3, 4, 4, seed=9)
    assert_near(evaluated(again, x), evaluated(model, x), 1e-6)
    assert len(normlab.diagnose(base(), [numbers(8, 3, 4, 4)]).layers) == 1
    assert_near(evaluated(normlab.fold(again, x).model, x), evaluated(again, x))


@situation("huggingface/peft#1734", "H", "convert", "held")
def test_norms_found_by_the_flag_of_tracking_are_found_after_conversion():
    """A library finds norms to save by their `track_running_stats`: norms with statistics have it after conversion."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    for to in ("running", "batch", "sync", "frozen", "renorm"):
        converted = normlab.convert(model, to).model
        saved = {
            f"{name}.{key}": value
            for name, module in converted.named_modules() if hasattr(module, "track_running_stats")
            for key, value in module.named_buffers(recurse=False)
        }  # fmt: skip
        assert {"1.running_mean", "1.running_var", "1.num_batches_tracked"} <= set(saved)
        assert all(torch.equal(saved[f"1.{key}"], value) for key, value in model[1].named_buffers())


class NormEval(nn.Sequential):
    """Puts its batch norms into evaluation mode whenever it trains, found by torch's class."""

    def train(self, mode: bool = True) -> "NormEval":
        super().train(mode)
        for module in self.modules():
            if mode and isinstance(module, _BatchNorm):
                module.eval()
        return self


@situation("open-mmlab/mmsegmentation#362", "H", "freeze, convert, is_norm", "mended")
def test_norms_that_a_backbone_keeps_in_evaluation_stay_so_when_frozen():
    """A backbone keeps batch norms in evaluation by torch's class: freeze holds all the same, and is_norm finds all."""
    model = with_drawn_state(NormEval(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    x = numbers(4, 3, 5, 5, mean=3.0)
    frozen = operated(normlab.freeze, model, x).model.train()
    expected = by_hand(model[0](x), model[1])
    assert_near(frozen(x), expected)
    for to in ("running", "sync", "frozen", "batch", "group"):
        converted = normlab.convert(model, to).model
        assert [normlab.is_norm(module) for module in converted] == [False, True]


@situation("ultralytics/yolov3#469", "H", "is_norm, convert", "mended")
def test_no_norm_gets_weight_decay_after_conversion():
    """Weight decay spares norms: grouped by `normlab.is_norm`, γ and β of every norm of ours and torch's are spared."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Linear(5, 5), nn.LayerNorm(5), nn.GroupNorm(2, 8))
    for to in ("running", "group", "evonorm_s0", "switchable", "filter_response"):
        converted = normlab.convert(model, to, only="1").model
        spared = {id(part) for m in converted.modules() if normlab.is_norm(m) for part in m.parameters()}
        decayed = {name for name, part in converted.named_parameters() if id(part) not in spared}
        assert decayed == {"0.weight", "0.bias", "2.weight", "2.bias"}


@situation("pytorch/pytorch#43592", "A", "sync, unsync, convert", "mended")
def test_a_qconfig_survives_the_way_to_sync_and_back():
    """A quantisation's `qconfig` on a batch norm is there after sync, after unsync and after convert."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    marker = object()
    model[1].qconfig = marker
    sync = normlab.sync(model, inplace=True)
    assert sync.model[1].qconfig is marker
    back = normlab.unsync(sync.model, inplace=True).model
    assert back[1].qconfig is marker
    assert normlab.convert(back, "running", inplace=True).model[1].qconfig is marker


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@situation("pytorch/pytorch#38738", "A", "sync, convert", "held")
def test_the_norm_inside_a_fused_quantised_convolution_is_converted():
    """Quantisation-aware training fuses convolution and norm into one module: it works after conversion."""
    from torch.ao.nn.intrinsic.qat import ConvBn2d
    from torch.ao.quantization import get_default_qat_qconfig

    torch.manual_seed(0)
    model = nn.Sequential(ConvBn2d(3, 4, 1, qconfig=get_default_qat_qconfig("fbgemm")))
    x = numbers(4, 3, 5, 5)
    for _ in range(3):
        model(x)
    model.apply(torch.ao.quantization.disable_observer)
    expected = evaluated(model, x)
    for verb in (normlab.sync, normlab.convert):
        operation = verb(model)
        (row,) = operation.report
        assert row.name == "0.bn"
        if row.became is not None:
            assert_near(evaluated(operation.model, x), expected)
            operation.model.train()(x).sum().backward()


@situation("pytorch/pytorch#8481", "0", "convert", "mended")
def test_a_checkpoint_without_counters_says_by_its_values_whether_it_was_trained():
    """Checkpoints from before torch counted batches: trained statistics are kept, and 0 and 1 start fresh."""
    old = {"0.weight": numbers(3, 3), "0.bias": numbers(3), "1.weight": torch.ones(3), "1.bias": torch.zeros(3)}
    trained = {**old, "1.running_mean": torch.full((3,), 2.0), "1.running_var": torch.full((3,), 4.0)}
    never = {**old, "1.running_mean": torch.zeros(3), "1.running_var": torch.ones(3)}
    x = numbers(6, 3)
    for state in (trained, never):
        model = nn.Sequential(nn.Linear(3, 3), RunningBatchNorm1d(3))
        model.load_state_dict(state, strict=False)
        centred = F.linear(x, old["0.weight"], old["0.bias"]) - state["1.running_mean"]
        assert_near(evaluated(model, x), centred / (state["1.running_var"] + 1e-5).sqrt())
        fresh = nn.Sequential(nn.Linear(3, 3), RunningBatchNorm1d(3))
        fresh.load_state_dict(old, strict=False)
        one, other = model.train()(x), fresh.train()(x)
        assert torch.equal(one, other) == (state is never)


@situation("pytorch/pytorch#110850", "0", "convert", "held")
def test_a_counter_is_loaded_into_the_norms_of_a_converted_model():
    """A checkpoint of batch norms loads into the converted model: statistics and counters are those of the file."""
    trained = with_drawn_state(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
    converted = normlab.convert(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))).model
    missing, unexpected = converted.load_state_dict(trained.state_dict(), strict=False)
    assert not unexpected
    assert not [name for name in missing if "running" in name or "num_batches" in name]
    x = numbers(4, 3)
    assert_near(evaluated(converted, x), evaluated(trained, x))
    assert int(converted[1].num_batches_tracked) == 1000


@situation("NVIDIA/apex#380", "0", "sync, unsync", "held")
def test_the_counter_goes_over_to_sync_and_back():
    """A cumulative mean of statistics goes by the counter: sync and unsync carry it over, and `momentum=None` too."""
    model = with_drawn_state(nn.Sequential(nn.BatchNorm1d(3, momentum=None)))
    model[0].num_batches_tracked.fill_(3)
    back = normlab.unsync(normlab.sync(model).model).model
    assert int(back[0].num_batches_tracked) == 3
    assert back[0].momentum is None
    x = numbers(8, 3, mean=4.0)
    expected = model[0].running_mean * 0.75 + x.mean(0) * 0.25
    back.train()(x)
    assert_near(back[0].running_mean, expected)


@situation("pytorch/pytorch#48075", "A", "unsync", "held")
def test_a_synced_model_runs_on_a_cpu_after_unsync():
    """A model of SyncBatchNorm is to run and train on a CPU alone: after unsync it does, with the same output."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(copied(model))
    x = numbers(4, 3, 5, 5)
    plain = operated(normlab.unsync, synced).model
    assert_near(evaluated(plain, x), evaluated(model, x))
    plain.train()(x).sum().backward()
    model.train()(x)
    assert_near(plain[1].running_mean, model[1].running_mean)


@situation("pytorch/torchtitan#674", "D", "convert, freeze", "held")
def test_float32_norms_in_a_bfloat16_model_stay_so():
    """Batch norms stay in float32 in a bfloat16 model: converted they do too, and give torch's type and values."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).to(torch.bfloat16)
    model[1].float()
    x = numbers(4, 3, 5, 5).to(torch.bfloat16)
    expected = evaluated(model, x)
    for verb in (normlab.convert, normlab.freeze):
        converted = verb(model).model
        assert {part.dtype for part in converted[1].parameters()} == {torch.float32}
        y = evaluated(converted, x)
        assert y.dtype == expected.dtype
        assert_near(y, expected, 0.02)


@situation("mlcommons/algorithmic-efficiency#767", "H", "convert", "mended")
def test_a_momentum_of_zero_still_holds_the_statistics():
    """A momentum of 0 holds statistics while a norm trains: converted there and back it is 0, and they do not move."""
    model = with_drawn_state(nn.Sequential(nn.BatchNorm1d(3, momentum=0.0)))
    for way in (["batch"], ["group", "batch"], ["running", "batch"]):
        net = model
        for to in way:
            net = normlab.convert(net, to).model
        assert net[0].momentum == 0.0
        before = net[0].running_mean.clone()
        net.train()(numbers(8, 3, mean=9.0))
        assert torch.equal(net[0].running_mean, before)


@situation("microsoft/nni#2636", "R", "convert", "mended")
def test_a_deployed_model_unpickles_without_normlab():
    """A pickled model is to load where normlab is not installed: converted to "torch" it has torch's classes alone."""
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), RunningBatchNorm2d(4), nn.ReLU()))
    plain = operated(partial(normlab.convert, to="torch"), model).model
    data = pickle.dumps(plain)
    assert b"normlab" not in data
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    x = numbers(2, 3, 5, 5)
    again = torch.load(buffer, weights_only=False)
    assert_near(evaluated(again, x), evaluated(model, x))


@situation("qubvel-org/segmentation_models.pytorch#294", "R", "convert", "mended")
def test_undo_after_training_with_instance_norm_never_pairs_new_gammas_with_old_statistics():
    """Batch norms become instance norms, which train: undo refuses, or gives statistics of the model as it is now."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    operation = normlab.convert(model, "instance", inplace=True)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    for seed in range(3):
        optimizer.zero_grad()
        model.train()(numbers(4, 3, 6, 6, seed=seed)).square().mean().backward()
        optimizer.step()
    before = state_of(model)
    with pytest.raises(InputError, match="recalibrate"):
        operation.undo()
    assert_same_as(before, model)


@situation("pytorch/vision#2940", "R", "convert, card", "mended")
def test_the_card_of_a_model_says_the_eps_that_its_state_does_not():
    """An eps that changed with a release cost a detector mAP: the card of a model has each norm's eps and momentum."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03))
    card = str(normlab.card(model))
    assert "0.001" in card
    assert "0.03" in card
    assert card != str(normlab.card(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))))


class TaggedTensor(torch.Tensor):
    """A tensor that carries its file's name through every operation, as medical imaging has it."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        tags = [part.tag for part in args if isinstance(part, TaggedTensor) and hasattr(part, "tag")]
        if isinstance(result, TaggedTensor) and tags:
            result.tag = tags[0]
        return result


@situation("Project-MONAI/MONAI#5283", "Q", "convert, recalibrate, fold, diagnose", "mended")
def test_tensors_that_carry_metadata_go_through_norm_and_in_place_activation():
    """Images that carry metadata train through norm and in-place ReLU, and every verb takes them as plain ones."""
    torch.manual_seed(0)
    model = with_drawn_state(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)))
    x = numbers(6, 3, 5, 5)
    tagged = x.as_subclass(TaggedTensor)
    tagged.tag = "a.nii"
    for to in ("running", "batch", "sync", "group"):
        converted = normlab.convert(model, to, batches=[tagged]).model
        plain = copied(converted)
        y = converted.train()(tagged)
        y.sum().backward()
        assert y.tag == "a.nii"
        expected = plain.train()(x)
        expected.sum().backward()
        assert_near(y.as_subclass(Tensor), expected, 1e-6)
        assert_near(converted[0].weight.grad, plain[0].weight.grad, 1e-5)
    normlab.recalibrate(model, [tagged])
    assert_statistics(model[1], model[0](x))
    assert normlab.fold(model, tagged).report.touched
    assert len(normlab.diagnose(model, [tagged, tagged]).layers) == 1

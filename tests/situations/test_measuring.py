"""Statistics that were never measured, or measured on something else; padding, half-done work, the command line."""

import sys
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

import normlab
from normlab.errors import InputError
from situation import (
    assert_near,
    assert_same_as,
    assert_statistics,
    by_hand,
    copied,
    evaluated,
    numbers,
    rows,
    situation,
    state_of,
    with_drawn_state,
)


def trained(seed: int = 0) -> nn.Sequential:
    """A net whose statistics are those of its images."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    with torch.no_grad():
        for number in range(60):
            model(images(seed=number))
    return model


def images(seed: int = 0, count: int = 16) -> Tensor:
    return numbers(count, 3, 8, 8, seed=seed, mean=2.0, deviation=3.0)


def faults(found: Any) -> dict[str, list[str]]:
    return {finding.fault: finding.modules for finding in found.findings}


@situation("CuriousAI/mean-teacher#9", "0", "diagnose, recalibrate, convert", "held")
def test_a_teacher_whose_norms_never_saw_an_image_is_named():
    """A teacher is averaged by its parameters only: diagnose says its statistics are 0 and 1, recalibrate mends it."""
    student = trained()
    teacher = copied(student)
    for norm in (teacher[1], teacher[4]):
        norm.reset_running_stats()
    found = normlab.diagnose(teacher.eval(), [images(1), images(2)])
    assert set(faults(found)["statistics never updated"]) == {"1", "4"}
    normlab.recalibrate(teacher, [images(seed) for seed in range(10)])
    assert_near(evaluated(teacher, images(3)), evaluated(student, images(3)), 0.1)
    assert not faults(normlab.diagnose(teacher, [images(1), images(2)])).get("statistics never updated")


@situation("boschresearch/OASIS#21", "F", "recalibrate, convert", "held")
def test_an_averaged_models_statistics_are_measured_by_name():
    """An averaged generator keeps its first statistics: behind the wrapper's prefix they are measured anew."""
    model = trained()
    averaged: Any = AveragedModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    averaged.update_parameters(model)
    x = images(5, 64)
    normlab.recalibrate(averaged, x.split(16), only="module.1")
    assert_statistics(averaged.module[1], averaged.module[0](x))
    assert torch.equal(averaged.module[4].running_mean, model[4].running_mean)
    assert_near(evaluated(normlab.convert(averaged).model, x), evaluated(averaged, x))


@situation("xfey/pytorch-BigNAS#3", "F", "recalibrate, convert", "held")
def test_calibration_by_a_cumulative_mean_and_by_recalibrate_agree():
    """A sub-network is calibrated with `momentum=None` after a reset: recalibrate gives those of all at once."""
    model = trained()
    cumulative = copied(model)[:2].train()
    cumulative[1].momentum = None
    cumulative[1].reset_running_stats()
    batches = [images(seed) for seed in range(4)]
    for batch in batches:
        cumulative(batch)
    normlab.recalibrate(model, batches)
    assert_statistics(model[1], model[0](torch.cat(batches)))
    assert_near(cumulative[1].running_mean, model[1].running_mean, 1e-3)
    converted = normlab.convert(cumulative, "batch").model
    assert converted[1].momentum is None


@situation("Cadene/pretrained-models.pytorch#5", "S", "diagnose, recalibrate", "held")
def test_statistics_that_a_momentum_of_zero_kept_from_other_images_are_named():
    """A published net has momentum 0, so fine-tuning never moves its statistics: diagnose says how far off they are."""
    model = trained()
    for norm in (model[1], model[4]):
        norm.momentum = 0.0
    batches = [images(1) * 4 + 20, images(2) * 4 + 20]
    for batch in batches:
        model.train()(batch)
    found = faults(normlab.diagnose(model, batches))
    assert "1" in found["running statistics off"]
    normlab.recalibrate(model, batches)
    assert_statistics(model[1], model[0](torch.cat(batches)))
    assert "running statistics off" not in faults(normlab.diagnose(model, batches))


class Classifier(nn.Module):
    """A head with a batch norm for each domain."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        self.domain = "source"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.domain)(x)


@situation(
    "kgl-prml/Contrastive-Adaptation-Network-for-Unsupervised-Domain-Adaptation#7",
    "0",
    "diagnose, convert, freeze",
    "mended",
)
def test_the_norm_of_a_domain_that_never_trained_is_named():
    """Only the source domain's norm trained; the target's is used in the test: diagnose and freeze name it."""
    model = Classifier()
    for seed in range(50):
        model(numbers(16, 3, seed=seed, mean=4.0))
    model.domain = "target"
    x = numbers(16, 3, seed=99, mean=4.0)
    assert faults(normlab.diagnose(model.eval(), [x, x + 0.1]))["statistics never updated"] == ["target"]
    notes = rows(normlab.freeze(model))
    assert "no batch" in notes["target"].note
    assert "no batch" not in notes["source"].note
    converted: Any = normlab.convert(model).model
    fresh: Any = normlab.convert(Classifier()).model
    fresh.domain = "target"
    assert torch.equal(converted.train()(x), fresh.train()(x))
    assert_near(converted.target.running_mean, x.double().mean(0))


@situation("cleinc/bts#90", "0", "diagnose, recalibrate", "held")
def test_statistics_of_a_published_model_that_are_0_and_1_are_named_and_measured():
    """A published model's norms have means 0 and variances 1, with a counter: diagnose says how far off they are."""
    model = trained()
    for norm in (model[1], model[4]):
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
    assert int(model[1].num_batches_tracked) == 60
    batches = [images(1), images(2)]
    (finding,) = normlab.diagnose(model.eval(), batches).findings
    assert set(finding.modules) == {"1", "4"}
    assert "recalibrate" in finding.command
    normlab.recalibrate(model, batches)
    assert_statistics(model[1], model[0](torch.cat(batches)))
    assert normlab.diagnose(model, batches).healthy


class SpeechEncoder(nn.Module):
    """A depth-wise convolution and a batch norm over padded frames, as a conformer has them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        return F.silu(self.norm(self.conv(x)))


def speech() -> tuple[Tensor, Tensor, Tensor]:
    """Frames, lengths, and which frames count."""
    lengths = torch.tensor([9, 4, 6, 2])
    counts = torch.arange(9) < lengths[:, None]
    return numbers(4, 4, 9, mean=3.0) * counts[:, None], lengths, counts


@situation("pytorch/audio#4205", "F", "recalibrate", "mended")
def test_statistics_of_padded_speech_are_those_of_its_frames():
    """Padding enters a conformer's batch norm: with a mask recalibrate counts the frames alone."""
    model = SpeechEncoder()
    x, lengths, counts = speech()
    normlab.recalibrate(
        model,
        [(x, lengths)],
        forward=lambda net, batch: net(*batch),
        mask=lambda batch: torch.arange(batch[0].shape[2]) < batch[1][:, None],
    )
    frames = model.conv(x).double().transpose(1, 2)[counts]
    assert_near(model.norm.running_mean, frames.mean(0))
    assert_near(model.norm.running_var, frames.var(0))


@situation("pytorch/pytorch#70529", "F", "convert", "mended")
def test_a_batch_norm_of_sequences_of_many_lengths_takes_a_mask():
    """Batch norm of sequences is to count the frames that there are: `mask` makes statistics and output theirs."""
    x, _, counts = speech()
    norm: Any = normlab.convert(nn.Sequential(nn.BatchNorm1d(4)), "batch").model[0].train()
    y = norm(x, mask=counts)
    frames = x.double().transpose(1, 2)[counts]
    expected = (frames - frames.mean(0)) / (frames.var(0, correction=0) + 1e-5).sqrt()
    assert_near(y.transpose(1, 2)[counts], expected)
    assert_near(norm.running_mean, 0.1 * frames.mean(0))
    assert_near(norm.running_var, 0.9 + 0.1 * frames.var(0))


@situation("huggingface/transformers#47739", "F", "convert", "mended")
def test_frames_of_one_sequence_do_not_depend_on_the_padding_of_others():
    """A batch norm before a positional convolution sees padding: with a mask, longer padding changes nothing."""
    x, _, counts = speech()
    longer, more = F.pad(x, (0, 5), value=7.0), F.pad(counts, (0, 5))
    for to in ("batch", "running", "group", "layer", "instance"):
        operation = normlab.convert(nn.Sequential(nn.BatchNorm1d(4)), to, batches=[x])
        one, other = operation.model[0].train(), copied(operation.model[0]).train()
        y, z = one(x, mask=counts), other(longer, mask=more)
        assert_near(z[:, :, :9].transpose(1, 2)[counts], y.transpose(1, 2)[counts])


class SequenceWise(nn.Module):
    """Gives a module all frames of all sequences as rows."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x.flatten(0, 1)).view(x.shape)


@situation("SeanNaren/deepspeech.pytorch#360", "A", "convert, recalibrate", "held")
def test_a_sequence_wise_norm_under_the_name_module_is_found_by_its_name():
    """A wrapper holds its norm under the name `module`, as data parallel does: chosen, converted and measured."""
    model = with_drawn_state(nn.Sequential(nn.Linear(3, 4), SequenceWise(nn.BatchNorm1d(4))))
    x = numbers(6, 5, 3)
    operation = normlab.convert(model, only="1.module")
    assert operation.report.touched
    assert_near(evaluated(operation.model, x), evaluated(model, x))
    normlab.recalibrate(model, [x])
    assert_statistics(model[1].module, model[0](x).flatten(0, 1))


class Output(OrderedDict):
    """An output by names and attributes."""


@dataclass
class Scores:
    """An output in a class of its own."""

    logits: Tensor


class NamedOutput(nn.Module):
    """Takes `pixel_values` by name."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))

    def forward(self, pixel_values: Tensor) -> Any:
        y = self.body(pixel_values)
        return {"dict": {"logits": y}, "ordered": Output(logits=y), "class": Scores(y), "tuple": (y, None)}[self.kind]


@situation("huggingface/peft#1732", "E", "convert, fold", "mended")
@pytest.mark.parametrize("kind", ["dict", "ordered", "class", "tuple"])
def test_a_change_of_outputs_in_classes_is_measured(kind):
    """A model returns its output in a class of its own: a change is measured, not taken for nothing."""
    torch.manual_seed(0)
    model = with_drawn_state(NamedOutput(kind))
    batch = {"pixel_values": numbers(2, 3, 6, 6)}
    operation = normlab.convert(model, "group", batches=[batch], forward=lambda net, one: net(**one))

    def logits(net: Any) -> Tensor:
        return evaluated(net.body, batch["pixel_values"]).double()

    change = (logits(operation.model) - logits(model)).square().mean().sqrt() / logits(model).std(correction=0)
    assert operation.report.change == pytest.approx(change.item(), rel=1e-3)
    assert change > 0.1
    operation = normlab.fold(model, **batch)
    assert_near(logits(operation.model), logits(model))
    assert operation.report.touched


@situation("IBM/lale#244", "K", "recalibrate, diagnose, convert", "mended")
def test_batches_that_are_dicts_are_asked_how_to_be_given():
    """A loader gives dicts: the error names `forward=` and the keys, nothing changes, and with it the verbs work."""
    model = with_drawn_state(NamedOutput("dict"))
    batch = {"pixel_values": numbers(4, 3, 6, 6), "labels": torch.zeros(4)}
    before = state_of(model)
    verbs = normlab.recalibrate, normlab.diagnose, lambda net, batches, **o: normlab.convert(net, batches=batches, **o)
    for verb in verbs:
        with pytest.raises(InputError, match=r"forward=.*pixel_values"):
            verb(model, [batch])
        assert_same_as(before, model)
        verb(copied(model), [batch], forward=lambda net, one: net(one["pixel_values"]))


@situation("JiahuiYu/slimmable_networks#27", "O", "recalibrate, convert", "held")
def test_a_calibration_that_fails_in_the_middle_leaves_the_model_as_it_was():
    """A width fails in the third batch of a calibration: statistics, modes and hooks are as before, for every verb."""
    model = trained()
    before = state_of(model)
    for verb in (
        lambda batches: normlab.recalibrate(model, batches),
        lambda batches: normlab.convert(model, batches=batches, inplace=True, fit=True),
        lambda batches: normlab.diagnose(model, batches),
    ):
        with pytest.raises((RuntimeError, InputError)):
            verb([images(1), images(2), numbers(4, 5, 8, 8)])
        assert_same_as(before, model)


@situation("open-mmlab/mmrazor#75", "F", "recalibrate", "mended")
def test_a_recalibration_can_be_undone():
    """Is recalibration needed? Try it and take it back: `undo` gives the statistics of before, bit by bit."""
    model = trained()
    before = state_of(model)
    operation = normlab.recalibrate(model, [images(1) + 9])
    assert not torch.equal(model[1].running_mean, before["1.running_mean: value"])
    operation.undo()
    assert_same_as(before, model)


@situation("tensorpack/tensorpack#420", "S", "diagnose, convert, fold", "held")
def test_a_gamma_that_starts_at_zero_is_no_fault_and_survives():
    """The last norm of a block starts with γ = 0: it converts and folds to the same, and its γ still learns."""
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bn(self.conv(x))

    model = Block()
    for seed in range(20):
        model(images(seed))
    nn.init.zeros_(model.bn.weight)
    x = images(30)
    for operation in (normlab.convert(model), normlab.fold(model, x)):
        assert_near(evaluated(operation.model, x), x + model.bn.bias.detach().view(1, 3, 1, 1))
    converted: Any = normlab.convert(model).model.train()
    converted(x).square().mean().backward()
    assert converted.bn.weight.grad.abs().max() > 0


@situation("pyg-team/pytorch_geometric#1408", "S", "diagnose, convert", "held")
def test_a_batch_of_one_graph_is_named_before_it_fails():
    """A batch of one row reaches a norm: diagnose says that torch will refuse, and the converted model trains on it."""
    model = with_drawn_state(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    found = faults(normlab.diagnose(model.train(), [numbers(1, 3)]))
    assert found["single value"] == ["1"]
    converted = normlab.convert(model).model.train()
    converted(numbers(1, 3)).sum().backward()
    assert converted[0].weight.grad.isfinite().all()


@situation("wasidennis/AdaptSegNet#79", "S", "diagnose, recalibrate", "held")
def test_statistics_of_the_last_domain_are_named_on_the_other():
    """After adaptation a model fails in evaluation on its source: diagnose names the statistics, measuring cures it."""
    model = trained()
    for seed in range(60):
        model.train()(images(seed) * 0.2 - 4)
    source = [images(seed) for seed in range(70, 74)]
    with torch.no_grad():
        expected = model.train()(torch.cat(source))
    with torch.no_grad():
        for seed in range(60):
            model.train()(images(seed) * 0.2 - 4)
    assert "1" in faults(normlab.diagnose(model.eval(), source))["running statistics off"]
    normlab.recalibrate(model, source)
    assert_near(evaluated(model, torch.cat(source)), expected, 0.02)


@situation("cypw/PyTorch-MFNet#5", "J", "normlab diagnose", "mended")
def test_weights_with_a_prefix_and_a_wrapper_load_on_the_command_line(tmp_path, monkeypatch, capsys):
    """A checkpoint has its weights under `state_dict`, names behind `module.`: the command line diagnoses it."""
    from normlab.cli import main

    (tmp_path / "net_of_mf.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n    torch.manual_seed(0)\n    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))\n"
        "batches = [torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(s)) for s in range(4)]\n"
    )
    torch.manual_seed(0)
    model = nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.module[1].running_mean.fill_(50.0)
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, tmp_path / "last.ckpt")
    monkeypatch.chdir(tmp_path)
    arguments = ["diagnose", "net_of_mf.py:make", "--batches", "net_of_mf.py:batches", "--weights", "last.ckpt"]
    monkeypatch.setattr(sys, "argv", ["normlab", *arguments])
    try:
        status = main()
    except SystemExit as exit:
        status = exit.code
    said = capsys.readouterr()
    assert status == 1, said.err
    assert "running statistics off" in said.out


@situation("pytorch/pytorch#10008", "O", "convert, fold", "mended")
def test_a_comparison_over_nan_is_no_agreement():
    """Statistics with NaN make a comparison meaningless: no report has a change of 0, and rows say NaN."""
    model = trained()
    model[1].running_mean[0] = float("nan")
    before = state_of(model)
    operation = normlab.convert(model, batches=[images(1)])
    (first, second) = operation.report
    assert first.change is None or first.change != 0.0
    assert "the same in evaluation" not in first.note
    assert second.change is None or second.change != 0.0
    assert operation.report.change is None or operation.report.change != 0.0
    report = normlab.fold(model, images(1)).report
    assert [row.became for row in report] == [None, None]
    assert all("NaN" in row.note for row in report)
    assert report.change is None
    now = state_of(model)
    assert all(torch.equal(now[k], v) or "running_mean" in k for k, v in before.items() if isinstance(v, Tensor))


@situation("pytorch/vision#2599", "D", "convert", "held")
def test_half_precision_statistics_stay_in_float32():
    """A model is cast to half precision: statistics of converted norms stay in float32, and no variance becomes 0."""
    model = trained()
    model[1].running_var.fill_(1e-9)
    converted = normlab.convert(model).model.half()
    assert converted[1].running_var.dtype == torch.float32
    assert bool((converted[1].running_var > 0).all())
    assert converted[1].weight.dtype == torch.float16
    x = images(1)
    y = converted[1].eval()(x.new_ones(2, 4, 3, 3).half())
    assert_near(y, by_hand(torch.ones(2, 4, 3, 3), model[1]), 0.01)

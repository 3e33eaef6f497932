"""What people's batches and outputs look like: pairs, longer tuples, dicts, structures of tensors."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence

from normlab.errors import InputError
from normlab.training import Callback, Learner, Metrics, ToDevice, accuracy
from normlab.training.batches import call_each, count_samples, split_batch

Pair = namedtuple("Pair", "first second")


@dataclass(frozen=True)
class Heads:
    out: torch.Tensor
    aux: Any
    name: str = "net"


def pairs(n: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, generator=generator), torch.randint(2, (8,), generator=generator)) for _ in range(n)]


def fitted(batches, model: nn.Module | None = None, **options) -> Learner:
    torch.manual_seed(0)
    model = model or nn.Linear(3, 2)
    learner = Learner(model, batches, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), **options)
    learner.fit(1)
    return learner


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: [x, y],
        lambda x, y: (x, y, torch.zeros(8), "name"),
        Pair,
        lambda x, y: {"image": x, "label": y, "image_meta_dict": {}},
        lambda x, y: OrderedDict(input=x, target=y),
        lambda x, y: {"x": x, "y": y},
    ],
)
def test_the_learner_trains_on_any_batch_with_inputs_and_targets(wrap):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    for x, y in pairs():
        loss = F.cross_entropy(F.linear(x, model.weight, model.bias), y)
        for part, gradient in zip(model.parameters(), torch.autograd.grad(loss, [*model.parameters()]), strict=True):
            part.data -= 0.1 * gradient
    for part, expected in zip(
        fitted([wrap(x, y) for x, y in pairs()]).model.parameters(), model.parameters(), strict=True
    ):
        assert torch.allclose(part, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"input_ids": 1, "labels": 2}, r"one of image.*got the keys 'input_ids', 'labels'.*collate_fn"),
        ({"image": 1, "x": 2, "label": 3}, "got the keys 'image', 'x', 'label'"),
        ({"image": 1}, "got the keys 'image'"),
        (torch.zeros(2, 3), "got Tensor.*collate_fn"),
        ([torch.zeros(2)], "got list of length 1"),
        (None, "got NoneType"),
    ],
)
def test_a_batch_without_both_parts_is_named_with_the_cure(batch, said):
    with pytest.raises(InputError, match=said):
        split_batch(batch)


class Net(nn.Module):
    """An auxiliary head in training."""

    def __init__(self, out):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(3, 2), nn.Linear(3, 2), out

    def forward(self, x):
        return self.out(self.a(x), self.b(x)) if self.training else self.a(x)


def leaves(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return list(
        output.values()
        if isinstance(output, dict)
        else [output.out, output.aux]
        if isinstance(output, Heads)
        else output
    )


def loss_of_all(output, targets):
    return torch.stack([F.cross_entropy(part, targets) for part in leaves(output)]).sum()


OUTPUTS = [
    lambda a, b: (a, b),
    lambda a, b: [a, b],
    Pair,
    lambda a, b: {"out": a, "aux": b},
    lambda a, b: OrderedDict(out=a, aux=b),
    Heads,
]


@pytest.mark.parametrize("out", OUTPUTS)
def test_a_model_with_an_auxiliary_head_trains_and_its_output_holds_no_graph(out):
    class Look(Callback):
        def after_backward(self) -> None:
            self.output = self.learner.output

    look = Look()
    learner = fitted(pairs(), Net(out), valid=pairs(1), loss_func=loss_of_all, callbacks=[look, Metrics()])
    assert type(look.output) is type(out(torch.zeros(1), torch.zeros(1)))
    assert not any(part.requires_grad for part in leaves(look.output))
    with torch.no_grad():
        expected = torch.stack([loss_of_all(learner.model.eval()(x), y) for x, y in pairs(1)]).mean()
    assert learner.history[0]["valid"]["loss"] == pytest.approx(float(expected))


@pytest.mark.parametrize("out", [OUTPUTS[0], OUTPUTS[3]])
def test_a_model_with_an_auxiliary_head_trains_compiled(out, monkeypatch):
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, options: real(f, backend="aot_eager"))
    plain = fitted(pairs(), Net(out), loss_func=loss_of_all)
    compiled = fitted(pairs(), Net(out), loss_func=loss_of_all, compile=True)
    for a, b in zip(plain.model.parameters(), compiled.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert type(compiled.output) is type(plain.output)
    assert not any(part.requires_grad for part in leaves(compiled.output))


def test_a_metric_that_cannot_take_the_output_is_named():
    with pytest.raises(
        InputError, match=r"Metrics\(right=…\): cannot take an output tuple.*AttributeError.*output\[0\]"
    ):
        fitted(pairs(), Net(OUTPUTS[0]), loss_func=loss_of_all, callbacks=[Metrics(right=accuracy)])


def test_a_metric_of_the_part_it_needs_is_that_parts_figure():
    metrics = Metrics(right=lambda output, targets: accuracy(output[0], targets))
    learner = fitted(pairs(1), Net(OUTPUTS[0]), loss_func=loss_of_all, callbacks=[metrics])
    expected = (learner.output[0].argmax(1) == pairs(1)[0][1]).double().mean()
    assert learner.history[0]["train"]["right"] == pytest.approx(float(expected))


@pytest.mark.parametrize(("figure", "said"), [(torch.zeros(2), r"a tensor \(2,\)"), ({"f1": 1.0}, "dict")])
def test_a_metric_that_gives_no_figure_is_named(figure, said):
    with pytest.raises(InputError, match=rf"Metrics\(bad=…\): expected one figure.*{said}"):
        fitted(pairs(), callbacks=[Metrics(bad=lambda output, targets: figure)])


def test_an_error_of_a_metric_of_tensors_is_the_users_own():
    with pytest.raises(ZeroDivisionError):
        fitted(pairs(), callbacks=[Metrics(bad=lambda output, targets: 1 / 0)])


@pytest.mark.parametrize(("loss", "said"), [({"loss": 1}, "dict"), (torch.zeros(3), r"shape \(3,\)")])
def test_a_loss_that_is_not_one_value_is_named(loss, said):
    with pytest.raises(InputError, match=f"loss_func.*{said}.*sum or mean"):
        fitted(pairs(), loss_func=lambda output, targets: loss)


def test_accuracy_of_images_of_several_sizes_is_the_mean_over_images():
    batches = [(torch.randn(2, 3, size, size), torch.randint(3, (2, size, size))) for size in (4, 6)]
    model = nn.Conv2d(3, 3, 1)
    learner = fitted(batches, model, callbacks=[Metrics(accuracy=accuracy)], valid=batches)
    expected = [(model(x).argmax(1) == y).double().mean() for x, y in batches]
    assert learner.history[0]["valid"]["accuracy"] == pytest.approx(float(sum(expected) / 2), rel=1e-6)


@pytest.mark.parametrize(
    ("inputs", "targets", "samples"),
    [
        (torch.zeros(4, 3), torch.zeros(4), 4),
        (torch.zeros(4, 3), [{"boxes": torch.zeros(7, 4)}] * 4, 4),
        ([torch.zeros(3, 5, 5)] * 4, [{"boxes": torch.zeros(7, 4)}] * 4, 4),
        ({"a": torch.zeros(4, 3)}, None, 4),
        (torch.zeros(4, 3), torch.tensor(1.0), 4),
        (None, {"one": torch.zeros(4), "two": torch.zeros(4, 2)}, 4),
    ],
)
def test_the_samples_of_a_batch_are_counted(inputs, targets, samples):
    assert count_samples(inputs, targets) == samples


def test_a_batch_whose_samples_cannot_be_counted_is_named():
    with pytest.raises(InputError, match="inputs str, targets NoneType"):
        count_samples("image", None)


def test_to_device_moves_what_is_in_structures():
    packed = pack_sequence([torch.ones(3), torch.ones(2)])
    batch = {"a": torch.ones(2), "b": [Pair(torch.ones(2), "text"), 3], "c": Heads(torch.ones(2), None), "d": packed}

    class Look(Callback):
        order = 1

        def begin_batch(self) -> None:
            learner = self.learner
            self.seen = learner.inputs
            assert learner.targets[0].device.type == "meta"
            learner.inputs, learner.targets = torch.ones(2, 3, device="meta"), torch.ones(2, 2, device="meta")

    look = Look()
    fitted([(batch, [torch.zeros(2)])], callbacks=[ToDevice("meta"), look], loss_func=F.mse_loss)
    assert look.seen["a"].device.type == look.seen["b"][0].first.device.type == "meta"
    assert look.seen["c"].out.device.type == look.seen["d"].data.device.type == "meta"
    assert (look.seen["b"][0].second, look.seen["b"][1], look.seen["c"].name) == ("text", 3, "net")
    assert batch["a"].device.type == batch["c"].out.device.type == "cpu", "the batch itself stays as it was"


def test_what_has_not_the_method_stays():
    assert call_each(("a", {1: None}), "detach") == ("a", {1: None})

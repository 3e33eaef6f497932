"""Weights as people save them: nested, with prefixes, with more beside; what does not fit is named."""

import json
from collections import OrderedDict
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import normlab
from normlab.errors import InputError
from normlab.study.weights import load_weights, save_weights


def net(**options) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4, **options)))


def trained() -> nn.Sequential:
    model = net()
    model(torch.randn(4, 3, 5, 5))
    return model


def state_of(model: nn.Module) -> Any:
    return model.state_dict()


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        dict,
        lambda state: {"state_dict": state, "epoch": 3, "optimizer": {"state": {}}},
        lambda state: {"model": state, "best": torch.tensor(0.9)},
        lambda state: {"model_state_dict": state},
        lambda state: {"state_dict": {"model": state}},
    ],
)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_state_is_found_whatever_it_is_wrapped_in(tmp_path, wrap, prefix):
    model, other = trained(), net()
    state = OrderedDict((prefix + key, part) for key, part in model.state_dict().items())
    torch.save(wrap(state), tmp_path / "w.pt")
    assert load_weights(other, tmp_path / "w.pt") == []
    assert same(other, model)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_state_in_safetensors_is_loaded_with_any_prefix(tmp_path, prefix):
    model, other = trained(), net()
    save_file({prefix + key: part for key, part in model.state_dict().items()}, tmp_path / "w.safetensors")
    assert load_weights(other, tmp_path / "w.safetensors") == []
    assert same(other, model)


def test_a_plain_state_goes_into_a_wrapped_model(tmp_path):
    model, other = trained(), nn.DataParallel(net())
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert load_weights(other, tmp_path / "w.pt") == []
    assert same(other, model)


def test_a_child_that_is_called_module_keeps_its_name(tmp_path):
    model, other = nn.ModuleDict({"module": trained()}), nn.ModuleDict({"module": net()})
    torch.save(model.state_dict(), tmp_path / "w.pt")
    assert load_weights(other, tmp_path / "w.pt") == []
    assert same(other, model)


def test_a_state_from_before_batches_were_counted_is_loaded(tmp_path):
    model, other = trained(), net()
    state = state_of(model)
    del state["bn.num_batches_tracked"]
    for name in state._metadata:
        state._metadata[name] = {"version": 1}
    torch.save(state, tmp_path / "w.pt")
    assert load_weights(other, tmp_path / "w.pt") == []
    assert torch.equal(other.state_dict()["bn.running_mean"], model.state_dict()["bn.running_mean"])


def test_what_is_left_over_is_named(tmp_path):
    state = {**trained().state_dict(), "head.weight": torch.ones(2), "n_averaged": torch.tensor(1), "epoch": 3}
    torch.save(state, tmp_path / "w.pt")
    assert load_weights(net(), tmp_path / "w.pt") == [
        f"weights={str(tmp_path / 'w.pt')!r}: left over, not in the model: head.weight, n_averaged, epoch (int)."
    ]


def changed(state, **changes):
    state = {**state, **changes}
    return {key: part for key, part in state.items() if part is not None}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda state: changed(state, **{"bn.bias": None, "x": torch.ones(1)}), "missing: bn.bias; left over: x"),
        (
            lambda state: changed(state, **{"bn.bias": torch.ones(9)}),
            r"of another shape: bn.bias \(9,\), in the .*\(4,\)",
        ),
        (lambda state: {3: torch.ones(1), None: 4}, r"keys that are no names: 3 \(int\), None \(NoneType\)"),
        (lambda state: {"state_dict": {"a": 3, "b": "x"}}, r"keys='a \(int\), b \(str\)'.*tensors by name"),
        (lambda state: {}, "keys='nothing'"),
        (lambda state: [state], "'list' is not usable. Accepted: a state dict"),
        (lambda state: {**state, "module.bn.bias": torch.ones(4)}, "twice there.*: bn.bias"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, make, said):
    torch.save(make(dict(net().state_dict())), tmp_path / "w.pt")
    with pytest.raises(InputError, match=f"weights=.*w.pt.*{said}"):
        load_weights(net(), tmp_path / "w.pt")


def test_a_pickled_model_is_not_run_and_named(tmp_path):
    torch.save(net(), tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=r"it holds torch.nn.modules.container.Sequential.*torch.save\(model.state_dict"
    ):
        load_weights(net(), tmp_path / "w.pt")


def test_what_train_saves_has_a_card_that_other_norms_do_not_meet(tmp_path):
    path, model = tmp_path / "w.safetensors", trained()
    save_weights(model, path, run="abc")
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["normlab.card"]) == normlab.card(model)
        assert file.metadata()["normlab.run"] == "abc"
    assert load_weights(net(), path) == []
    notes = load_weights(net(eps=1e-3), path)
    assert len(notes) == 1
    assert "bn: eps was 1e-05 when saved, is 0.001 here" in notes[0]


def test_a_card_beside_a_state_is_checked(tmp_path):
    model = trained()
    torch.save({"state_dict": model.state_dict(), "normlab.card": normlab.card(model)}, tmp_path / "w.pt")
    assert load_weights(net(), tmp_path / "w.pt") == []
    assert "bn: momentum was 0.1 when saved, is 0.03 here" in load_weights(net(momentum=0.03), tmp_path / "w.pt")[0]


def test_a_card_that_is_damaged_is_refused(tmp_path):
    save_file(net().state_dict(), tmp_path / "w.safetensors", metadata={"normlab.card": "{"})
    with pytest.raises(InputError, match=r"card: expected JSON that normlab\.card made"):
        load_weights(net(), tmp_path / "w.safetensors")


def test_what_nnunet_saves_is_read(tmp_path):
    model, here = trained(), net()
    torch.save({"network_weights": model.state_dict(), "current_epoch": 3}, tmp_path / "checkpoint_best.pth")
    assert load_weights(here, tmp_path / "checkpoint_best.pth") == []
    assert all(torch.equal(part, here.state_dict()[name]) for name, part in model.state_dict().items())


def test_a_checkpoint_of_lightning_is_read_where_one_part_of_it_is_the_model(tmp_path):
    class Module(nn.Module):
        def __init__(self, **parts):
            super().__init__()
            self.parts = nn.ModuleDict(parts)

    path, model = tmp_path / "last.ckpt", trained()
    torch.save({"state_dict": Module(model=model, loss=nn.Linear(1, 1)).state_dict()}, path)
    here = net()
    (note,) = load_weights(here, path)
    assert note.endswith("left over, not in the model: parts.loss.weight, parts.loss.bias.")
    assert all(torch.equal(part, here.state_dict()[name]) for name, part in model.state_dict().items())
    torch.save({"state_dict": Module(student=model, teacher=net()).state_dict()}, path)
    with pytest.raises(InputError, match=r"missing: .*left over: parts\.student\."):
        load_weights(net(), path)

"""The norms in other people's factories. A library that is not installed has a stand-in, made by its documentation."""

import doctest
import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from normlab import integrations
from normlab.integrations import NNUNET, PREFIX
from normlab.nn import NORMS, GroupNorm, RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d, build_norm

LEFT_OUT = {"mabn", "group_ws"}  # these need convolutions of their own
NAMED = sorted(set(NORMS) - LEFT_OUT)
RUNNING = (RunningBatchNorm1d, RunningBatchNorm2d, RunningBatchNorm3d)


def is_installed(package):
    return importlib.util.find_spec(package) is not None


def stand_in(monkeypatch, name, **members):
    """A module of this name, and the packages above it, for one test."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    for end in range(1, len(parts)):
        setattr(sys.modules[".".join(parts[:end])], parts[end], sys.modules[".".join(parts[: end + 1])])
    vars(sys.modules[name]).update(members)


def learns(net, *images):
    """A step forward and back leaves finite gradients, and some that are not 0."""
    out = net(*images)
    out = out[0] if isinstance(out, list | tuple) else out
    out.square().mean().backward()
    grads = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
    return all(grad.isfinite().all() for grad in grads) and any(grad.any() for grad in grads)


# MONAI


@pytest.fixture
def factory():
    pytest.importorskip("monai")
    from monai.networks.layers.factories import Norm

    before = dict(Norm.components)
    for name, part in before.items():
        if part.value.__module__.startswith("normlab"):  # an example has registered them
            del Norm.components[name]
    yield Norm
    Norm.components.clear()
    Norm.components.update(before)


def monai_net(kind, dims, norm):
    from monai.networks import nets

    if kind == "DynUNet":
        sizes = {"kernel_size": [3] * 3, "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [4, 8, 8]}
        return nets.DynUNet(dims, 1, 2, norm_name=norm, **sizes)
    if kind == "SegResNet":
        return nets.SegResNet(dims, init_filters=8, blocks_down=(1, 1), blocks_up=(1,), norm=norm)
    if kind == "BasicUNet":
        return nets.BasicUNet(dims, 1, 2, features=(4, 4, 4, 4, 4, 4), norm=norm)
    return nets.UNet(dims, 1, 2, channels=(4, 8), strides=(2,), norm=norm)


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("kind", ["UNet", "DynUNet", "SegResNet", "BasicUNet"])
@pytest.mark.parametrize("norm", ["running", "normlab_group", ("running", {"momentum": 0.05})])
def test_monai_builds_its_nets_with_a_norm_by_name(factory, kind, dims, norm):
    integrations.register_monai()
    net = monai_net(kind, dims, norm)
    kinds = {type(module) for module in net.modules()}
    assert (GroupNorm if norm == "normlab_group" else RUNNING[dims - 1]) in kinds
    assert not kinds & {nn.InstanceNorm2d, nn.InstanceNorm3d, nn.GroupNorm}
    if isinstance(norm, tuple):
        assert {module.momentum for module in net.modules() if isinstance(module, RUNNING)} == {0.05}
    assert learns(net, torch.randn(2, 1, *(32,) * dims))


@pytest.mark.parametrize("name", NAMED)
def test_every_norm_is_in_monai_under_its_prefix(factory, name):
    integrations.register_monai()
    for dims in (1, 2, 3):
        expected = build_norm(name, 8, dims)
        from monai.networks.layers.utils import get_norm_layer

        made = get_norm_layer(PREFIX + name, dims, 8)
        assert repr(made) == repr(expected)
    assert learns(monai_net("UNet", 2, PREFIX + name), torch.randn(2, 1, 16, 16))


def test_names_of_monai_stay_monais(factory):
    before = {name: part.value for name, part in factory.components.items()}
    added = integrations.register_monai()
    assert {name: factory.components[name].value for name in before} == before
    assert factory["batch", 2] is nn.BatchNorm2d
    assert factory["group", 2] is nn.GroupNorm
    assert factory["instance", 3] is nn.InstanceNorm3d
    assert factory["layer", 2] is nn.LayerNorm
    taken = {name.lower() for name in before}
    assert {"batch", "group", "instance", "layer"} <= taken & set(NAMED)
    assert set(added) == {PREFIX + name for name in NAMED} | (set(NAMED) - taken)
    assert len(factory.names) == len(before) + len(added)


def test_a_second_call_adds_only_what_is_new(factory, monkeypatch):
    integrations.register_monai()
    assert integrations.register_monai() == []
    monkeypatch.setitem(NORMS, "mine", NORMS["running"])
    assert integrations.register_monai() == ["mine", "normlab_mine"]
    assert factory["mine", 3] is RunningBatchNorm3d


def test_a_wrong_option_is_an_error_that_names_it(factory):
    integrations.register_monai()
    with pytest.raises(TypeError, match="momentun"):
        monai_net("UNet", 2, ("running", {"momentun": 0.05}))


# mmcv


class Models:
    """mmengine's registry, as its documentation has it."""

    def __init__(self):
        self.module_dict = {"BN": nn.BatchNorm2d, "GN": nn.GroupNorm}

    def register_module(self, name=None, force=False, module=None):
        assert isinstance(module, type)
        if name in self.module_dict:
            raise KeyError(f"{name} is already registered")
        self.module_dict[name] = module

    def get(self, name):
        return self.module_dict.get(name)


@pytest.fixture
def models(monkeypatch):
    if not is_installed("mmengine"):
        stand_in(monkeypatch, "mmengine.registry", MODELS=Models())
    from mmengine.registry import MODELS

    before = dict(MODELS.module_dict)
    yield MODELS
    MODELS.module_dict.clear()
    MODELS.module_dict.update(before)


@pytest.mark.parametrize("name", NAMED)
def test_every_norm_is_in_mmcv_and_takes_the_eps_that_mmcv_gives(models, name):
    integrations.register_mmcv()
    for suffix, dims in (("", 2), ("1d", 1), ("2d", 2), ("3d", 3)):
        kind = models.get(PREFIX + name + suffix)
        assert isinstance(kind, type)
        made, expected = kind(8, eps=1e-5), build_norm(name, 8, dims)
        assert type(made) is type(expected)
        assert kind.__name__ == type(expected).__name__


def test_mmcv_keeps_its_names_and_options_reach_the_norm(models):
    before = dict(models.module_dict)
    added = integrations.register_mmcv()
    assert integrations.register_mmcv() == []
    assert {name: models.get(name) for name in before} == before
    assert set(added) == set(NAMED) | {PREFIX + name for name in NAMED}
    assert models.get("running3d")(8, eps=1e-3, momentum=0.05).momentum == 0.05
    assert models.get("running3d")(8, eps=1e-3).eps == 1e-3
    assert models.get("group")(8, num_groups=2).num_groups == 2


@pytest.mark.skipif(not is_installed("mmcv"), reason="mmcv is not installed")
def test_mmcv_builds_a_block(models):
    from mmcv.cnn import ConvModule, build_norm_layer

    integrations.register_mmcv()
    block = ConvModule(3, 8, 3, norm_cfg={"type": "running", "momentum": 0.05})
    assert type(block.bn) is RunningBatchNorm2d
    assert learns(block, torch.randn(2, 3, 8, 8))
    assert build_norm_layer({"type": "normlab_group"}, 8, postfix=1)[0] == "gn1"
    assert build_norm_layer({"type": "dynamic_tanh"}, 8, postfix=1)[0] == "norm_layer1"


# timm


@pytest.fixture
def names(monkeypatch):
    if not is_installed("timm"):
        create_norm = SimpleNamespace(_NORM_MAP={"batchnorm": nn.BatchNorm2d, "groupnorm": nn.GroupNorm})
        stand_in(monkeypatch, "timm.layers", create_norm=create_norm)
    from timm.layers import create_norm

    before = dict(create_norm._NORM_MAP)
    yield create_norm._NORM_MAP
    create_norm._NORM_MAP.clear()
    create_norm._NORM_MAP.update(before)


def test_every_norm_is_in_timm_as_timm_spells_it(names):
    before = dict(names)
    added = integrations.register_timm()
    assert integrations.register_timm() == []
    assert {name: names[name] for name in before} == before
    assert set(added) == set(NAMED) | {PREFIX + name for name in NAMED}
    for name in added:
        made = names[name.replace("_", "").lower()](8)  # as timm.layers.get_norm_layer looks it up
        assert repr(made) == repr(build_norm(name.removeprefix(PREFIX), 8))


@pytest.mark.skipif(not is_installed("timm"), reason="timm is not installed")
@pytest.mark.parametrize("name", ["running", "normlab_group", "layer_channels"])
def test_timm_builds_a_net(names, name):
    import timm

    integrations.register_timm()
    net = timm.create_model("resnet10t", norm_layer=name, num_classes=3)
    assert type(net.layer1[0].bn1) is type(build_norm(name.removeprefix(PREFIX), 8))
    assert learns(net, torch.randn(2, 3, 64, 64))


# nnU-Net


STAND_IN = """
from torch import nn


class nnUNetTrainer:
    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels,
                                   num_output_channels, enable_deep_supervision=True):
        return nn.Sequential(nn.Conv3d(num_input_channels, 8, 3), nn.InstanceNorm3d(8, affine=True), nn.LeakyReLU(),
                             nn.Conv3d(8, num_output_channels, 1))
"""
FIND = """
import importlib, inspect, sys
sys.path.insert(0, {folder!r})  # nnU-Net imports each file of the folder by its bare name
trainer = importlib.import_module("nnUNetTrainerRunning").nnUNetTrainerRunning
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
assert issubclass(trainer, nnUNetTrainer)
assert "plans_manager" in inspect.signature(trainer.build_network_architecture).parameters  # nnU-Net asks this
net = trainer.build_network_architecture(None, None, 1, 3, enable_deep_supervision=True)
print([type(part).__name__ for part in net], net[-1].out_channels)
"""


def test_the_trainer_builds_the_nets_of_nnunet_with_running(tmp_path):
    package = tmp_path / "nnunetv2/training/nnUNetTrainer"
    package.mkdir(parents=True)
    (package / "nnUNetTrainer.py").write_text(STAND_IN)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").touch()
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    code = FIND.format(folder=str(NNUNET))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['Conv3d', 'RunningBatchNorm3d', 'LeakyReLU', 'Conv3d'] 3"


REAL = """
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
import torch
trainer = recursive_find_trainer_class_by_name("nnUNetTrainerRunning")
arch = dict(n_stages=2, features_per_stage=[8, 8], conv_op="torch.nn.modules.conv.Conv2d", kernel_sizes=[[3, 3]] * 2,
            strides=[[1, 1], [2, 2]], n_conv_per_stage=[1, 1], n_conv_per_stage_decoder=[1], conv_bias=True,
            norm_op="torch.nn.modules.instancenorm.InstanceNorm2d", norm_op_kwargs=dict(eps=1e-5, affine=True),
            dropout_op=None, dropout_op_kwargs=None, nonlin="torch.nn.LeakyReLU", nonlin_kwargs=dict(inplace=True))
kind = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
imports = ["conv_op", "norm_op", "nonlin"]
architecture = {"network_class_name": kind, "arch_kwargs": arch, "_kw_requires_import": imports}
plans = PlansManager({"plans_name": "p", "dataset_name": "d", "configurations": {"2d": {"architecture": architecture}}})
net = trainer.build_network_architecture(plans, plans.get_configuration("2d"), 1, 3, True)
net(torch.randn(2, 1, 16, 16))[0].sum().backward()
kinds = [type(part).__name__ for part in net.modules()]
print(kinds.count("RunningBatchNorm2d") == 3, "InstanceNorm2d" in kinds)
"""


@pytest.mark.skipif(not is_installed("nnunetv2"), reason="nnunetv2 is not installed")
def test_nnunet_finds_the_trainer():
    environment = os.environ | {"nnUNet_extTrainer": str(NNUNET)}
    done = subprocess.run([sys.executable, "-c", REAL], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "True False"


def test_syncing_as_nnunet_does_leaves_running_alone():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), RunningBatchNorm2d(8))
    assert not isinstance(net[1], _BatchNorm)  # what torch would make a SyncBatchNorm of
    assert type(nn.SyncBatchNorm.convert_sync_batchnorm(net)[1]) is RunningBatchNorm2d


def test_its_example_runs(factory):
    assert doctest.testmod(integrations) == (0, 3)

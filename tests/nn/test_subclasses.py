"""Tensors of classes of others: the same values by the same kernels, and the class that torch's layers give."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn

from checks import composed
from normlab.kernels import autograd, cpu
from normlab.nn import NORMS, build_norm

NAMES = [name for name in NORMS if name != "none"]


class Tagged(nn.Parameter):
    """A parameter with something to say, as LoRA's and FSDP's."""


def images():
    return torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 + 1


def near(one, other):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_images_of_monai_keep_what_is_known_of_them(name, training):
    data = pytest.importorskip("monai.data")
    layer = build_norm(name, 8).train(training)
    plain, affine = copy.deepcopy(layer), torch.diag(torch.tensor([1.0, 2.0, 3.0, 1.0]))
    y = layer(data.MetaTensor(images(), affine=affine))
    torchs = nn.BatchNorm2d(8)(data.MetaTensor(images(), affine=affine))
    assert type(y) is type(torchs) is data.MetaTensor
    assert torch.equal(y.affine, torchs.affine)
    assert torch.equal(y.as_tensor(), plain(images()))
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(cpu.kernels is None, reason="no compiled kernels")
@pytest.mark.parametrize("operator", ["running_norm", "batch_norm"])
@pytest.mark.parametrize("what", ["input", "parameters"])
def test_the_kernels_are_used_all_the_same(monkeypatch, operator, what):
    calls, kernel = [], getattr(autograd, operator)
    monkeypatch.setattr(autograd, operator, lambda *arguments: calls.append(1) or kernel(*arguments))
    layer, x = build_norm(operator.removesuffix("_norm"), 8), images()
    if what == "input":
        x = Tagged(x)
    else:
        layer.weight, layer.bias = Tagged(layer.weight.detach()), Tagged(layer.bias.detach())
    for _ in range(2):
        layer(x).square().sum().backward()
    assert len(calls) == 2
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("switch", [nullcontext, composed])
def test_a_residual_alone_can_be_of_another_class(switch):
    class Named(torch.Tensor):
        pass

    layer = build_norm("running", 8, activation="relu")
    other = copy.deepcopy(layer)
    with switch():
        y = layer(images(), residual=images().as_subclass(Named))
        assert type(y) is Named
        assert torch.equal(y.as_subclass(torch.Tensor), other(images(), residual=images()))


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    if not dist.is_available() or dist.is_initialized():
        pytest.skip("no process group of its own")
    file = tmp_path_factory.mktemp("mesh") / "store"
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_distributed_tensors(mesh, name, training):
    from torch.distributed.tensor import DTensor, Replicate, distribute_module, distribute_tensor

    plain = build_norm(name, 8).train(training)
    layer = distribute_module(copy.deepcopy(plain), mesh)
    x, y = distribute_tensor(images(), mesh, [Replicate()]).requires_grad_(), images().requires_grad_()
    found, expected = layer(x), plain(y)
    assert type(found) is DTensor
    near(found.full_tensor(), expected)
    found.sum().backward()
    expected.sum().backward()
    near(x.grad.full_tensor(), y.grad)
    for one, other in zip(layer.buffers(), plain.buffers(), strict=True):
        near(one.full_tensor(), other)

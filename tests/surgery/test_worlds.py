"""Models after surgery in other people's loops, files and runtimes.

For the data-parallel test this file starts itself as a script, once for each of two ranks that talk over gloo; what
each computed comes back in a file.
"""

import copy
import io
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from normlab.nn import FrozenBatchNorm2d, RunningBatchNorm2d
from normlab.surgery import convert, fold, freeze
from ranks import run_ranks

RANKS = 2


def images(number: int) -> Tensor:
    return torch.randn(number, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def net() -> nn.Module:
    """Trained with torch's batch norm, for three steps."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2),
    )  # fmt: skip
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), images(48).split(16))
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: tuple[Tensor, ...]) -> None:
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def changed(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    return [
        name for name, value in model.state_dict().items() if name in before and not torch.equal(value, before[name])
    ]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantisation_of_a_folded_model_leaves_no_norm_in_float():
    from torch.ao.nn.quantized import Conv2d, Linear
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = images(16)
    model = convert(net(), "running").model.eval()
    folded, _ = fold(model, x)
    prepared = prepare_fx(folded, get_default_qconfig_mapping("x86"), (x,))
    output(prepared, x)  # observes the ranges
    quantised = convert_fx(prepared)
    kinds = [type(module) for module in quantised.children()]
    identity, relu = nn.Identity, nn.ReLU
    assert kinds == [Conv2d, identity, relu, Conv2d, identity, relu, nn.Flatten, Linear]
    error = (output(quantised, x) - output(model, x)).square().mean()
    assert error < 1e-3 * output(model, x).var()  # eight bits: 30 dB


def test_onnx_runtime_agrees_on_a_folded_model_that_has_a_running_norm_left():
    runtime = pytest.importorskip("onnxruntime")
    x = images(4)
    model = convert(nn.Sequential(nn.BatchNorm2d(3), *net()), "running").model
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), images(8).split(2))
    folded, report = fold(model, x)
    assert [row.name for row in report.skipped] == ["0"]
    program = torch.onnx.export(folded, (x,), dynamo=True, verbose=False)
    program.save(file := io.BytesIO())
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    expected = output(model, x)
    assert (torch.from_numpy(actual) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_lightning_trains_a_converted_model_and_leaves_frozen_norms_alone():
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module):
            super().__init__()
            self.model, self.modes = model, []

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            self.modes.append(self.model.training)
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    freeze(model := net(), only="1", inplace=True)
    module = convert(Module(model), "running", only="model.4", inplace=True).model
    assert isinstance(module.model[1], FrozenBatchNorm2d)
    assert isinstance(module.model[4], RunningBatchNorm2d)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    loader = DataLoader(TensorDataset(images(8)), batch_size=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on workers for loading, and of Lightning about torch
        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=1, **quiet)
        trainer.fit(module, loader)
    assert module.modes == [True] * 4
    frozen = {name for name in before if name.startswith("model.1.")}
    assert set(changed(module, before)) == set(before) - frozen


def test_accelerate_prepares_a_converted_model_and_its_optimizer():
    accelerate = pytest.importorskip("accelerate")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    convert(model, "running", inplace=True, optimizer=optimizer)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, stepping, loader = accelerator.prepare(model, optimizer, DataLoader(images(8), batch_size=2))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for x in loader:
        stepping.zero_grad()
        accelerator.backward(prepared(x).square().mean())
        stepping.step()
    assert set(changed(accelerator.unwrap_model(prepared), before)) == set(before)


def test_safetensors_keeps_what_surgery_made(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    x, file = images(4), tmp_path / "model.safetensors"
    running = convert(net(), "running").model
    for model in (running, fold(running, x)[0]):
        safetensors.save_file(model.state_dict(), file)
        again = spoiled(model)
        again.load_state_dict(safetensors.load_file(file))
        assert torch.equal(output(again, x), output(model, x))


def test_safetensors_keeps_tied_parameters_once(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    x, file = images(4), tmp_path / "model.safetensors"
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    model[2].weight, model[3].weight = model[0].weight, model[1].weight
    model = convert(model, "running").model
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), x.split(2))
    safetensors.save_model(model, file)
    assert not {"2.weight", "3.weight"} & set(safetensors.load_file(file))
    again = spoiled(model)
    safetensors.load_model(again, file)
    assert torch.equal(output(again, x), output(model, x))
    assert again[3].weight is again[1].weight


def spoiled(model: nn.Module) -> nn.Module:
    """A copy with other parameters and statistics."""
    model = copy.deepcopy(model)
    for part in (*model.parameters(), *model.buffers()):
        part.detach().fill_(3)
    return model


# --- two ranks --------------------------------------------------------------------------------------------------------


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    model = convert(net(), "running").model.train()
    parallel = DistributedDataParallel(model)
    train(parallel, torch.optim.SGD(parallel.parameters(), lr=0.1), images(8).split(2)[rank::RANKS])
    torch.save(model.state_dict(), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_train_the_same_parameters_with_running_norms(tmp_path):
    first, second = run_ranks(__file__, RANKS, tmp_path)
    start = convert(net(), "running").model
    for name, parameter in start.named_parameters():
        assert torch.equal(first[name], second[name]), name
        assert not torch.equal(first[name], parameter), name


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))

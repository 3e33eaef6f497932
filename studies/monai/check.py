"""Surgery on every network of MONAI: converted there and back, folded, exported.

    python studies/monai/check.py              # networks that results.jsonl does not have; then the table in README.md
    python studies/monai/check.py UNet VNet    # these again

`pip install -c constraints.txt -e ".[dev]"` brings what it needs. The networks are in `networks.py`.
"""

import argparse
import copy
import io
import logging
import platform
import re
import time
import warnings
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from networks import MISSING, NETWORKS, WITHOUT_BATCH_NORM
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves, tree_map

from normlab.files import write_whole
from normlab.nn import BatchNorm1d, BatchNorm2d, BatchNorm3d
from normlab.nn.running import RunningBatchNorm
from normlab.study.lines import LineStore
from normlab.surgery import Report, Row, convert, fold

STORE = LineStore(Path(__file__).parent / "results.jsonl")
TABLE = Path(__file__).parent / "README.md"
NORMS = {f"torch.nn.modules.{name}" for name in ("batchnorm", "instancenorm", "normalization")}
BATCH_NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)
TOLERANCE = 1e-5  # the largest difference, over the largest value
Inputs = tuple[Any, ...]
Figures = dict[str, Any]

INTRODUCTION = """
# Surgery on MONAI's networks

Does surgery hold on every network of MONAI? Made by `python studies/monai/check.py`. Each run is a line of
[results.jsonl](results.jsonl), with its versions.

The networks are small. They have batch norm where they can have it, and random γ, β and statistics. Each network goes
through these steps:

1. It is converted from torch's batch norm to `running`, to `batch`, to `running` and to `batch`.
2. All of that is undone.
3. The original is folded, exported, and run by ONNX Runtime.

A difference is the largest of any value, over the largest value of its output. The status is "ok" where all of this
holds:

- The state dict stays the same from first to last. Both outputs of `batch` are the same bit by bit. So are the outputs
  after `undo`.
- The outputs of `running`, of the folded network and of ONNX Runtime differ by 1e-5 at most.
- Every norm has its line in both reports.
- The outputs do depend on the statistics.
"""
HEAD = (
    "| network | | norms | converted | to another function | left | folded | not folded | fold | ONNX | status |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)
REASONS = ("| network | why |", "|---|---|")


def built(name: str, dims: int) -> tuple[nn.Module, Inputs]:
    """A network of the table after `settled`, and its inputs."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, inputs = network.build(dims), network.inputs(dims)
    return settled(model, inputs), inputs


def settled(model: nn.Module, inputs: Inputs) -> nn.Module:
    """The model in evaluation mode, with random γ and β, and random statistics around those of the inputs.

    Parameters that are all 0 become random too. Some last layers begin so, and would give nothing.
    """
    torch.manual_seed(1)
    averages = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    momenta = [module.momentum for module in averages]
    for module in model.modules():
        if is_norm(module) and getattr(module, "weight", None) is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    for module in averages:
        module.momentum = 1.0
    with torch.no_grad():
        model.train()(*fresh(inputs))
        for module, momentum in zip(averages, momenta, strict=True):
            module.momentum = momentum
            module.running_mean += 0.3 * module.running_var.sqrt() * torch.randn_like(module.running_mean)
            # With two values a channel, as in the last maps, some variances are next to nothing by chance.
            module.running_var += module.running_var.mean() * torch.empty_like(module.running_var).uniform_(0.5, 2)
    return model.eval()


def is_norm(module: nn.Module) -> bool:
    """Whether it is a norm. The package is not asked: it is tested for norms that it forgets."""
    classes = {kind.__module__ for kind in type(module).__mro__}
    return bool(classes & NORMS) or hasattr(module, "running_mean")


def fresh(inputs: Inputs) -> Inputs:
    """Copies: some networks write into what they are given."""
    return tree_map(lambda leaf: leaf.clone() if torch.is_tensor(leaf) else leaf, inputs)


def outputs(model: nn.Module, inputs: Inputs, seed: int = 2) -> list[Tensor]:
    """The outputs in evaluation mode. Networks that draw numbers get the same seed."""
    torch.manual_seed(seed)
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model.eval()(*fresh(inputs))) if torch.is_tensor(leaf)]


def difference(some: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference of any value, over the largest value of its tensor. NaN if there is one."""
    pairs = [(one.double(), other.double()) for one, other in zip(some, others, strict=True) if one.numel()]
    shares = [(one - other).abs().max() / one.abs().max().clamp(min=1e-30) for one, other in pairs]
    return torch.stack(shares).max().item()


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and same(list(one.values()), list(other.values()))


def unlisted(model: nn.Module, report: Report) -> list[str]:
    """The norms that have no line in the report."""
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if is_norm(module) and not any(names(row, {name}) for row in report)]


def names(row: Row, modules: set[str]) -> bool:
    """Whether a line is about one of these modules. A module used twice has both names in it, with a comma."""
    return any(f", {name}, " in f", {row.name}, " for name in modules)


def batch_norms(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)}


def check_conversion(model: nn.Module, inputs: Inputs) -> Figures:
    """From torch's batch norm to `running`, to `batch`, to `running`, to `batch`, and all of it undone.

    torch's kernel rounds differently. So torch's network and the converted one are compared by the difference of their
    outputs. `batch` is compared bit by bit with what comes back from `running`, and so is what `undo` restores. Norms
    of other kinds become other functions. Where there are some, they are converted for the report alone.
    """
    there, own = convert(model, "running"), batch_norms(model)
    report = there.report
    if not all(names(row, own) for row in report.touched):
        there = convert(model, "running", only=_BatchNorm)
    before, running = outputs(model, inputs), outputs(there.model, inputs)
    steps = [there, convert(there.model, "batch", only=RunningBatchNorm, inplace=True)]
    batch, state = outputs(there.model, inputs), copy.deepcopy(there.model.state_dict())
    steps.append(convert(there.model, "running", only=BATCH_NORMS, inplace=True))
    steps.append(convert(there.model, "batch", only=RunningBatchNorm, inplace=True))
    record = {
        "norms": sum(map(is_norm, model.modules())),
        "batch_norms": sum(isinstance(module, _BatchNorm) for module in model.modules()),
        "converted": len(there.report.touched),
        "other_functions": len(report.touched) - len(there.report.touched),
        "left": {row.name: f"{row.was} {row.note}" for row in report.skipped},
        "unlisted": unlisted(model, report) + unlisted(model, there.report),
        "running_difference": difference(before, running),
        "same_outputs": same(batch, outputs(there.model, inputs)),
        "same_state": all(same_state(state, other.state_dict()) for other in (model, there.model)),
    }
    for step in reversed(steps):
        step.undo()
    undone = same(before, outputs(there.model, inputs)) and same_state(model.state_dict(), there.model.state_dict())
    return record | {"undone": undone, "depends": depends(there.model, before, inputs)}


def depends(model: nn.Module, before: list[Tensor], inputs: Inputs) -> bool:
    """Whether the outputs change with the statistics; if not, nothing was tested. The statistics stay changed."""
    for name, part in model.named_buffers():
        if name.endswith("running_var"):
            part *= 2
    return not difference(before, outputs(model, inputs)) <= 100 * TOLERANCE


def check_fold(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Figures]:
    """The folded network, and its figures. Reasons are kept for batch norms alone."""
    folded, report = fold(model, *inputs)
    own = batch_norms(model)
    return folded, {
        "folded": len(report.touched),
        "not_folded": {row.name: row.note for row in report.skipped if names(row, own)},
        "unlisted_by_fold": unlisted(model, report),
        "fold_difference": difference(outputs(model, inputs), outputs(folded, inputs)),
    }


def check_onnx(folded: nn.Module, inputs: Inputs) -> Figures:
    """The difference of the folded network in ONNX Runtime, or the reason why there is none."""
    expected = outputs(folded, inputs)
    if not same(expected, outputs(folded, inputs, seed=3)):
        return {"onnx_difference": None, "no_onnx": "draws random numbers"}
    try:
        actual = in_onnx_runtime(folded, inputs)
    except Exception as error:  # what the exporter or the runtime says is the result
        return {"onnx_difference": None, "no_onnx": first_line(error)}
    return {"onnx_difference": difference(expected, actual)}


def in_onnx_runtime(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """The outputs of the network, exported and run by ONNX Runtime."""
    import onnxruntime

    model = model.eval()
    program = torch.onnx.export(model, fresh(inputs), dynamo=True, verbose=False)
    file = io.BytesIO()
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    tensors = [leaf.numpy() for leaf in tree_leaves(fresh(inputs)) if torch.is_tensor(leaf)]
    names = [one.name for one in session.get_inputs()]
    return [torch.from_numpy(y) for y in session.run(None, dict(zip(names, tensors, strict=True)))]


def first_line(error: BaseException) -> str:
    """The first cause of an error, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"


def check(name: str, dims: int, onnx: bool = True) -> Figures:
    """The figures of all checks for one network."""
    model, inputs = built(name, dims)
    record = check_conversion(model, inputs)
    folded, fold_record = check_fold(model, inputs)
    return record | fold_record | (check_onnx(folded, inputs) if onnx else {})


def below_the_bar(record: Figures) -> list[str]:
    """The names of what does not hold; README.md lists what should."""
    exact = [key for key in ("same_outputs", "same_state", "undone") if not record[key]]
    near = [key for key, value in record.items() if key.endswith("_difference") and not near_zero(value)]
    counts = ["converted"] if record["converted"] != record["batch_norms"] else []
    counts += ["depends"] if record["depends"] != (record["batch_norms"] > 0) else []
    lines = [key for key in ("unlisted", "unlisted_by_fold") if record[key]]
    return exact + near + counts + lines


def near_zero(value: float | None) -> bool:
    """Whether a difference is within the tolerance. None was not measured, and its reason is kept."""
    return value is None or value <= TOLERANCE


def kept(name: str, dims: int) -> Figures:
    """The record for results.jsonl."""
    start = time.perf_counter()
    record = check(name, dims)
    packages = {package: version(package) for package in ("torch", "monai", "onnxruntime")}
    return {
        "settings": {"network": name, "dims": dims},
        "status": ", ".join(below_the_bar(record)) or "ok",
        **record,
        "seconds": round(time.perf_counter() - start, 1),
        "versions": {"python": platform.python_version(), **packages},
    }


def table(records: list[Figures]) -> str:
    """The page in Markdown, sorted by name."""
    last = {(record["settings"]["network"], record["settings"]["dims"]): record for record in records}
    rows = [row(name, dims, last[name, dims]) for name, dims in sorted(last)]
    without = ["Without batch norm:", "", *REASONS, *listed(WITHOUT_BATCH_NORM)]
    missing = ["Not built:", "", *REASONS, *listed(MISSING)]
    return "\n".join([INTRODUCTION.strip(), "", *HEAD, *rows, "", *without, "", *missing, ""])


def listed(reasons: dict[str, str]) -> list[str]:
    return [f"| {name} | {why} |" for name, why in sorted(reasons.items())]


def row(name: str, dims: int, record: Figures) -> str:
    runtime = record["onnx_difference"]
    cells = [
        name,
        f"{dims}-D",
        record["norms"],
        record["converted"],
        record["other_functions"],
        reasons(record["left"]),
        record["folded"],
        reasons(record["not_folded"]),
        f"{record['fold_difference']:.0e}",
        record["no_onnx"] if runtime is None else f"{runtime:.0e}",
        record["status"],
    ]
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def reasons(notes: dict[str, str]) -> str:
    """How often each reason is given, without the names of layers."""
    plain = [
        re.sub(r": by .*", "", re.sub(r"\S+, the layer before it", "the layer before it", why))
        for why in notes.values()
    ]
    return "; ".join(f"{count}: {why}" for why, count in Counter(plain).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "networks", nargs="*", choices=[*NETWORKS, []], metavar="NETWORK", help="networks to check again"
    )
    chosen = parser.parse_args().networks
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")  # MONAI and torch's exporter warn about themselves
    done = {tuple(record["settings"].values()) for record in STORE.read(dict)}
    for name in chosen or NETWORKS:
        for dims in NETWORKS[name].dims:
            if chosen or (name, dims) not in done:
                record = kept(name, dims)
                STORE.append(record)
                print(f"{name} {dims}-D: {record['status']}, {record['seconds']} s", flush=True)
    write_whole(TABLE, table(STORE.read(dict)).encode())


if __name__ == "__main__":
    main()

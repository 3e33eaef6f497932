"""Compiles the Triton kernels, without a GPU, as the norms would launch them; prints the name and registers of each."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from checks import operators_in_python
from normlab.kernels import cpu, gpu, gpu_parts
from normlab.nn import BatchNorm2d, BatchRenorm2d, ChannelLayerNorm, GroupNorm, LayerNorm, RMSNorm, RunningBatchNorm2d

H100 = GPUTarget("cuda", 90, 32)
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SPARE = 32  # bytes a thread: what is done once, by a program alone, waits for memory and not for these few
done = set()


class Compiled:
    """In the place of a kernel: a launch compiles it for these arguments."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *arguments, num_warps=4, **constants):
        kernel, values = self.kernel, {**dict(zip(self.kernel.arg_names, arguments, strict=False)), **constants}
        fixed = {p.name: values[p.name] for p in kernel.params if p.is_constexpr or values[p.name] is None}
        types = {name: "constexpr" if name in fixed else type_of(values[name]) for name in kernel.arg_names}
        key = kernel.__name__, num_warps, *types.items(), *fixed.items()
        if key in done:
            return
        done.add(key)
        aligned = {(i,): [["tt.divisibility", 16]] for i, type in enumerate(types.values()) if type.startswith("*")}
        source = ASTSource(kernel, types, fixed, aligned)
        compiled = triton.compile(source, target=H100, options={"num_warps": num_warps})
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            found = subprocess.run([DUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", found).groups()
        print(kernel.__name__, registers, stack, fixed)
        spare = SPARE if kernel.__name__.startswith("finish_") else 0
        assert int(stack) <= spare, f"{kernel.__name__} overflows its registers by {stack} bytes a thread"


def type_of(value):
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def norms(channels):
    return [
        BatchNorm2d(channels, activation="relu"),
        BatchNorm2d(channels).eval(),
        RunningBatchNorm2d(channels, activation="relu"),
        RunningBatchNorm2d(channels, step_bound=None),
        BatchRenorm2d(channels),
        GroupNorm(channels, 8, activation="relu"),
        ChannelLayerNorm(channels),
        RMSNorm(channels),
    ]


def norms_without_parameters(channels):
    return [
        BatchNorm2d(channels, affine=False, activation="relu"),
        BatchNorm2d(channels, affine=False).eval(),
        RunningBatchNorm2d(channels, affine=False),
        LayerNorm(channels, affine=False),
        ChannelLayerNorm(channels, affine=False),
        RMSNorm(channels, affine=False),
    ]


def main():
    for module in (gpu.kernels, gpu.gpu_running):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and not name.startswith("_") and not hasattr(gpu_parts, name):
                setattr(module, name, Compiled(value))
    with patch.multiple(cpu, run=gpu.run, kernels=object()), operators_in_python():
        for shape, dtype, made in (
            ((2, 64, 56, 56), torch.float32, norms),
            ((32, 2048, 7, 7), torch.float16, norms),
            ((2, 8, 2, 2), torch.bfloat16, norms_without_parameters),
        ):
            for layout in (torch.contiguous_format, torch.channels_last):
                x = torch.randn(shape, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
                for norm in made(shape[1]):
                    norm(x).backward(torch.randn_like(x))
                    if hasattr(norm, "activation") and not isinstance(norm, GroupNorm):
                        norm(x, residual=x).sum().backward()


if __name__ == "__main__":
    main()

"""The norms' operators, each with a gradient of its own; no layers.

- `plain`: in torch's operators, the reference; `running`: the rule of running batch norm, its constants and its state.
- `policy`: when the kernels are used; `autograd`: the norms by the kernels, which layers call.
- `library`: the kernels as operators of `torch.library`; `launch`: one pass of a kernel.
- `cpu`: the compiled kernels of `csrc`; `gpu`: launches of Triton's, which are in `gpu_kernels`, `gpu_running`,
  `gpu_parts`.
"""

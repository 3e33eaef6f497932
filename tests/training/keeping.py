"""The norms that keep statistics, as the tests of training build them."""

from torch import nn

from normlab.nn import NORMS, build_norm

MOMENTUM = 0.1
KEEPING = [name for name in NORMS if any("running" in part for part, _ in build_norm(name, 8).named_buffers())]


def norm_of(name: str, channels: int, dims: int) -> nn.Module:
    """A norm that moves by a tenth; a ghost batch is one image."""
    momentum = {} if name == "frozen" else {"momentum": MOMENTUM}
    ghosts = {"virtual_batch_size": 1} if name == "ghost" else {}
    return build_norm(name, channels, dims, **momentum, **ghosts)

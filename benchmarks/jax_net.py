"""The lesson's net with batch norm in JAX, its training step jitted: the peer of compiled loops."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp

WIDTHS = (1, 8, 16, 32, 64, 64)
EPS, MOMENTUM = 1e-5, 0.1


def init(seed: int) -> tuple[Any, Any]:
    """Parameters and running statistics."""
    keys = jax.random.split(jax.random.PRNGKey(seed), len(WIDTHS))
    blocks, statistics = [], []
    for i, (before, width) in enumerate(pairwise(WIDTHS)):
        size = 5 if i == 0 else 3
        scale = (2 / (before * size * size)) ** 0.5
        kernel = scale * jax.random.normal(keys[i], (width, before, size, size))
        blocks.append((kernel, jnp.ones(width), jnp.zeros(width)))
        statistics.append((jnp.zeros(width), jnp.ones(width)))
    head = (0.1 * jax.random.normal(keys[-1], (WIDTHS[-1], 10)), jnp.zeros(10))
    return (blocks, head), statistics


def batch_norm(parameters, statistics, x):
    """The output, and the running statistics with this batch in them; channels are the second dimension."""
    (gamma, beta), (running_mean, running_var) = parameters, statistics
    dims, along = (0, *range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    mean, var = x.mean(dims), x.var(dims)
    n = x.size / x.shape[1]
    unbiased = var * n / max(n - 1, 1)
    new = running_mean + MOMENTUM * (mean - running_mean), running_var + MOMENTUM * (unbiased - running_var)
    scale = jax.lax.rsqrt(var + EPS) * gamma
    return (x - mean.reshape(along)) * scale.reshape(along) + beta.reshape(along), new


def loss_func(parameters, statistics, x, y):
    """Mean cross-entropy, and the running statistics."""
    blocks, (weight, bias) = parameters
    new = []
    for (kernel, *of_norm), known in zip(blocks, statistics, strict=True):
        pad = kernel.shape[-1] // 2
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), [(pad, pad)] * 2, dimension_numbers=("NCHW", "OIHW", "NCHW")
        )
        x, known = batch_norm(of_norm, known, jax.nn.relu(x))
        new.append(known)
    logits = jax.nn.log_softmax(x.mean((2, 3)) @ weight + bias)
    return -jnp.take_along_axis(logits, y[:, None], 1).mean(), new


@partial(jax.jit, donate_argnums=(0, 1))
def step(parameters, statistics, x, y, lr):
    """One of plain gradient descent."""
    (loss, statistics), gradients = jax.value_and_grad(loss_func, has_aux=True)(parameters, statistics, x, y)
    return jax.tree.map(lambda p, g: p - lr * g, parameters, gradients), statistics, loss


def make_loop(lr: float) -> Callable[[Iterable[Any]], None]:
    """A loop over batches of torch tensors, that goes on with what it has learnt."""
    parameters, statistics = init(0)

    def loop(batches: Iterable[Any]) -> None:
        nonlocal parameters, statistics
        loss = None
        for x, y in batches:
            parameters, statistics, loss = step(parameters, statistics, x.numpy(), y.numpy(), lr)
        jax.block_until_ready(loss)

    return loop

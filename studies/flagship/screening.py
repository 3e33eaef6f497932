"""Screens rules for running batch norm, four times as fast as training them in torch: the lesson's net in JAX.

    pip install jax && python studies/flagship/screening.py --rates 0.02 0.02 --bound measured 0.0125 --batch 2 \
        --schedule one-cycle --lrs 0.05 0.2 1 --seeds 0 1

One epoch of MNIST, plain SGD, every (learning rate, seed) at once, one thread. Prints, and appends to
`screening.jsonl`, the validation accuracy of each run, three times: with the running statistics; with statistics of
2,000 training images by the final weights, which tells what lag and noise of the running ones cost; and with averages
over about 1,000 batches. What it finds is confirmed in torch before it counts: rounding alone moves a run at a high
constant learning rate by half a point.
"""

import argparse
import itertools
import json
import os
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import jax
import jax.numpy as jnp
import numpy as np

from normlab.data import load_dataset

WIDTHS = (1, 8, 16, 32, 64, 64)
EPS = 1e-5


class Rule(NamedTuple):
    """What is screened; the arguments of the command line say what each is."""

    norm: str
    rates: tuple[float, float]
    start: tuple[float, float]
    disagreement: float
    bound: str
    bound_value: float


class State(NamedTuple):
    """Running statistics of a layer: mean, variance, batches seen, and the slow averages."""

    mean: jax.Array
    var: jax.Array
    batches: jax.Array
    slow_mean: jax.Array
    slow_var: jax.Array


def initial_parameters(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    parameters = {}
    for i, (ni, no) in enumerate(itertools.pairwise(WIDTHS)):
        fan = ni * (25 if i == 0 else 9)
        parameters[f"conv{i}"] = rng.normal(0, np.sqrt(2 / 1.01 / fan), (fan, no))
        parameters[f"weight{i}"], parameters[f"bias{i}"] = np.ones(no), np.zeros(no)
    parameters["linear"], parameters["shift"] = rng.uniform(-1 / 8, 1 / 8, (64, 10)), rng.uniform(-1 / 8, 1 / 8, 10)
    return {name: value.astype("f") for name, value in parameters.items()}


def convolve(x, weight, kernel):
    """Stride 2, padding of half the kernel, as one matrix product: much faster here than XLA's convolution."""
    pad = kernel // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    n, height, _, channels = x.shape
    out = (height - kernel) // 2 + 1
    shifts = [x[:, i : i + 2 * out - 1 : 2, j : j + 2 * out - 1 : 2] for i in range(kernel) for j in range(kernel)]
    columns = jnp.concatenate(shifts, -1).reshape(n * out * out, kernel * kernel * channels)
    return (columns @ weight).reshape(n, out, out, -1)


def forward(parameters, states, memories, x, rule: Rule, lr, mode: str):
    """Scores, and the statistics after this batch (`train`), or of this batch alone (`measure`)."""
    new = []
    for i, (state, memory) in enumerate(zip(states, memories, strict=True)):
        x = jax.nn.relu(convolve(x, parameters[f"conv{i}"], 5 if i == 0 else 3))
        weight, bias = parameters[f"weight{i}"], parameters[f"bias{i}"]
        if rule.norm == "group":
            x = group_norm(x, weight, bias)
            new.append(state)
            continue
        if mode != "evaluate":
            state = updated(state, x, rule, mode)
        new.append(state)
        x = normalize(x, weight, bias, state.mean, state.var, memory, lr, rule) if mode == "train" else (
            (x - state.mean) * jax.lax.rsqrt(state.var + EPS) * weight + bias
        )  # fmt: skip
    return x.mean((1, 2)) @ parameters["linear"] + parameters["shift"], new


def group_norm(x, weight, bias):
    n, height, width, channels = x.shape
    groups = x.reshape(n, height * width, 8, channels // 8)
    mean, var = groups.mean((1, 3), keepdims=True), groups.var((1, 3), keepdims=True)
    return ((groups - mean) * jax.lax.rsqrt(var + EPS)).reshape(x.shape) * weight + bias


def updated(state: State, x, rule: Rule, mode: str) -> State:
    mean, var = (jax.lax.stop_gradient(part) for part in (x.mean((0, 1, 2)), x.var((0, 1, 2))))
    t = state.batches + 1
    rate = jnp.minimum(1, jnp.maximum(rule.rates[0], rule.start[0] * t ** -rule.start[1]))
    distance = mean - state.mean
    square = jnp.minimum(16, (var + distance**2) / (state.var + EPS)).mean()
    catch_up = (square / rule.disagreement - 1) / jnp.maximum(square - 1, rule.disagreement - 1)
    share = jnp.where((t == 1) | (mode == "measure"), 1.0, jnp.maximum(rate, catch_up))
    slow = jnp.maximum(0.001, 1 / t)
    far = mean - state.slow_mean
    return State(
        state.mean + share * distance,
        (1 - share) * state.var + share * var + share * (1 - share) * distance**2,
        t,
        state.slow_mean + slow * far,
        (1 - slow) * state.slow_var + slow * var + slow * (1 - slow) * far**2,
    )


def normalize(x, weight, bias, mean, var, memory, lr, rule: Rule):
    """The forward pass; the new memory comes out as the "gradient" of the old one."""

    @jax.custom_vjp
    def norm(x, weight, bias, memory):
        return (x - mean) * jax.lax.rsqrt(var + EPS) * weight + bias

    def run(x, weight, bias, memory):
        return norm(x, weight, bias, memory), (x, weight, bias, memory)

    def backward(saved, grad):
        x, weight, bias, (average_grad, average_slope, t) = saved
        inverse = jax.lax.rsqrt(var + EPS)
        x_hat = (x - mean) * inverse
        norms = jnp.sqrt((grad**2).sum((1, 2, 3)))
        limit = {
            "none": jnp.inf,
            "absolute": rule.bound_value,
            "measured": rule.bound_value * jnp.sqrt((weight**2).sum() + (bias**2).sum()) / (lr + 1e-6),
        }[rule.bound]
        grad = grad * jnp.minimum(1, limit / (norms + 1e-20))[:, None, None, None]
        grad_bias, grad_weight = grad.sum((0, 1, 2)), (grad * x_hat).sum((0, 1, 2))
        n = x.size / x.shape[-1]
        rate = jnp.minimum(1, jnp.maximum(rule.rates[1], rule.start[0] * (t + 1) ** -rule.start[1]))
        rate = jnp.where(t == 0, 1.0, rate)
        average_grad += rate * (grad_bias / n - average_grad)
        average_slope += rate * (grad_weight / n - average_slope)
        grad_x = inverse * weight * (grad - average_grad - x_hat * average_slope)
        return grad_x, grad_weight, grad_bias, (average_grad, average_slope, t + 1)

    norm.defvjp(run, backward)
    return norm(x, weight, bias, memory)


def schedule(name: str, position, lr):
    if name == "constant":
        return lr
    up = lr / 10 + (1 - jnp.cos(jnp.pi * position / 0.25)) * (lr - lr / 10) / 2
    down = lr * (1 + jnp.cos(jnp.pi * (position - 0.25) / 0.75)) / 2
    return jnp.where(position < 0.25, up, down)


def train(rule: Rule, data, batch: int, schedule_name: str, clip: float, parameters, order, lr):
    """One epoch; three validation accuracies."""
    x_train, y_train, x_valid, y_valid = data
    steps = len(x_train) // batch
    states = [State(jnp.zeros(c), jnp.ones(c), jnp.zeros(()), jnp.zeros(c), jnp.ones(c)) for c in WIDTHS[1:]]
    memories = [(jnp.zeros(c), jnp.zeros(c), jnp.zeros(())) for c in WIDTHS[1:]]

    def loss(parameters, memories, states, x, y, rate):
        scores, states = forward(parameters, states, memories, x, rule, rate, "train")
        return -jax.nn.log_softmax(scores)[jnp.arange(len(y)), y].mean(), states

    def step(carry, t):
        parameters, memories, states = carry
        chosen = jax.lax.dynamic_slice(order, (t * batch,), (batch,))
        rate = schedule(schedule_name, t / steps, lr)
        gradient = jax.value_and_grad(loss, (0, 1), has_aux=True)
        (_, states), (grads, memories) = gradient(parameters, memories, states, x_train[chosen], y_train[chosen], rate)
        size = jnp.sqrt(sum((g * g).sum() for g in grads.values()))
        scale = jnp.minimum(1, clip / (size + 1e-6))
        return ({k: v - rate * scale * grads[k] for k, v in parameters.items()}, memories, states), None

    (parameters, memories, states), _ = jax.lax.scan(step, (parameters, memories, states), jnp.arange(steps))

    def accuracy(states):
        def right(i):
            x, y = (jax.lax.dynamic_slice_in_dim(part, i * 100, 100) for part in (x_valid, y_valid))
            return (forward(parameters, states, memories, x, rule, lr, "evaluate")[0].argmax(1) == y).sum()

        return jax.lax.map(right, jnp.arange(len(x_valid) // 100)).sum() / len(x_valid)

    measured = forward(parameters, states, memories, x_train[:2000], rule, lr, "measure")[1]
    slow = [state._replace(mean=state.slow_mean, var=state.slow_var) for state in states]
    return jnp.stack([accuracy(states), accuracy(measured), accuracy(slow)])


def images():
    data = load_dataset("mnist")
    mean, deviation = data.x_train.mean(), data.x_train.std()
    x_train, x_valid = (((x - mean) / deviation).permute(0, 2, 3, 1).numpy() for x in (data.x_train, data.x_valid))
    return tuple(jnp.array(part) for part in (x_train, data.y_train.numpy(), x_valid, data.y_valid.numpy()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--norm", choices=["running", "group"], default="running")
    parser.add_argument("--rates", type=float, nargs=2, default=(0.02, 0.02), help="smallest, forward and backward")
    parser.add_argument("--start", type=float, nargs=2, default=(1.0, 1.0), help="c, p: rates begin as c / t^p")
    parser.add_argument("--disagreement", type=float, default=1.5, help="mean square that widens the share")
    parser.add_argument(
        "--bound", nargs=2, default=("measured", "0.0125"), help="none|absolute|measured, and its value"
    )
    parser.add_argument("--clip", type=float, default=float("inf"), help="of the global norm of the gradient")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--schedule", choices=["constant", "one-cycle"], default="one-cycle")
    parser.add_argument("--lrs", type=float, nargs="+", default=[0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    a = parser.parse_args()
    rule = Rule(a.norm, tuple(a.rates), tuple(a.start), a.disagreement, a.bound[0], float(a.bound[1]))
    data, runs, began = images(), [(lr, seed) for lr in a.lrs for seed in a.seeds], time.time()
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *(initial_parameters(seed) for _, seed in runs))
    orders = jnp.stack([jnp.array(np.random.default_rng(100 + seed).permutation(len(data[0]))) for _, seed in runs])
    one = jax.vmap(lambda p, o, lr: train(rule, data, a.batch, a.schedule, a.clip, p, o, lr))
    found = np.array(jax.jit(one)(stacked, orders, jnp.array([lr for lr, _ in runs])))
    with open(Path(__file__).with_name("screening.jsonl"), "a") as file:
        for (lr, seed), accuracies in zip(runs, found.round(4).tolist(), strict=True):
            settings = {**rule._asdict(), "clip": a.clip if np.isfinite(a.clip) else None, "batch": a.batch}
            row = {**settings, "schedule": a.schedule, "lr": lr, "seed": seed, "accuracies": accuracies}
            file.write(json.dumps(row) + "\n")
            print(lr, seed, accuracies)
    print(f"{time.time() - began:.0f} s")


if __name__ == "__main__":
    main()

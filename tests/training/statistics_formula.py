"""What the norms of `keeping` hold after some batches, written out for float64, apart from the package."""

from collections.abc import Callable

import torch
from keeping import MOMENTUM
from torch import Tensor, nn

import reference
from running_formula import Formula

EPS = 1e-5
Statistics = dict[str, Tensor]


def statistics(name: str, batches: list[Tensor]) -> Statistics:
    """The buffers after these batches, one by one; an empty one tells nothing."""
    batches = [x.double() for x in batches if len(x)]
    counted = 0 if name == "frozen" else len(batches)
    return {**FORMULAS[name](batches), "num_batches_tracked": torch.tensor(counted)}


def averaged(states: list[Statistics], decay: float) -> Statistics:
    """Their exponential moving average, from the first; of whole numbers the last."""
    mean = states[0]
    for state in states[1:]:
        mean = {name: decay * mean[name] + (1 - decay) * part for name, part in state.items()}
    return {name: mean[name] if part.is_floating_point() else part for name, part in states[-1].items()}


def assert_kept(found: nn.Module | Statistics, expected: Statistics) -> None:
    """That buffers are these, to the rounding of float32."""
    buffers = found if isinstance(found, dict) else dict(found.named_buffers())
    wide = {name: buffers[name].double() for name in expected}
    expected = {name: part.double() for name, part in expected.items()}
    torch.testing.assert_close(wide, expected, rtol=1e-5, atol=1e-6)


def _fresh(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    channels = batches[0].shape[1]
    return torch.zeros(channels).double(), torch.ones(channels).double()


def _moments(x: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    values = x.transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1, correction=int(unbiased))


def _moved(before: Tensor, new: Tensor) -> Tensor:
    return (1 - MOMENTUM) * before + MOMENTUM * new


def _batch(batches: list[Tensor]) -> Statistics:
    mean, var = _fresh(batches)
    for x in batches:
        m, v = _moments(x, unbiased=True)
        mean, var = _moved(mean, m), _moved(var, v)
    return {"running_mean": mean, "running_var": var}


def _ghost(batches: list[Tensor]) -> Statistics:
    return _batch([image[None] for x in batches for image in x])


def _evonorm(batches: list[Tensor]) -> Statistics:
    return {"running_var": _batch(batches)["running_var"]}


def _renorm(batches: list[Tensor]) -> Statistics:
    mean, var = _fresh(batches)
    std = (var + EPS).sqrt()
    for x in batches:
        m, v = _moments(x, unbiased=False)
        mean, std = _moved(mean, m), _moved(std, (v + EPS).sqrt())
    return {"running_mean": mean, "running_var": std**2 - EPS}


def _mabn(batches: list[Tensor]) -> Statistics:
    mean, square = _fresh(batches)
    for x in batches:
        square = _moved(square, _moments(x**2, unbiased=False)[0])
    return {"running_mean": mean, "running_var": square}


def _online(batches: list[Tensor]) -> Statistics:
    mean, var = _fresh(batches)
    for image in torch.cat(batches):
        m, v = _moments(image[None], unbiased=False)
        var = _moved(var, v) + MOMENTUM * (1 - MOMENTUM) * (m - mean) ** 2
        mean = _moved(mean, m)
    return {"running_mean": mean, "running_var": var}


def _lesson(batches: list[Tensor]) -> Statistics:
    channels = batches[0].shape[1]
    norm = reference.LessonRunningBatchNorm(channels, MOMENTUM, EPS)
    for x in batches:
        norm(True, x, torch.ones(channels).double(), torch.zeros(channels).double())
    mean, var = norm.sums.moments()
    kept = {"running_mean": mean, "running_var": var, "count": norm.sums.c}
    return {**kept, "num_samples_tracked": torch.tensor(norm.seen)}


def _running(batches: list[Tensor]) -> Statistics:
    mean, var = _fresh(batches)
    formula = Formula(len(mean), MOMENTUM, EPS, None)
    for x in batches:
        formula.step(x, torch.zeros_like(x), var, mean)  # a weight of ones, a bias of zeros
    return dict(zip(("running_mean", "running_var"), formula.running, strict=True))


def _constant(batches: list[Tensor]) -> Statistics:
    return dict(zip(("running_mean", "running_var"), _fresh(batches), strict=True))


FORMULAS: dict[str, Callable[[list[Tensor]], Statistics]] = {
    "running": _running,
    "running_instance": _running,
    "running_lesson": _lesson,
    "mabn": _mabn,
    "online": _online,
    "renorm": _renorm,
    "batch": _batch,
    "sync": _batch,
    "ghost": _ghost,
    "frozen": _constant,
    "switchable": _batch,
    "evonorm_b0": _evonorm,
}

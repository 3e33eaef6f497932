"""What can be wrong with a model's norms: how each fault shows in their figures, what it does, and what helps."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from .layer import Layer

FAR = 0.5  # deviations
INDEPENDENT = 1.2  # over √n: by how many a batch norm of n independent values differs from one of all images
SETTLED = 0.05  # share of a batch: the statistics reach back over twenty and more
MOVES_AWAY = 2.0  # radians that a weight turns while statistics are renewed: they are then of another net
VERY_FAR = 2.0  # a few channels that seldom speak are easily as far off as FAR, and do no harm
RECALIBRATE = "normlab.recalibrate(model, batches)"
Judge: TypeAlias = Callable[[Layer], float | None]


class Fault(NamedTuple):
    """A fault that a norm can have.

    Attributes:
        name: in a few words.
        effect: gives how bad it is in a norm, 0 to ∞: about the deviations that its output is off, or the share of its
            channels. None or 0 says that the norm has it not.
        verdict: what it does, with the figures of the worst norm.
        remedy: what helps.
        command: Python that does so, or the first step.
    """

    name: str
    effect: Judge
    verdict: str
    remedy: str
    command: str


def when(condition: bool, effect: float | None) -> float | None:
    """The effect under a condition."""
    return effect if condition else None


def above(value: float | None, bound: float) -> float | None:
    """The value, if it is above the bound."""
    return value if value is not None and value > bound else None


def _least_noise(layer: Layer) -> float | None:
    """The noise of a batch. If only one was given, that of as many independent values: neighbours have more."""
    if layer.noise is not None or layer.values is None:
        return layer.noise
    return INDEPENDENT / layer.values**0.5


def _noisy(layer: Layer) -> float | None:
    noisy = above(_least_noise(layer), FAR) is not None and above(layer.typical_gap, FAR) is not None
    return when(noisy and not layer.single, layer.gap)


def _stale(layer: Layer) -> float | None:
    usable = layer.finite_statistics and not layer.untouched and _settled_too_early(layer) is None
    if layer.noise is None and (layer.offset or 0.0) < 2 * (_least_noise(layer) or 0.0):
        return None  # so far off is one batch by chance
    most = above(layer.typical_offset, FAR / 2) is not None
    return when(usable, above(layer.offset, FAR if most else VERY_FAR))


def _few_updates(layer: Layer) -> bool:
    """Whether they explain the offset."""
    if layer.untouched or layer.offset is None or layer.unbiased_offset is None or layer.still_initial is None:
        return False
    return layer.still_initial > 0.2 and layer.unbiased_offset < layer.offset / 2


def _settled_too_early(layer: Layer) -> float | None:
    """Statistics in which a batch has next to no share, far from what is given: they hold the training back."""
    if layer.share is None or layer.share > SETTLED or not layer.finite_statistics:
        return None
    return above(layer.lag, FAR)  # of sound nets it is up to 0.4


def _jumping(layer: Layer) -> float | None:
    """The noise that an average with this momentum keeps."""
    if layer.momentum is None or layer.noise is None or layer.values is None:
        return None
    kept = layer.noise * (layer.momentum / (2 - layer.momentum)) ** 0.5
    return when(layer.momentum > 0.2, above(kept, 0.15))


FAULTS = (
    Fault(
        "given inf or NaN",
        lambda layer: when(not layer.finite_inputs, float("inf")),
        "What reaches {name} is infinite or NaN: what stands before it has failed already.",
        "Look at the layers and the images before the first of these norms; in half precision, at overflow.",
        "with normlab.observe.ActivationStats(model, every=1) as stats: model.train()(images); print(stats.not_finite)",
    ),
    Fault(
        "parameters not finite",
        lambda layer: when(not layer.finite_parameters, float("inf")),
        "γ or β of {name} is infinite or NaN.",
        "Go back to an earlier checkpoint; lower the learning rate or clip the gradient.",
        "torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)",
    ),
    Fault(
        "statistics not finite",
        lambda layer: when(not layer.finite_statistics, float("inf")),
        "Running statistics of {name} are infinite, NaN or negative: training does not use them, evaluation fails.",
        "Measure them anew, and use a norm that a spoilt batch does not reach.",
        RECALIBRATE,
    ),
    Fault(
        "single value",
        lambda layer: when(layer.single, float("inf")),
        "A batch has one value a channel at {name}: there is no deviation of one, and torch refuses to train.",
        "Use a norm that takes any batch.",
        'model = normlab.convert(model, "running").model',
    ),
    Fault(
        "statistics never updated",
        lambda layer: when(layer.untouched, above(layer.offset, 0.1)),
        "Running statistics of {name} are still those it was made with, 0 and 1; what it is given is {offset:.2g} "
        "deviations from them.",
        "Load the statistics with the weights, or measure them.",
        RECALIBRATE,
    ),
    Fault(
        "too few updates",
        lambda layer: when(_few_updates(layer), _stale(layer)),
        "With {updates} updates at momentum {momentum:g}, {still_initial:.0%} of the running statistics of {name} "
        "are the 0 and 1 it was made with: they are {offset:.2g} deviations off.",
        "Measure them, or train longer, or with a larger momentum.",
        RECALIBRATE,
    ),
    Fault(
        "running statistics off",
        lambda layer: when(not _few_updates(layer), _stale(layer)),
        "Running statistics of {name} are {offset:.2g} deviations from what it is given in evaluation: they were "
        "gathered on other images, with other weights or, of channels that seldom speak, over too few values. "
        "(First is {first}: what comes after it is given something else too.)",
        "See that images are prepared as in training; then measure the statistics anew.",
        RECALIBRATE,
    ),
    Fault(
        "settled too early",
        _settled_too_early,
        "A batch has a share of {share:.2g} in the statistics of {name}, by which it trains, while what it is given is "
        "{lag:.2g} deviations from them: they follow too slowly, and the net may never learn.",
        "Let the statistics begin anew; if images are prepared in another way than before, mend that first.",
        "for m in model.modules(): getattr(m, 'reset_running_stats', lambda: None)()",
    ),
    Fault(
        "settled for moving weights",
        lambda layer: when((layer.share or 1) <= SETTLED, above(layer.unsettled, MOVES_AWAY)),
        "The statistics of {name} were loaded as settled, with a share of {share:.2g} for a batch, but the weight "
        "before it turns by {turn:.2g} radians a step: by {unsettled:.2g} before they are renewed.",
        "Let the statistics begin anew when converting in the middle of a training, or lower the learning rate.",
        "for m in model.modules(): getattr(m, 'reset_running_stats', lambda: None)()",
    ),
    Fault(
        "batch too small",
        _noisy,
        "With {values} values a channel, mean and deviation of a batch are noise at {name}: in training its output is "
        "{gap:.2g} deviations from that in evaluation.",
        "Use a norm that does not depend on the batch.",
        'model = normlab.convert(model, "running").model',
    ),
    Fault(
        "momentum too large",
        _jumping,
        "With momentum {momentum:g}, running statistics of {name} follow the last batch: they jump with its noise of "
        "{noise:.2g} deviations. (torch's momentum is the weight of the new batch, elsewhere it is that of the old.)",
        "Use a smaller momentum, or measure the statistics after training.",
        RECALIBRATE,
    ),
    Fault(
        "evaluates by the batch",
        lambda layer: when(layer.by_batch, max(layer.noise or 0.0, 0.01)),
        "{name} normalises by the batch in evaluation too, as it has no running statistics, or is held where "
        "model.eval() does not reach it: what it says of an image depends on the others, by {noise:.2g} deviations.",
        "Register it as a submodule, or use a norm with statistics of its own, and measure them.",
        'model = normlab.convert(model, "running").model; ' + RECALIBRATE,
    ),
    Fault(
        "constant channels",
        lambda layer: above(layer.constant, 0.05),
        "{constant:.0%} of the channels of {name} are nearly constant, with a variance below eps: they carry nothing, "
        "or eps swallows what they carry.",
        "Look for dead activations or vanishing weights before it; scale the images; use a smaller eps.",
        "with normlab.observe.ActivationStats(model, every=1) as stats: model.train()(images); print(stats.deviations)",
    ),
    Fault(
        "channels switched off",
        lambda layer: above(layer.off if layer.off != 1 else None, 0.1),
        "γ of {off:.0%} of the channels of {name} is nothing beside the others': they are off.",
        "Do not decay γ (weight_decay=0 for norms); prune what stays off.",
        "undecayed = [p for p in model.parameters() if p.dim() < 2]  # to be a group with weight_decay=0",
    ),
    Fault(
        "closed channels",
        lambda layer: above(layer.closed, 0.25),
        "{closed:.0%} of the channels of {name} are below 0 for all images: the rectifier after it lets nothing "
        "through, and no gradient back.",
        "Lower the learning rate, do not decay β, or use a leaky rectifier.",
        'optimizer.param_groups[0]["lr"] /= 10',
    ),
    Fault(
        "output constant",
        lambda layer: above(layer.silent, 0.05),
        "{silent:.0%} of the channels of {name} are the same for all images after it: it normalises away what they "
        "carry, as of a single value a group.",
        "Use a norm over more values: of the channels together, or over the batch.",
        'model = normlab.convert(model, "running").model; ' + RECALIBRATE,
    ),
    Fault(
        "frozen by halves",
        lambda layer: when(layer.half_frozen, max(layer.noise or 0.0, 0.01)),
        "γ and β of {name} do not learn, but its statistics move in training.",
        "Freeze the statistics too, or let all of it learn.",
        "model = normlab.freeze(model).model",
    ),
    Fault(
        "frozen by mode",
        lambda layer: when(layer.frozen_by_mode, max(layer.noise or 0.0, 0.01)),
        "{name} alone is in evaluation mode: the next model.train() unfreezes it.",
        "Freeze it for good.",
        "model = normlab.freeze(model).model",
    ),
    Fault(
        "shared by different inputs",
        lambda layer: above(layer.disagreement, FAR),
        "{name} is used several times in a pass, for what is {disagreement:.2g} deviations apart: its running "
        "statistics fit none of them.",
        "Give each use a norm of its own.",
        'model.another = copy.deepcopy(model.get_submodule("{name}"))',
    ),
    Fault(
        "statistics in half precision",
        lambda layer: when(layer.statistics_type is not None, 0.01),
        "Running statistics of {name} are {statistics_type}: small updates round to nothing, large ones overflow.",
        "Keep them in float32: normlab's norms do.",
        'model = normlab.convert(model, "batch").model',
    ),
    Fault(
        "not in the optimizer",
        lambda layer: when(layer.unlearned, 0.1),
        "γ or β of {name} is to learn, but the optimizer does not have it.",
        "Make the optimizer after surgery, or hand it to convert.",
        'normlab.convert(model, "running", inplace=True, optimizer=optimizer)',
    ),
    Fault(
        "turns too fast",
        lambda layer: above(layer.turn, 0.5),
        "A step of the optimizer turns the weight before {name} by {turn:.2g} radians: behind a norm a weight's "
        "length is nothing, so this is its learning rate.",
        "Lower the learning rate, or warm it up.",
        'optimizer.param_groups[0]["lr"] /= 10',
    ),
    Fault(
        "hardly turns",
        lambda layer: when(layer.turn is not None and 0 < layer.turn < 1e-6, 0.01),
        "A step of the optimizer turns the weight before {name} by {turn:.2g} radians: it has grown so long that it "
        "learns no more.",
        "Use weight decay on it, or a larger learning rate.",
        'optimizer.param_groups[0]["weight_decay"] = 5e-4',
    ),
)

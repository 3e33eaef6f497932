"""A norm, in figures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """A norm, in figures. A figure is None where it has no meaning or could not be measured.

    Attributes:
        name: its place in the model, or several with commas.
        kind: its class.
        channels: how many it has.
        values: how many a channel has in a batch, at the fewest.
        noise: how far mean and deviation of a batch are from those of all batches, in training, in deviations of the
            channel: √(mean of ((m − μ)/σ)² + (s/σ − 1)² over batches and channels).
        offset: how far what it is given in evaluation is from its running statistics, in deviations that those name,
            √(mean of ((μ − μ_run)/σ_run)² + (σ/σ_run − 1)²), beyond what the noise of as many batches, and of a moving
            average, leaves open.
        typical_offset: the median of the channels.
        unbiased_offset: of the statistics without the 0 and 1 that they began with, by their number of updates, from
            what it is given in training.
        gap: root mean square of the difference of its outputs in training and in evaluation, for the same input, over
            the deviation of that in training.
        typical_gap: the median of the channels.
        constant: share of channels whose variance is below eps.
        off: share of channels whose γ is below 1/1000 of the mean.
        closed: share of channels of which the activation after it lets nothing through.
        silent: share of channels that vary before the norm, and no longer after it.
        updates: how many batches its statistics have seen.
        momentum: the weight of a new batch in its statistics.
        still_initial: share of the initial values, 0 and 1, in the running statistics: (1 − momentum)^updates.
        untouched: its statistics are those it was made with.
        finite_statistics: none of them is infinite, NaN, or a variance below 0.
        finite_parameters: none of them is infinite or NaN.
        finite_inputs: none of what it was given is infinite or NaN.
        statistics_type: the type of its statistics, if that is of half precision.
        by_batch: what it puts out for an image in evaluation depends on the other images of the batch.
        single: a batch has a single value a channel, which it refuses in training.
        frozen_by_mode: it alone is in evaluation mode, which the next `model.train()` changes.
        half_frozen: γ and β do not learn, but the statistics move in training.
        disagreement: of its several uses in one pass, how far the means of what it is given are apart, in deviations.
        unlearned: γ or β is to learn, but the optimizer does not have it.
        turn: by which angle a step of the optimizer turns the weight before it, in radians: its length is nothing to
            the norm, so this is the effective learning rate. Of a step as of SGD, lr ‖g‖ / (1 − momentum) / ‖w‖; of an
            optimizer with betas, lr √n / ‖w‖ for n weights; of others None.
        share: of a batch in the statistics of a running norm, w.
        lag: the median over channels of how far those statistics are from what it is given in training, as `offset`.
        unsettled: of a running norm whose share is that of statistics just loaded, by which angle the weight before it
            turns while they are renewed, turn / share.
        contrast: the variance of the images' own means plus that of their own deviations, over that of all values, the
            mean of the channels: how much images differ in brightness and contrast. Of the first norm that is given
            maps of 64 values or more: further on, images differ by what they show.
        passed_by: it has running statistics and is no torch `_BatchNorm`, which others look for.
        unmeasured: why figures are missing, as its class is not known or its code failed; None if none are.
    """

    name: str
    kind: str
    channels: int | None = None
    values: int | None = None
    noise: float | None = None
    offset: float | None = None
    typical_offset: float | None = None
    unbiased_offset: float | None = None
    gap: float | None = None
    typical_gap: float | None = None
    constant: float | None = None
    off: float | None = None
    closed: float | None = None
    silent: float | None = None
    updates: int | None = None
    momentum: float | None = None
    still_initial: float | None = None
    untouched: bool = False
    finite_statistics: bool = True
    finite_parameters: bool = True
    finite_inputs: bool = True
    statistics_type: str | None = None
    by_batch: bool = False
    single: bool = False
    frozen_by_mode: bool = False
    half_frozen: bool = False
    disagreement: float | None = None
    unlearned: bool = False
    turn: float | None = None
    share: float | None = None
    lag: float | None = None
    unsettled: float | None = None
    contrast: float | None = None
    passed_by: bool = False
    unmeasured: str | None = None

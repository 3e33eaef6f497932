"""Schedules: their formulas at exact positions, and over all positions range, order and continuity."""

import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normlab.errors import InputError
from normlab.training.schedules import combine, constant, cosine, exponential, linear, one_cycle

POSITIONS = st.floats(0, 1)
RATES = st.floats(1e-6, 10)


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (linear(0.6, 2.0), {0: 0.6, 0.25: 0.95, 0.5: 1.3, 1: 2.0}),
        (linear(1.0, 0.2), {0: 1.0, 0.25: 0.8, 1: 0.2}),
        (cosine(1.0, 3.0), {0: 1.0, 1 / 3: 1.5, 0.5: 2.0, 2 / 3: 2.5, 1: 3.0}),
        (cosine(3.0, 1.0), {0: 3.0, 1 / 3: 2.5, 1: 1.0}),
        (constant(0.4, 9.0), {0: 0.4, 0.5: 0.4, 1: 0.4}),
        (constant(0.4), {0: 0.4, 1: 0.4}),
        (exponential(1.0, 0.01), {0: 1.0, 0.5: 0.1, 1: 0.01}),
        (exponential(1.0, 16.0), {0.25: 2.0, 0.5: 4.0, 0.75: 8.0}),
    ],
)
def test_formulas(schedule, values):
    assert {p: schedule(p) for p in values} == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("kind", [linear, cosine, exponential])
@given(start=RATES, end=RATES, positions=st.lists(POSITIONS, min_size=2, max_size=20))
def test_between_start_and_end_and_never_turning_back(kind, start, end, positions):
    schedule = kind(start, end)
    low, high = min(start, end), max(start, end)
    slack = 1e-9 * high
    values = [schedule(p) for p in sorted(positions)]
    assert all(low - slack <= value <= high + slack for value in values)
    steps = [(b - a) * math.copysign(1, end - start) for a, b in itertools.pairwise(values)]
    assert all(step >= -slack for step in steps)


@pytest.mark.parametrize(("start", "end", "named"), [(0.0, 1.0, "start"), (1.0, 0.0, "end"), (-1.0, 1.0, "start")])
def test_an_exponential_schedule_from_or_to_zero_is_refused(start, end, named):
    with pytest.raises(InputError, match=rf"{named}=-?\d.0 is not usable. Accepted: a number above 0"):
        exponential(start, end)


def test_combined_schedules_run_over_their_own_share():
    schedule = combine([0.3, 0.7], [linear(0.6, 2.0), linear(2.0, 0.1)])
    expected = {0: 0.6, 0.15: 1.3, 0.3: 2.0, 0.65: 1.05, 1: 0.1}
    assert {p: schedule(p) for p in expected} == pytest.approx(expected)


def test_the_next_schedule_begins_at_the_boundary():
    schedule = combine([0.25, 0.5, 0.25], [constant(1.0), constant(2.0), constant(3.0)])
    before = math.nextafter
    positions = [0, before(0.25, 0), 0.25, before(0.75, 0), 0.75, 1]
    assert [schedule(p) for p in positions] == [1, 1, 2, 2, 3, 3]


@st.composite
def shares(draw):
    parts = draw(st.lists(st.floats(0.01, 1), min_size=1, max_size=6))
    return [part / sum(parts) for part in parts]


@settings(deadline=None)  # of a busy machine
@given(shares(), st.data())
def test_a_combination_of_pieces_that_meet_is_continuous_and_in_range(shares, data):
    knots = data.draw(st.lists(RATES, min_size=len(shares) + 1, max_size=len(shares) + 1))
    kinds = data.draw(
        st.lists(st.sampled_from([linear, cosine, exponential]), min_size=len(shares), max_size=len(shares))
    )
    schedule = combine(shares, [kind(a, b) for kind, a, b in zip(kinds, knots, knots[1:], strict=False)])
    assert schedule(0) == pytest.approx(knots[0])
    assert schedule(1) == pytest.approx(knots[-1])
    for i in range(1, len(shares)):
        boundary = sum(shares[:i])
        for nearby in (boundary - 1e-12, boundary, boundary + 1e-12):
            assert schedule(nearby) == pytest.approx(knots[i], abs=1e-6)
    value = schedule(data.draw(POSITIONS))
    assert min(knots) * (1 - 1e-9) <= value <= max(knots) * (1 + 1e-9)


@given(shares())
def test_every_schedule_runs_from_0_to_1_over_its_share(shares):
    seen: list[list[float]] = [[] for _ in shares]

    def noting(which: int):
        return lambda p: seen[which].append(p) or float(which)

    schedule = combine(shares, [noting(i) for i in range(len(shares))])
    for i, share in enumerate(shares):
        begin = sum(shares[:i])
        for p in (0.25, 0.5, 0.75):
            assert schedule(begin + p * share) == i
        assert seen[i] == pytest.approx([0.25, 0.5, 0.75], abs=1e-6)
    assert schedule(1) == len(shares) - 1
    assert seen[-1][-1] == pytest.approx(1)


def test_empty_shares_are_passed_over():
    schedule = combine([0, 0.5, 0, 0.5, 0], [constant(float(i)) for i in range(5)])
    assert [schedule(p) for p in (0, 0.49, 0.5, 1)] == [1, 1, 3, 3]
    assert combine([0.0, 1.0], [linear(0, 9), linear(1, 2)])(0) == 1


def test_shares_that_only_rounding_keeps_from_1_are_taken():
    schedule = combine([0.1] * 10, [constant(float(i)) for i in range(10)])
    assert schedule(1) == 9
    assert combine(torch.tensor([0.3, 0.7]).tolist(), [constant(1.0), constant(2.0)])(1.0) == 2


@pytest.mark.parametrize(
    ("given_shares", "count", "message"),
    [
        ([0.5, 0.4], 2, r"shares=\[0.5, 0.4\] is not usable. Accepted: numbers that sum to 1"),
        ([1.5, -0.5], 2, "Accepted: numbers from 0"),
        ([1.0], 2, "Accepted: 2 numbers, one a schedule"),
        ([], 0, r"shares=\[\] is not usable"),
    ],
)
def test_shares_that_do_not_fit_are_refused(given_shares, count, message):
    with pytest.raises(InputError, match=message):
        combine(given_shares, [constant(1.0)] * count)


@pytest.mark.parametrize("position", [-0.01, 1.01, math.nan])
def test_a_position_outside_is_refused(position):
    with pytest.raises(InputError, match=r"position=.* is not usable. Accepted: a number from 0 to 1"):
        combine([1.0], [constant(1.0)])(position)


def test_one_cycle_goes_up_and_down():
    schedule = one_cycle(0.1, 1.0, 0.01, warm_up=0.4)
    expected = {0: 0.1, 0.2: 0.55, 0.4: 1.0, 0.7: 0.505, 1: 0.01}
    assert {p: schedule(p) for p in expected} == pytest.approx(expected)
    assert one_cycle(0.1, 1.0, 0.01)(0.25) == 1.0
    assert one_cycle(0.1, 1.0, 0.01, warm_up=0)(0) == 1.0


@pytest.mark.parametrize(
    "schedule", [linear(1, 2), cosine(1, 2), constant(1), exponential(1, 2), one_cycle(0.1, 1.0, 0.01)]
)
def test_a_schedule_can_be_sent_to_another_process(schedule):
    assert pickle.loads(pickle.dumps(schedule))(0.3) == schedule(0.3)

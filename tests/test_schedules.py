"""Schedules against the paper's formulas worked out by hand (2 ** (index / (count - 1)) - 1 to 12 digits)."""

import pytest

from lskip.schedules import Alternating, Constant, Exponential, Falling, Linear, Schedule

EXPONENTIAL = [
    (4, 0, 0.0),
    (4, 1, 0.259921049895),  # the cube root of 2, less 1
    (4, 2, 0.587401051968),
    (4, 3, 1.0),
    (32, 0, 0.0),
    (32, 15, 0.398490998423),
    (32, 31, 1.0),
    (5, 2, 0.414213562373),  # the square root of 2, less 1
]


@pytest.mark.parametrize(("count", "index", "expected"), EXPONENTIAL)
def test_exponential(count, index, expected):
    assert Exponential()(index, count) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("count", "index", "expected"), [(4, 0, 0.0), (4, 1, 1 / 3), (4, 3, 1.0), (32, 15, 15 / 31), (32, 31, 1.0)]
)
def test_linear(count, index, expected):
    assert Linear()(index, count) == pytest.approx(expected, abs=1e-15)


def test_constant_is_one_everywhere_and_needs_no_total():
    schedule = Constant()
    assert [schedule(0, 4), schedule(3, 4), schedule(0, 1), schedule(10**6, 0)] == [1.0] * 4
    assert not schedule.needs_total


@pytest.mark.parametrize(
    ("index", "expected"),
    # 11 steps, progress in tenths: 1 below 0.5, then down by 1/4 a step of 0.1
    [(0, 1.0), (4, 1.0), (5, 1.0), (6, 0.75), (7, 0.5), (8, 0.25), (9, 0.0), (10, 0.0)],
)
def test_falling(index, expected):
    assert Falling(plateau=0.5, decay=0.4)(index, 11) == pytest.approx(expected, abs=1e-12)


def test_falling_in_the_proportions_of_the_pull_request():
    # Its 1308 steps: 400 at the full rate, 100 down, 808 at full depth.
    schedule = Falling(400 / 1307, 100 / 1307)
    factors = [schedule(step, 1308) for step in range(1308)]
    assert factors[399] == 1 and factors[450] == pytest.approx(0.5) and factors[499] == pytest.approx(0.01)
    assert not any(factors[500:])


def test_falling_without_a_decay_or_a_plateau():
    assert [Falling(0.5, 0.0)(step, 5) for step in range(5)] == [1, 1, 0, 0, 0]
    assert [Falling(0.0, 1.0)(step, 5) for step in range(5)] == [1, 0.75, 0.5, 0.25, 0]
    assert [Falling(1.0, 0.0)(step, 3) for step in range(3)] == [1, 1, 0]
    assert [Falling(0.0, 0.0)(step, 3) for step in range(3)] == [0, 0, 0]
    assert Falling()(0, 1) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"plateau": -0.1}, "plateau: -0.1 is not a number from 0 to 1"),
        ({"decay": float("nan")}, "decay: nan"),
        ({"plateau": 0.7, "decay": 0.5}, "plateau: 0.7 and decay: 0.5 are together more"),
    ],
)
def test_falling_of_wrong_shares_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Falling(**arguments)


def test_alternating():
    # The pull request's 11 blocks skip 1, 3, 5, 7, 9; first and last run, also where the last is an odd one.
    assert [block for block in range(11) if Alternating()(block, 11)] == [1, 3, 5, 7, 9]
    assert [Alternating()(block, 4) for block in range(4)] == [0, 1, 0, 0]
    assert [Alternating()(0, 1), Alternating()(1, 2)] == [0, 0]


@pytest.mark.kind("M a new user's first hour", "M9")
@pytest.mark.parametrize("schedule", [Exponential(), Linear()])
def test_the_only_layer_or_step_is_the_first(schedule):
    """The formulas divide by zero there, and are 0 at the first of every larger number."""
    assert schedule(0, 1) == schedule(0, 2) == schedule(0, 1000) == 0.0


@pytest.mark.parametrize("schedule", [Exponential(), Linear()])
def test_none_at_all_is_refused(schedule):
    with pytest.raises(ValueError, match=f"{type(schedule).__name__} schedule: needs at least 1 .* not 0"):
        schedule(0, 0)
    assert schedule.needs_total


def test_a_schedule_of_ones_own_needs_the_total_unless_it_says_otherwise():
    assert Schedule.needs_total
    with pytest.raises(NotImplementedError):
        Schedule()(0, 4)

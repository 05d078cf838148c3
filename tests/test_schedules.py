"""Schedules against the paper's formulas worked out by hand (2 ** (index / (count - 1)) - 1 to 12 digits)."""

import pytest

from lskip.schedules import Constant, Exponential, Linear, Schedule

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

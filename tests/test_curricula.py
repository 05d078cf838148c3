"""The exits of each curriculum, against sets written by hand from the paper's conditions."""

import pytest

from lskip.curricula import AllExits, ChosenExits, ExitCurriculum, Gradual, LastExit, Rotational


def blocks_on(curriculum, step, total, num_layers):
    return {block for block, on in enumerate(curriculum.on(step, total, num_layers)) if on}


@pytest.mark.parametrize(
    ("num_layers", "period", "step", "expected"),
    [
        (4, 4, 0, {0, 3}),
        (4, 4, 1, {1, 3}),
        (4, 4, 2, {2, 3}),
        (4, 4, 3, {3}),
        (4, 4, 9, {1, 3}),
        (4, 2, 0, {0, 2, 3}),
        (4, 2, 1, {1, 3}),
        (4, 1, 7, {0, 1, 2, 3}),
        (4, 9, 4, {3}),  # a period longer than the model is deep: most steps train the last exit only
        (32, 8, 0, {0, 8, 16, 24, 31}),
        (32, 8, 5, {5, 13, 21, 29, 31}),
        (32, 8, 500, {4, 12, 20, 28, 31}),
        (32, 8, 999, {7, 15, 23, 31}),
    ],
)
def test_rotational(num_layers, period, step, expected):
    assert blocks_on(Rotational(period), step, 1000, num_layers) == expected


@pytest.mark.parametrize(
    ("num_layers", "total", "step", "expected"),
    [
        # L = 4, T = 16: exit 2 from step 2, exit 1 from step 4, exit 0 from step 6.
        (4, 16, 0, {3}),
        (4, 16, 1, {3}),
        (4, 16, 2, {2, 3}),
        (4, 16, 3, {2, 3}),
        (4, 16, 4, {1, 2, 3}),
        (4, 16, 5, {1, 2, 3}),
        (4, 16, 6, {0, 1, 2, 3}),
        (4, 16, 15, {0, 1, 2, 3}),
        # L = 4, T = 10: from 1.25, 2.5 and 3.75, which no step hits exactly.
        (4, 10, 1, {3}),
        (4, 10, 2, {2, 3}),
        (4, 10, 3, {1, 2, 3}),
        (4, 10, 4, {0, 1, 2, 3}),
        # L = 32, T = 640: exit l from step 10 (31 - l).
        (32, 640, 0, {31}),
        (32, 640, 9, {31}),
        (32, 640, 99, set(range(22, 32))),
        (32, 640, 100, set(range(21, 32))),
        (32, 640, 309, set(range(1, 32))),
        (32, 640, 310, set(range(32))),
        (32, 640, 320, set(range(32))),
        (32, 640, 639, set(range(32))),
        # No exit is late by a rounding: with T = 3, L = 3 exit 1 joins at exactly 0.5, exit 0 at exactly 1.
        (3, 3, 1, {0, 1, 2}),
    ],
)
def test_gradual(num_layers, total, step, expected):
    assert blocks_on(Gradual(), step, total, num_layers) == expected


@pytest.mark.parametrize("step", [0, 5, 999])
def test_all_and_last(step):
    assert blocks_on(AllExits(), step, 1000, 4) == {0, 1, 2, 3}
    assert blocks_on(LastExit(), step, 1000, 4) == {3}


@pytest.mark.parametrize("period", [0, -3])
def test_a_period_below_one_is_refused(period):
    with pytest.raises(ValueError, match=f"period: {period} "):
        Rotational(period)


def test_only_gradual_needs_to_know_the_number_of_steps():
    assert Gradual().needs_total
    assert not any(curriculum.needs_total for curriculum in (Rotational(8), AllExits(), LastExit()))


def test_a_curriculum_of_ones_own_decides_all_exits_but_the_last():
    class EvenSteps(ExitCurriculum):
        def is_on(self, step, total, block, num_layers):
            return step % 2 == 0

    assert blocks_on(EvenSteps(), 2, 10, 3) == {0, 1, 2}
    assert blocks_on(EvenSteps(), 3, 10, 3) == {2}


def test_chosen_exits_take_turns():
    steps = [blocks_on(ChosenExits([3, 2, 6]), step, 100, 8) for step in range(4)]
    assert steps == [{2, 7}, {1, 7}, {5, 7}, {2, 7}]


@pytest.mark.parametrize(
    ("exit_layers", "said"),
    [
        ([], r"exit_layers: \[\]"),
        ([1], "exit_layers: 1 "),
        ([2.5], "exit_layers: 2.5 "),
        ([2, 8], "exit_layers: 8 is not from 2 to 7"),
    ],
)
def test_exits_that_cannot_be_trained_are_refused_in_the_first_step(exit_layers, said):
    with pytest.raises(ValueError, match=said):
        ChosenExits(exit_layers).on(0, 100, 8)

"""The paper's equations (arXiv 2404.16710, sections 4.1 and 4.2), against numbers worked by hand.

Exponents of two by a pocket calculator: 2^(1/3) = 1.259921049895, 2^(2/3) = 1.587401051968,
2^(15/31) = 1.398490998423, 2^(1/2) = 1.414213562373, 2^(1/4) = 1.189207115003.
"""

import pytest

from lskip.callbacks import EarlyExitLoss, LayerDropout
from lskip.curricula import AllExits, Gradual, LastExit, Rotational
from lskip.losses import exit_scale, exit_weights
from lskip.schedules import Alternating, Constant, Exponential, Falling, Linear

CUBE_ROOT, CUBE_ROOT_SQUARED, MIDDLE_OF_32, ROOT = 0.259921049895, 0.587401051968, 0.398490998423, 0.414213562373


def close(values):
    return pytest.approx(values, abs=1e-11)


# p_{l,t} = S(t) D(l) p_max


@pytest.mark.parametrize("step", [0, 2, 4])
def test_drop_rates_4_layers_constant_over_time(step):
    rates = LayerDropout(p_max=0.2).drop_rates(step, 5, 4)
    assert rates == close([0, 0.2 * CUBE_ROOT, 0.2 * CUBE_ROOT_SQUARED, 0.2])


@pytest.mark.parametrize(("step", "now"), [(0, 0.0), (1, 0.189207115003), (2, ROOT), (4, 1.0)])
def test_drop_rates_4_layers_growing_over_5_steps(step, now):
    rates = LayerDropout(p_max=0.2, time=Exponential()).drop_rates(step, 5, 4)
    assert rates == close([0, 0.2 * now * CUBE_ROOT, 0.2 * now * CUBE_ROOT_SQUARED, 0.2 * now])


@pytest.mark.parametrize(("step", "now"), [(0, 0.0), (50, ROOT), (100, 1.0)])
def test_drop_rates_32_layers_growing_over_101_steps(step, now):
    rates = LayerDropout(p_max=0.1, time=Exponential()).drop_rates(step, 101, 32)
    assert len(rates) == 32
    assert [rates[0], rates[15], rates[31]] == close([0, 0.1 * now * MIDDLE_OF_32, 0.1 * now])


def test_drop_rates_of_the_other_schedules():
    assert LayerDropout(0.6, Linear(), Constant()).drop_rates(7, None, 4) == close([0, 0.2, 0.4, 0.6])
    assert LayerDropout(0.6, Constant(), Linear()).drop_rates(1, 5, 4) == close([0.15] * 4)
    assert LayerDropout(0.5, Constant()).drop_rates(0, None, 1) == [0.5]


def test_drop_rates_that_fall_over_alternating_blocks():
    dropout = LayerDropout(0.2, Alternating(), Falling(0.5, 0.25), scale_kept=True)
    # Step 5 of 9 is 0.625 of the way, in the middle of the decay.
    for step, rate in ((0, 0.2), (3, 0.2), (5, 0.1), (6, 0.0), (8, 0.0)):
        rates = dropout.drop_rates(step, 9, 5)
        assert rates == close([0, rate, 0, rate, 0])
        assert dropout.kept_scales(rates) == close([1, 1 / (1 - rate), 1, 1 / (1 - rate), 1])


def test_scales_of_kept_rows():
    assert LayerDropout(scale_kept=True).kept_scales([0.0, 0.2, 0.5, 1.0]) == close([1, 1.25, 2, 1])
    assert LayerDropout().kept_scales([0.0, 0.2, 0.5, 1.0]) == [1.0] * 4


# e(l), and its normalization over the exits that are on


def test_exit_scale():
    # L = 4, e_scale 0.2: 0.2 x (0, 1, 3), then 3 + 0.2 x (0 + 1 + 2).
    assert exit_scale(4, 0.2) == close([0, 0.2, 0.6, 3.6])
    # L = 32, e_scale 0.1: after 15 blocks more 0.1 x 120; then 31 + 0.1 x 465.
    scale = exit_scale(32, 0.1)
    assert [scale[0], scale[1], scale[15], scale[30], scale[31]] == close([0, 0.1, 12, 46.5, 77.5])
    assert exit_scale(2, 1.0) == close([0, 1])
    assert exit_scale(1, 0.5) == [1.0]


def test_exit_weights_with_all_exits_on():
    assert exit_weights(4, 0.2, [True] * 4) == close([0, 1 / 22, 3 / 22, 18 / 22])
    assert exit_weights(4, 1.0, [True] * 4) == close([0, 1 / 10, 3 / 10, 6 / 10])
    # L = 32: 0.1 x (0 + 1 + 3 + … + 465) = 0.1 x 4960; with the last 573.5.
    weights = exit_weights(32, 0.1, [True] * 32)
    assert [weights[0], weights[15], weights[30], weights[31]] == close([0, 24 / 1147, 3 / 37, 5 / 37])
    assert sum(weights) == close(1)


@pytest.mark.parametrize("step", [0, 500, 999])
def test_exit_weights_last_exit_only(step):
    assert EarlyExitLoss(0.2, LastExit()).exit_weights(step, 1000, 4) == [0, 0, 0, 1]
    assert EarlyExitLoss(0.0, AllExits()).exit_weights(step, 1000, 4) == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, [0, 0, 0, 1]),  # exits 0 and 3; the first weighs nothing
        (1, [0, 1 / 19, 0, 18 / 19]),  # 0.2 : 3.6
        (6, [0, 0, 1 / 7, 6 / 7]),  # 0.6 : 3.6
        (11, [0, 0, 0, 1]),
    ],
)
def test_exit_weights_4_layers_rotational(step, expected):
    assert EarlyExitLoss(0.2, Rotational(4)).exit_weights(step, 12, 4) == close(expected)


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # 0.1 x (0, 36, 136, 300) and 77.5: 124.7
        (0, {8: 36 / 1247, 16: 136 / 1247, 24: 300 / 1247, 31: 775 / 1247}),
        # 0.1 x (15, 91, 231, 435) and 77.5: 154.7
        (501, {5: 15 / 1547, 13: 1 / 17, 21: 33 / 221, 29: 435 / 1547, 31: 775 / 1547}),
        # 0.1 x (28, 120, 276) and 77.5: 119.9
        (999, {7: 28 / 1199, 15: 120 / 1199, 23: 276 / 1199, 31: 775 / 1199}),
    ],
)
def test_exit_weights_32_layers_rotational(step, expected):
    weights = EarlyExitLoss(0.1, Rotational(8)).exit_weights(step, 1000, 32)
    assert weights == close([expected.get(block, 0) for block in range(32)])


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, [0, 0, 0, 1]),
        (2, [0, 0, 1 / 7, 6 / 7]),
        (4, [0, 1 / 22, 3 / 22, 18 / 22]),
        (15, [0, 1 / 22, 3 / 22, 18 / 22]),
    ],
)
def test_exit_weights_4_layers_gradual_over_16_steps(step, expected):
    assert EarlyExitLoss(0.2, Gradual()).exit_weights(step, 16, 4) == close(expected)


@pytest.mark.parametrize(
    ("step", "first_on", "its_weight", "last_weight"),
    [
        (0, 31, 1, 1),
        # exits 22 … 30: 0.1 x (4960 - 1771) = 318.9; with the last 396.4. e(22) = 25.3.
        (99, 22, 253 / 3964, 775 / 3964),
        # all but the first, which weighs nothing in any case: e(1) = 0.1 of 573.5
        (320, 1, 1 / 5735, 5 / 37),
        (639, 1, 1 / 5735, 5 / 37),
    ],
)
def test_exit_weights_32_layers_gradual_over_640_steps(step, first_on, its_weight, last_weight):
    weights = EarlyExitLoss(0.1, Gradual()).exit_weights(step, 640, 32)
    assert weights[:first_on] == [0] * first_on
    assert [weights[first_on], weights[31], sum(weights)] == close([its_weight, last_weight, 1])

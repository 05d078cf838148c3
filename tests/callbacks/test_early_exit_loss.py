"""EarlyExitLoss in a run: the right weights at each step (by hand in test_equations.py), and its refusals."""

import pytest

from lskip.callbacks import EarlyExitLoss
from lskip.curricula import ChosenExits, Gradual, Rotational
from tests.trainers import Stream, fit_vectors


def fit(tmp_path, model, callback, data=None, **settings):
    return fit_vectors(tmp_path, model, callback, data, **settings).weights


def test_exits_rotate_with_the_optimizer_steps_not_the_micro_batches(tiny_model, tmp_path):
    callback = EarlyExitLoss(0.5, Rotational(2))
    weights = fit(tmp_path, tiny_model(), callback, max_steps=2, accumulate_grad_batches=2)
    even, odd = [0, 0, 1 / 4, 3 / 4], [0, 1 / 10, 0, 9 / 10]
    for seen, expected in zip(weights, [even, even, odd, odd], strict=True):
        assert seen == pytest.approx(expected)


def test_gradual_knows_the_length_of_the_run(tiny_model, tmp_path):
    # 8 steps: exit 2 joins at step 1, exit 1 at 2, exit 0 (which weighs 0) at 3.
    weights = fit(tmp_path, tiny_model(), EarlyExitLoss(0.5, Gradual()), max_epochs=1)
    assert [[weight > 0 for weight in step] for step in weights] == [
        [False, False, False, True],
        [False, False, True, True],
        *[[False, True, True, True]] * 6,
    ]


def test_gradual_over_a_stream_of_unknown_length_is_refused_but_not_rotational(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"early_exit_loss.curriculum: Gradual needs a known number of steps"):
        fit(tmp_path, tiny_model(), EarlyExitLoss(curriculum=Gradual()), Stream(), max_epochs=1)
    assert len(fit(tmp_path, tiny_model(), EarlyExitLoss(), Stream(), max_epochs=1)) == 4


def test_a_model_of_one_layer_trains_its_one_exit(tiny_model, tmp_path):
    assert fit(tmp_path, tiny_model(num_hidden_layers=1), EarlyExitLoss(), max_steps=1) == [[1.0]]


@pytest.mark.parametrize("e_scale", [-0.1, float("nan"), float("inf")])
def test_e_scale_out_of_range_is_refused(e_scale):
    with pytest.raises(ValueError, match=f"e_scale: {e_scale} "):
        EarlyExitLoss(e_scale)


def test_shares_are_those_that_were_named(tiny_model, tmp_path):
    weights = fit(tmp_path, tiny_model(), EarlyExitLoss(shares={1: 0.1, 3: 0.3}), max_steps=2)
    assert weights == [pytest.approx([0.1, 0, 0.3, 0.6])] * 2


def test_the_share_of_an_exit_that_is_off_goes_to_the_last_layer(tiny_model, tmp_path):
    rotating = EarlyExitLoss(shares={1: 0.1, 2: 0.3}, curriculum=Rotational(2))
    weights = fit(tmp_path, tiny_model(), rotating, max_steps=2)
    assert weights == [pytest.approx([0.1, 0, 0, 0.9]), pytest.approx([0, 0.3, 0, 0.7])]
    # 4 steps of Gradual with 4 layers: exit l is on from step (3 - l) / 2 on, l counted from 0.
    growing = [EarlyExitLoss(shares={2: 0.25}, curriculum=Gradual()).exit_weights(step, 4, 4) for step in range(3)]
    assert growing == [[0, 0, 0, 1], [0, 0.25, 0, 0.75], [0, 0.25, 0, 0.75]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shares": {2: 0.3}, "e_scale": 0.2}, "shares: {2: 0.3} and e_scale: 0.2 both"),
        ({"shares": {2: 0.3}, "e_scale": 0.0}, "shares: .* and e_scale: 0.0 both"),
        ({"shares": {}}, "shares: {} names no exit"),
        ({"shares": {0: 0.3}}, "shares: exit layer: 0 is not a whole number from 1 up"),
        ({"shares": {2: 0.0}}, "shares: exit layer 2: 0.0 is not a number above 0 and below 1"),
        ({"shares": {2: float("nan")}}, "shares: exit layer 2: nan"),
        ({"shares": {2: 1.0}}, "shares: exit layer 2: 1.0"),
        ({"shares": {1: 0.5, 2: 0.5}}, "shares: .* add up to 1; below 1"),
        ({"shares": {4: 0.7, 3: 0.2, 2: 0.1}}, "shares: .* add up to 1; below 1"),  # in this order 1 - 1e-16
        ({"shares": {6: 0.11, 5: 0.31, 3: 0.16, 4: 0.06, 1: 0.36}}, "shares: .* add up to 1; below 1"),
        ({"shares": [0.1]}, r"shares: \[0.1\] is not exit layers and their shares"),
    ],
)
def test_wrong_shares_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        EarlyExitLoss(**arguments)


@pytest.mark.parametrize("callback", [EarlyExitLoss(shares={4: 0.3}), EarlyExitLoss(curriculum=ChosenExits([4]))])
def test_an_exit_that_the_model_lacks_is_refused_before_the_first_step(tiny_model, tmp_path, callback):
    with pytest.raises(ValueError, match="4 is not "):
        fit(tmp_path, tiny_model(), callback, max_steps=1)

"""EarlyExitLoss in a run: the right weights at each step (by hand in test_equations.py), and its refusals."""

import pytest

from lskip.callbacks import EarlyExitLoss
from lskip.curricula import Gradual, Rotational
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

"""LayerDropout in a run: the right rates at each step (by hand in test_equations.py), and its refusals."""

import math

import pytest
import torch

from lskip.callbacks import LayerDropout
from lskip.schedules import Constant, Exponential, Linear, Schedule
from tests.trainers import Stream, fit_vectors


def fit(tmp_path, model, callback, data=None, **settings):
    return fit_vectors(tmp_path, model, callback, data, **settings).rates


def test_rates_follow_the_optimizer_steps_not_the_micro_batches(tiny_model, tmp_path):
    rates = fit(tmp_path, tiny_model(), LayerDropout(0.4, Constant(), Linear()), max_steps=3, accumulate_grad_batches=2)
    assert [rate[0] for rate in rates] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])


def test_steps_are_counted_over_epochs(tiny_model, tmp_path):
    data = [{"input_ids": torch.arange(12)[None]}] * 2
    rates = fit(tmp_path, tiny_model(), LayerDropout(0.3, Linear(), Linear()), data, max_epochs=2)
    assert [rate[3] for rate in rates] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [rate[0] for rate in rates] == [0] * 4


@pytest.mark.parametrize("p_max", [-0.1, 1.5, float("nan")])
def test_p_max_out_of_range_is_refused(p_max):
    with pytest.raises(ValueError, match=f"p_max: {p_max} is not a number from 0 to 1"):
        LayerDropout(p_max)


def test_growing_over_a_run_of_unknown_length_is_refused_before_the_first_step(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"layer_dropout.time: Exponential needs a known number of steps"):
        fit(tmp_path, tiny_model(), LayerDropout(time=Exponential()), Stream(), max_epochs=1)
    rates = fit(tmp_path, tiny_model(), LayerDropout(0.2), Stream(), max_epochs=1)
    assert [rate[3] for rate in rates] == [0.2] * 4


@pytest.mark.kind("M a new user's first hour", "M9")
def test_one_layer_or_one_step_drops_nothing_where_a_rate_grows(tiny_model, tmp_path):
    """It begins at 0, and the only layer or step is the first."""
    one_layer = tiny_model(num_hidden_layers=1)
    assert fit(tmp_path, one_layer, LayerDropout(0.5), max_steps=3) == [[0.0]] * 3
    assert fit(tmp_path, tiny_model(), LayerDropout(0.5, time=Linear()), max_steps=1) == [[0.0] * 4]
    assert fit(tmp_path, tiny_model(), LayerDropout(0.5, Constant(), Exponential()), max_steps=1) == [[0.0] * 4]
    assert fit(tmp_path, tiny_model(num_hidden_layers=1), LayerDropout(0.5, Constant()), max_steps=1) == [[0.5]]


@pytest.mark.parametrize("name", ["depth", "time"])
@pytest.mark.parametrize("factor", [None, math.nan, "1", [1.0]])
def test_a_schedule_of_ones_own_that_gives_no_number_is_named(name, factor):
    class Own(Schedule):
        def __call__(self, index, count):
            return factor

    with pytest.raises(ValueError, match=rf"^layer_dropout.{name}: Own\(\d, \d\): .* is not a number"):
        LayerDropout(0.1, **{name: Own()}).drop_rates(0, 5, 4)

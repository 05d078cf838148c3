"""Thresholds of a criterion, by hand and by looking at the tokens that pass."""

import pytest
import torch

from lskip.evaluation.sweep.calibration import calibrate, calibrate_exits
from lskip.evaluation.sweep.own_answers import ExitReading
from lskip.inference import Entropy, Margin


def test_a_threshold_by_hand():
    """Ordered by entropy: right, right, wrong, right, wrong. Of the first two all are right, of four three."""
    entropy = torch.tensor([0.5, 0.1, 0.9, 0.3, 0.7])
    right = torch.tensor([False, True, False, True, True])
    assert calibrate(entropy, right, 1.0, low_is_sure=True) == (pytest.approx(0.4), 0.4, 1.0)
    assert calibrate(entropy, right, 0.7, low_is_sure=True) == (pytest.approx(0.8), 0.8, 0.75)
    assert calibrate(entropy, right, 0.5, low_is_sure=True) == (1.0, 1.0, pytest.approx(0.6))
    assert calibrate(1 - entropy, right, 0.7, low_is_sure=False) == (pytest.approx(0.2), 0.8, 0.75)


def test_where_no_token_is_sure_enough_none_passes():
    wrong = torch.tensor([False, True])
    assert calibrate(torch.tensor([0.1, 0.2]), wrong, 0.9, low_is_sure=True) == (0.0, 0.0, 1.0)
    assert calibrate(torch.tensor([0.9, 0.8]), wrong, 0.9, low_is_sure=False) == (1.0, 0.0, 1.0)


def test_equal_values_pass_together():
    """Two tokens at .2, one of them wrong: with both half are right, and none can pass alone."""
    measured, right = torch.tensor([0.2, 0.2, 0.5]), torch.tensor([True, False, False])
    assert calibrate(measured, right, 0.9, low_is_sure=True).share == 0.0
    assert calibrate(measured, right, 0.5, low_is_sure=True) == (pytest.approx(0.35), pytest.approx(2 / 3), 0.5)


@pytest.mark.parametrize("kind", [Entropy, Margin])
def test_tokens_that_pass_are_right_as_often_as_wanted_and_one_more_would_spoil_it(kind):
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(2, 400, 20, generator=generator)
    measured = torch.stack([kind.measure(layer) for layer in logits])
    certain = 1 - measured if kind.low_is_sure else measured
    hits = torch.rand(2, 400, generator=generator) < 0.3 + 0.7 * certain
    readings = [ExitReading(hits[:, :150], measured[:, :150]), ExitReading(hits[:, 150:], measured[:, 150:])]
    drafted = torch.ones(400, dtype=torch.bool)
    drafted[[0, 150]] = False  # the prefill brings them
    for layer, found in enumerate(calibrate_exits(readings, 0.8, kind)):
        criterion = kind(found.threshold)
        passes = criterion.exits(2, None, None, lambda layer=layer: logits[layer]) & drafted
        assert 0 < passes.sum() < 398
        assert found.share == pytest.approx(passes.sum().item() / 398)
        assert found.precision == pytest.approx(hits[layer][passes].float().mean().item()) and found.precision >= 0.8
        order = certain[layer].where(drafted, -1).argsort(descending=True)
        assert all(hits[layer][order[:more]].float().mean() < 0.8 for more in range(passes.sum() + 1, 399))

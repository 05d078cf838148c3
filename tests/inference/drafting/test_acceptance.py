"""Counts by position, and the tokens that they promise, against values worked by hand."""

import random

import pytest

from lskip.inference.drafting.acceptance import Acceptance, Prior, expected_tokens


def test_tokens_of_equal_chances_are_the_geometric_sum():
    assert expected_tokens([0.5] * 5, 3) == pytest.approx([1.5, 1.75, 1.875])


def test_positions_have_the_chances_of_their_groups():
    """Positions 1, 2, 3 to 4, 5 to 8, 9 …: the product over the first ten."""
    chances = [0.5, 0.6, 0.7, 0.8, 0.9]
    by_position = [0.5, 0.6, 0.7, 0.7, 0.8, 0.8, 0.8, 0.8, 0.9, 0.9]
    expected, reached = 1.0, 1.0
    for chance in by_position:
        reached *= chance
        expected += reached
    assert expected_tokens(chances, 10)[-1] == pytest.approx(expected)


def test_a_draft_is_counted_up_to_its_first_refusal():
    record = Acceptance()
    record.add_draft(accepted=3, drafted=8)
    record.add_draft(accepted=2, drafted=2)
    assert record.accepted == [2, 2, 1, 0, 0] and record.refused == [0, 0, 1, 0, 0]
    assert record.rate == pytest.approx(5 / 6) and record.tested == 6


def test_a_run_begins_anew_behind_a_disagreement():
    record = Acceptance()
    record.add_run([True, True, False, True, False, False])
    assert record.accepted == [2, 1, 0, 0, 0] and record.refused == [1, 1, 1, 0, 0]


def test_little_tested_groups_are_believed_to_be_as_those_before_them():
    """By hand: pooled (2 + 1) / (4 + 2) = .5; 1st (2 + 2 x .5) / 4 = 3/4; 2nd (0 + 2 x 3/4) / 4 = 3/8; then 3/8."""
    record = Acceptance()
    record.add_draft(1, 4)
    record.add_draft(1, 4)
    assert record.chances(Prior()) == pytest.approx([3 / 4, 3 / 8, 3 / 8, 3 / 8, 3 / 8])


def test_an_untested_draft_is_hoped_to_be_perfect_and_a_tested_one_as_it_is():
    assert Acceptance().pooled(Prior()) == (0.5, 0.5)
    record = Acceptance()
    for _ in range(100):
        record.add_draft(9, 10)
    chance, error = record.pooled(Prior())
    assert chance == pytest.approx(0.9, abs=0.001) and error == pytest.approx((0.09 / 1001) ** 0.5, rel=0.01)


def test_counts_converge_to_the_hazards():
    """Whatever tests them: drafts of six tokens, or runs over a text."""
    hazards, rng = [0.4, 0.7, 0.9, 0.9, 0.95, 0.95], random.Random(0)
    drafts, runs = Acceptance(), Acceptance()
    for _ in range(4000):
        tokens = [rng.random() < hazard for hazard in hazards]
        drafts.add_draft(tokens.index(False) if False in tokens else 6, 6)
        runs.add_run(tokens[: tokens.index(False) + 1] if False in tokens else tokens)
    for record in (drafts, runs):
        assert record.chances(Prior())[:4] == pytest.approx([0.4, 0.7, 0.9, 0.95], abs=0.03)

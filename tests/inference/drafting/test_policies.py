"""Draft policies against rules worked by hand (CostAwareDraft: test_cost_aware.py)."""

import random

import pytest
from jsonargparse import ArgumentParser

from lskip.inference.drafting.cost_aware import CostAwareDraft
from lskip.inference.drafting.costs import Costs, RowCosts
from lskip.inference.drafting.draft import PLAIN, Draft, DraftPlan
from lskip.inference.drafting.policies import ConfidenceDraft, DraftPolicy, FixedDraft
from lskip.inference.drafting.registry import round_seconds

EARLY, WEIGHTS, NGRAM = Draft("layers", 6), Draft("weights", 30), Draft("ngram", 0)
NGRAMS = frozenset([NGRAM])


def unused():
    raise AssertionError("nobody asked for costs")


def test_fixed_draft():
    policy = FixedDraft()
    policy.begin([EARLY, NGRAM], unused, 4)
    assert policy.plan(3, 9) == DraftPlan(EARLY, 4)
    assert policy.plan(3, 2) == DraftPlan(EARLY, 2)
    assert policy.plan(3, 0) == PLAIN
    assert policy.plan(3, 9, without=NGRAMS) == DraftPlan(EARLY, 4)
    assert policy.plan(3, 9, without=frozenset([EARLY])) == PLAIN
    assert policy.goes_on(unused)  # no wait for the device


@pytest.mark.parametrize(
    ("probabilities", "goes_on"),
    [([0.5], True), ([0.49], False), ([0.9, 0.1], False), ([0.9, 0.9, 0.1], True), ([0.9, 0.1, 0.1], False)],
)
def test_confidence_stops_when_half_of_the_slots_doubt(probabilities, goes_on):
    policy = ConfidenceDraft(threshold=0.5)
    policy.begin([EARLY], unused, 4)
    assert policy.plan(1, 9) == DraftPlan(EARLY, 4)
    assert policy.goes_on(lambda: probabilities) is goes_on


def test_the_threshold_adapts_by_the_rule():
    policy, plan = ConfidenceDraft(threshold=0.5, target=0.75, step=0.1), DraftPlan(EARLY, 4)
    seen = []
    for drafted, accepted in [(4, [4]), (4, [0]), (2, [2]), (2, [2, 2]), (2, [2]), (4, [4]), (0, [0])]:
        policy.learn(plan, drafted, accepted)
        seen.append((policy.acceptance_rate, round(policy.threshold, 9)))
    # A: 1, (1 + 0) / 2, … A full round of good acceptance leaves the threshold, a plain round leaves everything.
    assert seen == [(1, 0.5), (0.5, 0.6), (0.75, 0.5), (0.875, 0.4), (0.9375, 0.3), (0.96875, 0.3), (0.96875, 0.3)]
    assert policy.summary() == {"threshold": pytest.approx(0.3), "acceptance_rate": 0.96875}


@pytest.mark.parametrize("trust", [0.8, 1.0, 1.25])
def test_confidence_beats_every_fixed_number_of_tokens(trust):
    """Tokens are accepted with `trust` x the draft's probability: overconfident, calibrated, underconfident."""
    fixed = max(confident_speed(FixedDraft(), trust, d) for d in range(1, 9))
    low, high = (confident_speed(ConfidenceDraft(threshold), trust, 8) for threshold in (0.1, 1.0))
    assert min(low, high) > 0.98 * fixed
    assert trust == 0.8 or min(low, high) > 1.03 * fixed


def packed_weights():
    """Return costs like packed weights' on a CPU: 8 rows cost little more than 1 does, further ones more."""
    rows, seconds = (1, 8, 64), (1.004, 1.032, 2.936)

    def row_costs(block, head):
        return RowCosts(rows, tuple(block * each for each in seconds), tuple(head * each for each in seconds))

    return Costs(30, row_costs(1.0, 8.0), row_costs(0.4, 3.0))


def confident_speed(policy, trust, num_speculations):
    rng, costs, tokens, steps = random.Random(0), packed_weights(), 0, 0.0
    policy.begin([WEIGHTS], unused, num_speculations)
    for _ in range(4000):
        plan, drafted, accepted, good = policy.plan(1, 99), 0, 0, True
        while drafted < plan.num_speculations:
            probability = rng.betavariate(3, 0.5)  # mostly sure, with a tail of doubt
            drafted += 1
            good = good and rng.random() < min(1, trust * probability)
            accepted += good
            if drafted < plan.num_speculations and not policy.goes_on(lambda at=probability: [at]):
                break
        policy.learn(plan, drafted, [accepted])
        tokens += 1 + accepted
        steps += round_seconds(costs, DraftPlan(WEIGHTS, drafted), 1) / costs.plain(1)
    return tokens / steps


@pytest.mark.parametrize(
    ("policy", "arguments", "message"),
    [
        (ConfidenceDraft, {"threshold": 1.5}, "threshold: 1.5 is not a number from 0 to 1"),
        (ConfidenceDraft, {"target": "high"}, "target: 'high'"),
        (ConfidenceDraft, {"step": float("nan")}, "step: nan"),
        (CostAwareDraft, {"budget": -0.1}, "budget: -0.1 is not a number from 0 to 1"),
        (CostAwareDraft, {"memory": 1}, "memory: 1 is not a whole number from 2 up"),
        (CostAwareDraft, {"memory": 9.5}, "memory: 9.5"),
    ],
)
def test_bad_arguments(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        policy(**arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("FixedDraft", {}), ("ConfidenceDraft", {"threshold": 1, "step": 0.02}), ("CostAwareDraft", {"memory": 40})],
)
def test_policies_are_named_in_yaml(name, arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--policy", type=DraftPolicy)
    given = parser.parse_object({"policy": {"class_path": f"lskip.inference.{name}", "init_args": arguments}})
    made = parser.instantiate_classes(given).policy
    assert type(made).__name__ == name
    assert {key: getattr(made, key) for key in arguments} == arguments

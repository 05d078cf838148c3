"""Speculative sampling against exact enumeration; the same test must refuse the known ways to get it wrong.

The model and its draft are tables: logits for each text of tokens 0 … 4 after the prompt.
"""

from functools import cache
from itertools import combinations

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from lskip.inference import GenerationSettings
from lskip.inference.decoding import noise, rejection
from lskip.inference.decoding.batch_chooser import BatchChooser
from lskip.inference.decoding.sampling import TokenChooser
from tests.inference.decoding.test_sampling import chi_square_p

VOCAB, LONGEST, WANTED = 5, 4, 3
PROMPT = [1, 3]
PLAIN = {"temperature": 0.8, "top_p": 0.9}
PENALIZED = {**PLAIN, "repetition_penalty": 1.6}


@cache
def table(name, length):
    """Return logits [5^length, 5] of "model" or "draft", which are independent of each other."""
    seed = length + {"model": 0, "draft": 273}[name]
    return torch.randn(VOCAB**length, VOCAB, generator=torch.Generator().manual_seed(seed))


def logits_after(name, tokens):
    tokens, index = tokens[:LONGEST], 0
    for token in tokens:
        index = index * VOCAB + token
    return table(name, len(tokens))[index]


def distribution(name, tokens, settings):
    """Return the distribution [5] as transformers' own processors make it."""
    processors = LogitsProcessorList(
        [TemperatureLogitsWarper(settings["temperature"]), TopPLogitsWarper(settings["top_p"])]
    )
    if "repetition_penalty" in settings:
        processors.insert(0, RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    prefix = torch.tensor([PROMPT + tokens])
    return processors(prefix, logits_after(name, tokens)[None].clone()).softmax(-1)[0].double()


def exact_joint(settings):
    """Return the probabilities [125] of the first three tokens."""
    joint = torch.zeros(VOCAB, VOCAB, VOCAB).double()
    first = distribution("model", [], settings)
    for a in range(VOCAB):
        second = distribution("model", [a], settings)
        for b in range(VOCAB):
            joint[a, b] = first[a] * second[b] * distribution("model", [a, b], settings)
    return joint.flatten()


def sample(batch, num_drafts):
    """Return the draft's tokens [B, num_drafts]."""
    drafted = torch.empty(len(batch.choosers), 0, dtype=torch.long)
    for _ in range(num_drafts):
        logits = stacked("draft", batch, drafted, [drafted.shape[1]])
        drafted = torch.cat([drafted, batch.sample(logits, drafted)[:, None]], 1)
    return drafted


def guess(batch, num_drafts):
    """Return tokens as an n-gram draft does, without `sample`."""
    return torch.tensor([[(sum(c.text) + i) % VOCAB for i in range(num_drafts)] for c in batch.choosers])


def stacked(name, batch, drafted, counts):
    """Return logits [B, len(counts), 5] after the text and so many drafted tokens."""
    return torch.stack(
        [
            torch.stack([logits_after(name, (chooser.text + ids[:count])[len(PROMPT) :]) for count in counts])
            for chooser, ids in zip(batch.choosers, drafted.tolist(), strict=True)
        ]
    )


def joint_counts(settings, draws, slots=10, draft=sample, num_drafts=2):
    """Return counts [125] of the first three tokens, and the share of drafted tokens that were accepted."""
    counts, kept, total = torch.zeros(VOCAB**WANTED).double(), 0, 0
    for seed in range(0, draws, slots):
        batch = BatchChooser([TokenChooser(settings, seed + slot, (), PROMPT) for slot in range(slots)])
        while min(len(chooser.text) for chooser in batch.choosers) < len(PROMPT) + WANTED:
            drafted = draft(batch, num_drafts)
            accepted, own = batch.verify(stacked("model", batch, drafted, range(num_drafts + 1)), drafted)
            for slot, chooser in enumerate(batch.choosers):
                chooser.text += [*drafted[slot, : accepted[slot]].tolist(), int(own[slot])]
            kept, total = kept + int(accepted.sum()), total + drafted.numel()
        for chooser in batch.choosers:
            a, b, c = chooser.text[len(PROMPT) : len(PROMPT) + WANTED]
            counts[(a * VOCAB + b) * VOCAB + c] += 1
    return counts, kept / max(total, 1)


def test_the_draft_is_far_from_the_model():
    for settings in (PLAIN, PENALIZED):
        prefixes = [[], *([a] for a in range(VOCAB)), *([a, b] for a in range(VOCAB) for b in range(VOCAB))]
        distances = [
            0.5 * (distribution("model", prefix, settings) - distribution("draft", prefix, settings)).abs().sum()
            for prefix in prefixes
        ]
        assert min(distances) >= 0.2


CASES = [
    ("shared_noise", PLAIN, sample, 2),
    ("shared_noise", PENALIZED, guess, 2),
    ("rejection", PLAIN, sample, 1),
    ("rejection", PLAIN, sample, 2),
    ("rejection", PENALIZED, sample, 2),
    ("rejection", PLAIN, guess, 2),
]


@pytest.mark.parametrize(("acceptance", "chosen", "draft", "num_drafts"), CASES)
def test_the_joint_distribution_is_exact(acceptance, chosen, draft, num_drafts):
    settings = GenerationSettings(acceptance=acceptance, **chosen)
    counts, acceptance_rate = joint_counts(settings, 700, draft=draft, num_drafts=num_drafts)
    assert chi_square_p(counts, exact_joint(chosen)) > 1e-4
    assert 0.05 < acceptance_rate < 0.9


def test_every_draw_is_fresh():
    """A round's drafts, the same position drafted a round later and the model's own token share no random numbers.

    So a draft policy may look at refused tokens before it decides whether to draft again.
    """
    settings = GenerationSettings(temperature=1.0, acceptance="rejection")
    even, none = torch.zeros(1, 1, 40), torch.empty(1, 0, dtype=torch.long)
    draws = []
    for seed in range(300):
        batch = BatchChooser([TokenChooser(settings, seed, (), PROMPT)])
        first = batch.sample(even, none)
        second = batch.sample(even, first[:, None])
        own = BatchChooser(batch.choosers).verify(even, none)[1]
        batch.choosers[0].text.append(0)
        again = batch.sample(even, none)
        draws.append(torch.cat([first, second, own, again]))
    for one, other in combinations(torch.stack(draws).T, 2):
        assert (one == other).sum() < 25  # 7.5 are expected


def test_no_random_numbers_are_used_twice(monkeypatch):
    original, keys = noise.random_source, []

    def recorded(*key):
        keys.append((*key, *(noise.Purpose.OWN, 0)[len(key) - 2 :]))
        return original(*key)

    monkeypatch.setattr(noise, "random_source", recorded)
    monkeypatch.setattr(rejection, "random_source", recorded)
    joint_counts(GenerationSettings(acceptance="rejection", **PLAIN), 20)
    assert len(set(keys)) == len(keys) > 20 * 4


def accept_always(p, q, drafted, uniforms):
    return torch.tensor([len(drafted)])


def accept_by_p_alone(p, q, drafted, uniforms):
    return (uniforms[:, None] < p[:-1].gather(1, drafted[:, None])).long().cumprod(0).sum(0)


def draw_from_p(p, q, accepted):
    return p.index_select(0, accepted)


def forget_the_bonus(p, q, accepted):
    left = (p[:-1] - q).clamp(min=0)
    return left.index_select(0, accepted.clamp(max=len(left) - 1))


@pytest.mark.parametrize(
    ("name", "wrong", "num_drafts"),
    [
        ("accepted_prefix", accept_always, 2),
        ("accepted_prefix", accept_by_p_alone, 2),
        ("remainder", draw_from_p, 2),
        ("remainder", forget_the_bonus, 1),
    ],
)
def test_the_same_test_refuses_wrong_variants(monkeypatch, name, wrong, num_drafts):
    monkeypatch.setattr(rejection, name, wrong)
    settings = GenerationSettings(acceptance="rejection", **PLAIN)
    counts, _ = joint_counts(settings, 500, num_drafts=num_drafts)
    assert chi_square_p(counts, exact_joint(PLAIN)) < 1e-4


def test_rejection_accepts_more_than_shared_noise():
    rates = [
        joint_counts(GenerationSettings(acceptance=name, **PLAIN), 300)[1] for name in ("shared_noise", "rejection")
    ]
    assert rates[1] > rates[0]


def test_acceptance_and_remainder_worked_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.9, 0.0], [0.2, 0.2, 0.6]])
    q = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.1, 0.4]])

    def accepted(drafted, uniforms):
        return int(rejection.accepted_prefix(p, q, torch.tensor(drafted), torch.tensor(uniforms)))

    assert accepted([0, 0], [0.99, 0.19]) == 2  # p/q: 2 and 0.2
    assert accepted([0, 0], [0.99, 0.21]) == 1
    assert accepted([2, 1], [0.41, 0.0]) == 0  # p/q is 0.4; what comes after does not count
    assert accepted([0, 2], [0.0, 0.0]) == 1  # p is 0
    for count, weights in ((0, [0.25, 0.05, 0.0]), (1, [0.0, 0.8, 0.0]), (2, [0.2, 0.2, 0.6])):
        torch.testing.assert_close(rejection.remainder(p, q, torch.tensor([count])), torch.tensor([weights]))


def test_a_refusal_by_rounding_still_leaves_a_distribution():
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]])
    assert torch.equal(rejection.remainder(p, p[:1], torch.tensor([0])), p[:1])
    q = torch.tensor([[0.25, 0.75 + 1e-7]])  # nothing is left anywhere
    assert torch.equal(rejection.remainder(p, q, torch.tensor([0])), p[:1])


def test_what_the_processors_zero_out_is_never_accepted():
    logits = torch.tensor([[[3.0, 0.0, -1.0]] * 2])
    for seed in range(200):
        chooser = TokenChooser(GenerationSettings(temperature=1.0, top_k=1, acceptance="rejection"), seed, (), PROMPT)
        accepted, own = BatchChooser([chooser]).verify(logits, torch.tensor([[1]]))
        assert (int(accepted), int(own)) == (0, 0)


def test_equal_distributions_accept_everything():
    for seed in range(100):
        chooser = TokenChooser(GenerationSettings(temperature=1.0, acceptance="rejection"), seed, (), PROMPT)
        batch, logits = BatchChooser([chooser]), torch.randn(1, 2, 50)
        drafted = batch.sample(logits[:, :1], torch.empty(1, 0, dtype=torch.long))[:, None]
        assert int(batch.verify(logits, drafted)[0]) == 1


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.0001}])
def test_greedy_keeps_the_greedy_prefix(settings):
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [1.0, 0.9]]])
    for seed in range(20):
        chooser = TokenChooser(GenerationSettings(acceptance="rejection", **settings), seed, (), [0])
        accepted, own = BatchChooser([chooser]).verify(logits, torch.tensor([[1, 1]]))
        assert (accepted.tolist(), own.tolist()) == ([1], [0])


def test_without_drafts_the_text_is_that_of_shared_noise():
    def texts(acceptance, slots):
        settings = GenerationSettings(acceptance=acceptance, **PLAIN)
        return joint_counts(settings, 60, slots, num_drafts=0)[0].tolist()

    assert texts("rejection", 1) == texts("rejection", 6) == texts("shared_noise", 1)


def test_a_seed_fixes_the_text():
    def counts(slots):
        return joint_counts(GenerationSettings(acceptance="rejection", **PLAIN), 60, slots)[0].tolist()

    torch.manual_seed(0)
    first = counts(1)
    torch.manual_seed(1)
    assert counts(1) == first == counts(6)


def test_a_draft_that_was_given_up_is_forgotten():
    def verify(given_up):
        chooser = TokenChooser(GenerationSettings(acceptance="rejection", **PLAIN), 5, (), PROMPT)
        batch = BatchChooser([chooser])
        for num_drafts in given_up:
            sample(batch, num_drafts)
        drafted = sample(batch, 2)
        return [part.tolist() for part in batch.verify(stacked("model", batch, drafted, range(3)), drafted)]

    assert verify([]) == verify([3, 1])


def test_a_guess_after_a_sampled_round_counts_as_certain():
    settings = GenerationSettings(acceptance="rejection", **PLAIN)
    for seed in range(40):
        outcomes = []
        for proposed_before in (True, False):
            batch = BatchChooser([TokenChooser(settings, seed, (), PROMPT)])
            if proposed_before:
                drafted = sample(batch, 1)
                batch.verify(stacked("model", batch, drafted, range(2)), drafted)
            batch.choosers[0].text.append(2)
            drafted = guess(batch, 1)
            outcomes.append(
                [part.tolist() for part in batch.verify(stacked("model", batch, drafted, range(2)), drafted)]
            )
        assert outcomes[0] == outcomes[1]

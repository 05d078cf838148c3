"""Rounds predicted from one pass, against transformers' hidden states and against decoding itself."""

from collections import Counter

import pytest
import torch

from lskip.evaluation.sweep.draft_rounds import (
    DraftRound,
    OwnText,
    exit_predictions,
    rounds_of_exit,
    rounds_of_ngrams,
    shorter_rounds,
    tokens_of,
)
from lskip.inference import TextGenerator
from tests.conftest import make_model

PROMPTS = [[5, 9, 5, 9, 5], list(range(20, 50)), [7] * 12]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def model():
    model = make_model()
    model.generation_config.eos_token_id = None  # its texts are as long as they may be
    return model


@pytest.fixture(scope="module")
def generator(model):
    return TextGenerator(model, bit_exact=False)


def own_text(generator, prompt, **settings) -> OwnText:
    answer = generator.generate(prompt, max_new_tokens=NEW_TOKENS, **settings).token_ids
    return OwnText(prompt, answer, NEW_TOKENS)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_predictions_are_those_of_hidden_states_through_norm_and_head(model, generator, prompt, monkeypatch):
    monkeypatch.setattr("lskip.evaluation.sweep.draft_rounds.PREFILL_ROWS", 7)  # a piece ends inside prompt and answer
    text = own_text(generator, prompt)
    ids = torch.tensor([prompt + text.answer])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        exits = [model.lm_head(model.model.norm(state)) for state in states[1:-1]]  # the last one is normed already
        exits.append(model(ids).logits)
    slow = torch.stack([logits[0, len(prompt) - 1 : -1].argmax(-1) for logits in exits])
    found = exit_predictions(generator.runner, text, generator.vocab_size)
    assert found.shape == (4, NEW_TOKENS)
    assert torch.equal(found, slow)
    assert found[-1].tolist() == text.answer


def test_a_piece_stands_where_it_stands(monkeypatch):
    """GPT-2 embeds positions, so a later piece must not be embedded as if it began the text."""
    generator = TextGenerator(make_model("gpt2", num_key_value_heads=4))
    text = OwnText(PROMPTS[1], list(range(60, 60 + NEW_TOKENS)), NEW_TOKENS)
    whole = exit_predictions(generator.runner, text, generator.vocab_size)
    monkeypatch.setattr("lskip.evaluation.sweep.draft_rounds.PREFILL_ROWS", 7)
    assert torch.equal(exit_predictions(generator.runner, text, generator.vocab_size), whole)


@pytest.mark.parametrize("exit_layer", [2, 3])
@pytest.mark.parametrize("num_speculations", [1, 3, 6])
def test_rounds_of_an_exit_are_those_that_decoding_makes(generator, exit_layer, num_speculations):
    for prompt in PROMPTS:
        text = own_text(generator, prompt)
        hits = exit_predictions(generator.runner, text, generator.vocab_size)[exit_layer - 1] == torch.tensor(
            text.answer
        )
        rounds = rounds_of_exit(text, hits.tolist(), num_speculations)
        drafts = {"exit_layer": exit_layer, "num_speculations": num_speculations, "draft": "layers"}
        decoded = generator.generate(prompt, max_new_tokens=NEW_TOKENS, **drafts)
        assert decoded.token_ids == text.answer
        assert (len(rounds), sum(each.drafted for each in rounds)) == (decoded.rounds - 1, decoded.drafted)
        assert sum(each.accepted for each in rounds) == decoded.accepted
        assert tokens_of(rounds) == len(text.answer) - 1


@pytest.mark.parametrize("num_speculations", [1, 4])
def test_rounds_of_ngrams_are_those_that_decoding_makes(generator, num_speculations):
    drafted = 0
    for prompt in PROMPTS:
        # A model that repeats itself, so that n-grams find something.
        text = own_text(generator, prompt, repetition_penalty=0.2)
        rounds = rounds_of_ngrams(text, num_speculations)
        settings = {"repetition_penalty": 0.2, "num_speculations": num_speculations, "draft": "ngram"}
        decoded = generator.generate(prompt, max_new_tokens=NEW_TOKENS, **settings)
        assert (len(rounds), sum(each.accepted for each in rounds)) == (decoded.rounds - 1, decoded.accepted)
        assert sum(each.drafted for each in rounds) == decoded.drafted
        drafted += decoded.accepted
    assert drafted > 10


def test_a_text_that_ends_early_ends_its_last_round():
    """By hand: five tokens, the first by the prefill; then 2 of 2 accepted and one more (4 tokens), then the last."""
    text = OwnText([1], [10, 11, 12, 13, 14], max_new_tokens=50)
    assert rounds_of_exit(text, [True] * 5, 2) == [DraftRound(2, 2), DraftRound(2, 1)]
    assert rounds_of_exit(text, [True, False, True, True, False], 2) == [DraftRound(2, 0), DraftRound(2, 2)]
    assert rounds_of_exit(OwnText([1], [10], 50), [True], 2) == []


def test_rounds_near_the_last_token_draft_less():
    text = OwnText([1], [10, 11, 12, 13, 14], max_new_tokens=5)
    assert rounds_of_exit(text, [False] * 5, 3) == [
        DraftRound(3, 0),
        DraftRound(2, 0),
        DraftRound(1, 0),
        DraftRound(0, 0),
    ]


def test_shorter_rounds_keep_what_they_may():
    assert Counter(shorter_rounds(Counter({0: 2, 3: 1, 5: 4}), 4)) == {
        DraftRound(4, 0): 2,
        DraftRound(4, 3): 1,
        DraftRound(4, 4): 4,
    }

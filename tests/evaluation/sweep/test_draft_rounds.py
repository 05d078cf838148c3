"""Rounds predicted from one pass, against transformers' hidden states and against decoding itself."""

from collections import Counter

import pytest
import torch

from lskip.evaluation.sweep.draft_rounds import (
    DraftRound,
    rounds_of_criterion,
    rounds_of_exit,
    rounds_of_ngrams,
    shorter_rounds,
    tokens_of,
)
from lskip.evaluation.sweep.own_answers import ExitReading, OwnText, own_texts, own_tokens_per_round, read_answer
from lskip.evaluation.tasks.prompts import Prompt
from lskip.inference import CriterionDraft, Entropy, Margin, TextGenerator
from lskip.models.exit_heads import TrainedExits
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


def reading_of(generator, text, criterion=None) -> ExitReading:
    return read_answer(generator.runner, generator.runners.reading_drafts, text, generator.vocab_size, criterion)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_what_exits_say_is_what_hidden_states_say_through_norm_and_head(model, generator, prompt, monkeypatch):
    monkeypatch.setattr("lskip.evaluation.sweep.own_answers.PREFILL_ROWS", 7)  # a piece ends inside prompt and answer
    text = own_text(generator, prompt)
    ids = torch.tensor([prompt + text.answer])
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        exits = [model.lm_head(model.model.norm(state)) for state in states[1:-1]]  # the last one is normed already
        exits.append(model(ids).logits)
    logits = torch.stack([each[0, len(prompt) - 1 : -1] for each in exits])
    found = reading_of(generator, text, Entropy)
    assert found.hits.shape == (4, NEW_TOKENS) and found.hits[-1].all()
    assert torch.equal(found.hits, logits.argmax(-1) == torch.tensor(text.answer))
    entropy = torch.distributions.Categorical(logits=logits).entropy() / torch.tensor(float(logits.shape[-1])).log()
    torch.testing.assert_close(found.measured, entropy, rtol=1e-4, atol=1e-5)


def test_a_piece_stands_where_it_stands(monkeypatch):
    """GPT-2 embeds positions, so a later piece must not be embedded as if it began the text."""
    generator = TextGenerator(make_model("gpt2", num_key_value_heads=4))
    text = OwnText(PROMPTS[1], list(range(60, 60 + NEW_TOKENS)), NEW_TOKENS)
    whole = reading_of(generator, text, Margin)
    monkeypatch.setattr("lskip.evaluation.sweep.own_answers.PREFILL_ROWS", 7)
    torch.testing.assert_close(reading_of(generator, text, Margin).measured, whole.measured)


def test_exits_are_read_through_their_own_maps(model):
    """An exit whose map is turned around says something else than without it, and what it drafts is what is read."""
    heads = TrainedExits(model.config.num_hidden_layers, model.config.hidden_size, heads=True, classifier=False)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    generator = TextGenerator(model, bit_exact=False, trained_exits=heads)
    text = own_text(generator, PROMPTS[1])
    hits = reading_of(generator, text).hits
    assert not torch.equal(
        hits[:3], read_answer(generator.runner, lambda runner, _: runner, text, generator.vocab_size).hits[:3]
    )
    rounds = rounds_of_exit(text, hits[2].tolist(), 3)
    drafts = {"exit_layer": 3, "num_speculations": 3, "draft": "layers"}
    decoded = generator.generate(PROMPTS[1], max_new_tokens=NEW_TOKENS, **drafts)
    assert (len(rounds), sum(each.accepted for each in rounds)) == (decoded.rounds - 1, decoded.accepted)


@pytest.mark.parametrize("exit_layer", [2, 3])
@pytest.mark.parametrize("num_speculations", [1, 3, 6])
def test_rounds_of_an_exit_are_those_that_decoding_makes(generator, exit_layer, num_speculations):
    readings, tokens, passes = [], 0, 0
    for prompt in PROMPTS:
        text = own_text(generator, prompt)
        readings.append(reading_of(generator, text))
        rounds = rounds_of_exit(text, readings[-1].hits[exit_layer - 1].tolist(), num_speculations)
        drafts = {"exit_layer": exit_layer, "num_speculations": num_speculations, "draft": "layers"}
        decoded = generator.generate(prompt, max_new_tokens=NEW_TOKENS, **drafts)
        assert decoded.token_ids == text.answer
        assert (len(rounds), sum(each.drafted for each in rounds)) == (decoded.rounds - 1, decoded.drafted)
        assert sum(each.accepted for each in rounds) == decoded.accepted
        assert tokens_of(rounds) == len(text.answer) - 1
        tokens, passes = tokens + len(decoded.token_ids), passes + decoded.rounds
    assert own_tokens_per_round(readings, num_speculations)[exit_layer - 1] == pytest.approx(tokens / passes)


@pytest.mark.parametrize("num_speculations", [3, 8])
def test_the_last_round_of_a_text_that_ends_drafts_up_to_its_end(num_speculations):
    model, ended = make_model(), 0
    for prompt in PROMPTS:
        model.generation_config.eos_token_id = None
        free = TextGenerator(model, bit_exact=False).generate(prompt, max_new_tokens=NEW_TOKENS).token_ids
        for model.generation_config.eos_token_id in set(free[3:]):
            generator = TextGenerator(model, bit_exact=False)
            (text,) = own_texts(generator, [Prompt("", prompt, {"max_new_tokens": NEW_TOKENS})], 1)
            rounds = rounds_of_exit(text, reading_of(generator, text).hits[2].tolist(), num_speculations)
            drafts = {"exit_layer": 3, "num_speculations": num_speculations, "draft": "layers"}
            decoded = generator.generate(prompt, max_new_tokens=NEW_TOKENS, **drafts)
            assert [each.accepted for each in rounds] == [each.accepted for each in decoded.history[1:]]
            if rounds and rounds[-1].accepted + sum(each.accepted + 1 for each in rounds[:-1]) == len(text.answer) - 1:
                assert rounds[-1].drafted == len(decoded.history[-1].drafted)
                ended += rounds[-1].drafted < num_speculations
    assert ended  # a last round was shorter


@pytest.mark.parametrize("criterion", [Entropy(0.9), Margin(0.01)])
def test_rounds_that_a_criterion_ends_are_those_that_decoding_makes(generator, criterion):
    stopped = 0
    for prompt in PROMPTS:
        text = own_text(generator, prompt)
        reading = reading_of(generator, text, type(criterion))
        sure = criterion.sure(reading.measured[2])
        rounds = rounds_of_criterion(text, reading.hits[2].tolist(), sure.tolist(), 5)
        policy = CriterionDraft(criterion)
        drafts = {"exit_layer": 3, "num_speculations": 5, "draft": "layers", "draft_policy": policy}
        decoded = generator.generate(prompt, max_new_tokens=NEW_TOKENS, **drafts)
        assert decoded.token_ids == text.answer
        assert (len(rounds), sum(each.accepted for each in rounds)) == (decoded.rounds - 1, decoded.accepted)
        stopped += (~sure).sum().item()
        assert sure.any()
    assert stopped


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


def test_a_draft_ends_behind_the_first_token_that_is_not_sure():
    """By hand: tokens 1 and 2 are sure, 3 is not, is drafted last and wrong; the model's own is 3."""
    text = OwnText([1], list(range(10, 18)), max_new_tokens=50)
    hits = [True, True, True, False, True, True, True, True]
    sure = [True, True, True, False, False, True, True, True]
    assert rounds_of_criterion(text, hits, sure, 6) == [DraftRound(3, 2), DraftRound(1, 1), DraftRound(3, 2)]
    assert rounds_of_criterion(text, hits, [True] * 8, 6)[0] == DraftRound(6, 2)


def test_shorter_rounds_keep_what_they_may():
    assert Counter(shorter_rounds(Counter({0: 2, 3: 1, 5: 4}), 4)) == {
        DraftRound(4, 0): 2,
        DraftRound(4, 3): 1,
        DraftRound(4, 4): 4,
    }

"""Prompts that begin like a text that has ended: the same answers, and fewer tokens run."""

import random

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.decoding.batch import Batch
from lskip.inference.decoding.kept_texts import KeptTexts
from lskip.models.exit_adapter import AdapterShape, ExitAdapter

DRAFTS = {
    "none": {},
    "layers": {"exit_layer": 2, "num_speculations": 3},
    "ngram": {"draft": "ngram", "num_speculations": 4},
}


@pytest.fixture
def generator(tiny_model):
    """Return a generator of texts that do not end by themselves."""
    return TextGenerator(tiny_model("llama", max_position_embeddings=512, eos_token_id=None))


def batch_of(generator, slots: int, **settings) -> Batch:
    return Batch(generator.runners, generator.settings(**settings), slots, 400, lambda: None, keeps_texts=True)


def answered(generator, batch: Batch, prompt: list[int], length: int = 12) -> tuple[list[int], int]:
    request = generator.prepare(prompt, generator.settings(max_new_tokens=length))
    batch.add(request)
    while batch.busy:
        list(batch.steps())
    return request.generation.token_ids, request.generation.cached_prompt_tokens


@pytest.mark.parametrize("drafts", DRAFTS)
def test_a_prompt_starts_behind_what_it_shares_with_an_ended_text(generator, drafts):
    batch = batch_of(generator, 2, **DRAFTS[drafts])
    prompt = [7, 42, 99, 18, 3]
    text, known = answered(generator, batch, prompt)
    assert known == 0 and text == generator.generate(prompt, max_new_tokens=12).token_ids
    for more, shared in (
        ([*prompt, *text[:6], 250, 9], 11),  # a turn later
        ([*prompt, 200, 201], 5),
        (prompt, 4),  # its last token is run: it says what comes
        ([8, 42], 0),
    ):
        found, known = answered(generator, batch, more)
        assert (found, known) == (generator.generate(more, max_new_tokens=12).token_ids, shared)


def test_only_the_rest_of_the_prompt_is_run(generator, monkeypatch):
    batch = batch_of(generator, 1)
    text, _ = answered(generator, batch, [5, 6, 7] * 20)
    rows, run = [], generator.runner.run
    monkeypatch.setattr(generator.runner, "run", lambda x, *rest: rows.append(x.shape[1]) or run(x, *rest))
    answered(generator, batch, [5, 6, 7] * 20 + text[:4] + [9, 9], 1)
    assert rows == [2]


@pytest.mark.parametrize("drafts", DRAFTS)
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_conversations_that_come_and_go_get_their_own_texts(generator, slots, drafts):
    """Many conversations at once, some given up, each turn behind the last: every text is what it is alone."""
    random_ = random.Random(slots)
    batch = batch_of(generator, slots, **DRAFTS[drafts])
    talks = [[random_.randrange(300) for _ in range(random_.randint(2, 30))] for _ in range(max(2, slots))]
    reused = 0
    for _ in range(4):
        asked = {}
        for talk in random_.sample(talks, len(talks)):
            request = generator.prepare(talk, generator.settings(max_new_tokens=random_.randint(1, 14)))
            asked[id(talk)] = (talk, request)
            batch.add(request)
        given_up = random_.choice(list(asked))
        while batch.busy:
            list(batch.steps())
            if given_up in asked and random_.random() < 0.3:
                batch.cancel(asked.pop(given_up)[1])
        for talk, request in asked.values():
            answer = request.generation.token_ids
            assert answer == generator.generate(list(talk), max_new_tokens=len(answer)).token_ids
            reused += request.generation.cached_prompt_tokens
            talk += [*answer, random_.randrange(300)]
    assert reused > 50 or slots == 1  # where two take turns each puts the other out


def test_the_oldest_text_makes_room(generator):
    cache = generator.runner.new_cache(3, 8)
    kept = KeptTexts(cache)
    for slot in (2, 0, 1):
        cache.lengths[slot] = 3
        cache.kv[:, slot] = slot
        kept.keep(slot, [10 * slot, 1, 2, 3])
    assert kept.prepare(0, [5, 5]) == 0  # slot 2's text is the oldest
    assert sorted(text[0] for text in kept.texts.values()) == [0, 10]
    for slot, text in kept.texts.items():
        assert (cache.kv[:, slot, ..., :3, :] == text[0] / 10).all() and len(text) == 3
    assert kept.prepare(0, [10, 1, 2, 3]) == 3 and (cache.kv[:, 0, ..., :3, :] == 1).all()


def test_nothing_is_kept_where_states_are_observed_or_a_window_forgets(generator, tiny_model):
    model = tiny_model("llama", max_position_embeddings=512)
    adapted = TextGenerator(model, exit_adapter=ExitAdapter(model, AdapterShape(exit_layer=2)))
    windowed = TextGenerator(tiny_model("mistral", sliding_window=4, max_position_embeddings=512))
    for each, settings in ((adapted, {"draft": "adapter", "num_speculations": 2}), (windowed, {})):
        batch = batch_of(each, 2, **settings)
        for _ in range(2):
            request = each.prepare([7] * 300, each.settings(max_new_tokens=5))
            batch.add(request)
            while batch.busy:
                list(batch.steps())
            assert request.generation.cached_prompt_tokens == 0


def test_slots_exchange_what_they_hold(generator):
    cache = generator.runner.new_cache(3, 8)
    cache.kv.copy_(torch.randn(cache.kv.shape))
    cache.lengths = [3, 8, 5]
    before = cache.kv.clone()
    cache.exchange(2, 0)
    assert cache.lengths == [5, 8, 3]
    assert torch.equal(cache.kv[:, 0, ..., :5, :], before[:, 2, ..., :5, :])
    assert torch.equal(cache.kv[:, 2, ..., :3, :], before[:, 0, ..., :3, :])
    assert torch.equal(cache.kv[:, 1], before[:, 1])


def test_texts_that_leave_through_an_adapter_keep_nothing(generator, tiny_model):
    """Its blocks have a cache of their own."""
    model = tiny_model("llama", max_position_embeddings=512, eos_token_id=None)
    leaves = TextGenerator(model, exit_adapter=ExitAdapter(model, AdapterShape(2, joins_last_state=False)).eval())
    batch = batch_of(leaves, 2, exit_layer=2)
    for _ in range(2):
        request = leaves.prepare([7, 42, 99], leaves.settings(max_new_tokens=8, exit_layer=2))
        batch.add(request)
        while batch.busy:
            list(batch.steps())
        assert request.generation.cached_prompt_tokens == 0
        assert request.generation.token_ids == leaves.generate([7, 42, 99], max_new_tokens=8, exit_layer=2).token_ids

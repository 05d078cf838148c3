"""Batches: texts of unequal length side by side, coming and going, each as it would be alone."""

from collections import defaultdict

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.batch import Batch

PROMPTS = [[7, 42, 99], [5] * 30, [250], [18, 77, 3, 4], [9, 9, 9, 9, 9, 9], [31, 41, 59, 26, 53], [100]]
WAYS = {
    "autoregressive": {},
    "fixed_exit": {"exit_layer": 2},
    "layers": {"exit_layer": 2, "num_speculations": 3},
    "ngram": {"draft": "ngram", "num_speculations": 4},
}


@pytest.fixture
def generator(tiny_model, tiny_tokenizer):
    """Random text, one token in twelve of which ends it."""
    generator = TextGenerator(tiny_model("llama"), tiny_tokenizer)
    generator.eos_ids = tuple(range(0, 300, 12))
    return generator


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
@pytest.mark.parametrize("way", WAYS)
def test_a_batch_brings_the_texts_of_single_calls(generator, way, batch_size):
    settings = {"max_new_tokens": 30, "temperature": 1.5, "seed": 5, **WAYS[way]}
    together = dict(generator.generate_batch(PROMPTS, batch_size, **settings))
    assert sorted(together) == list(range(len(PROMPTS)))
    for index, prompt in enumerate(PROMPTS):
        alone = generator.generate(prompt, **{**settings, "seed": 5 + index})
        assert together[index].token_ids == alone.token_ids
        assert together[index].finish_reason == alone.finish_reason
        assert together[index].text == alone.text
        assert together[index].prompt_tokens == len(prompt)
    # Nothing would be seen to come and go if all texts ended together.
    assert len({len(one.token_ids) for one in together.values()}) > 1


def test_indices_name_and_seed_the_prompts(generator):
    settings = {"max_new_tokens": 12, "temperature": 1.5, "seed": 40}
    some = dict(generator.generate_batch(PROMPTS[2:4], indices=[7, 3], **settings))
    assert sorted(some) == [3, 7]
    assert some[7].token_ids == generator.generate(PROMPTS[2], **{**settings, "seed": 47}).token_ids
    assert some[3].seed == 43


def test_a_free_lane_is_taken_at_once(generator, monkeypatch):
    """In every round as many texts run as there are lanes, or texts left; what ends early is given out early."""
    running = []
    advance = Batch._advance
    monkeypatch.setattr(Batch, "_advance", lambda self: running.append(len(self.texts)) or advance(self))
    settings = {"temperature": 1.5, "seed": 5, "max_new_tokens": 30}
    lengths = {i: len(one.token_ids) for i, one in generator.generate_batch(PROMPTS, 3, **settings)}
    # A text is in a round for each of its tokens but the first, which the prompt's pass brings.
    assert sum(running) == sum(length - 1 for length in lengths.values())
    full = [count == 3 for count in running]
    assert full == sorted(full, reverse=True)  # once a lane stays free, no text was waiting
    first = next(iter(generator.generate_batch(PROMPTS, 3, **settings)))[0]
    assert lengths[first] == min(lengths[i] for i in range(3))


def test_streamed_pieces_of_a_batch_are_the_texts(generator):
    settings = {"max_new_tokens": 25, "temperature": 1.5, "seed": 1}
    texts = defaultdict(str)
    for index, piece in generator.stream_batch(["def add", "for i", "x"], 2, **settings):
        assert piece
        texts[index] += piece
    whole = dict(generator.generate_batch(["def add", "for i", "x"], 2, **settings))
    assert {index: one.text for index, one in whole.items() if one.text} == dict(texts)


def test_a_prompt_that_cannot_be_answered_is_named_before_any_work(generator, monkeypatch):
    monkeypatch.setattr(Batch, "round", None)
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt: is empty"):
        generator.generate_batch([[1], []])
    with pytest.raises(ValueError, match="batch_size: 0 is not a whole number from 1 up"):
        generator.generate_batch([[1]], 0)
    assert list(generator.generate_batch([])) == []


def test_the_cache_is_sized_to_the_request(generator):
    settings = generator.settings(max_new_tokens=10)
    made = []
    new_cache = generator.step.new_cache
    generator.step.new_cache = lambda lanes, slots: made.append((lanes, slots)) or new_cache(lanes, slots)
    generator.generate(PROMPTS[0], max_new_tokens=10, exit_layer=2, num_speculations=3)
    list(generator.generate_batch(PROMPTS, 4, max_new_tokens=10, exit_layer=2, num_speculations=3))
    # The last token of a text is never run; in a batch, lanes near their end draft along with the others.
    assert made == [(1, 3 + 10 - 1), (4, 30 + 10 - 1 + 3)]
    assert settings.max_new_tokens == 10


def test_memory_counts_every_weight_once(tiny_model):
    model = tiny_model("llama")
    parts = TextGenerator(model, weights="plain").memory()
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    assert sum(parts.values()) + norms == sum(p.nbytes for p in model.parameters())
    assert parts["head"] == 0 and parts["embedding"] == model.lm_head.weight.nbytes
    packed = TextGenerator(model, weights="packed").memory()
    assert packed["head"] == packed["embedding"]  # a tied head in another form is held beside the embedding
    rounded = TextGenerator(model, weights="plain", draft_weights="int8").memory()
    assert 0.25 * (parts["blocks"] + parts["embedding"]) < rounded["draft"] < 0.35 * sum(parts.values())


def test_lanes_move_when_a_text_leaves(tiny_model):
    """The cache's part of the engine alone: what lane 2 held is lane 0's, and nothing else has changed."""
    generator = TextGenerator(tiny_model("llama"))
    cache = generator.step.new_cache(3, 8)
    cache.states.copy_(torch.randn(cache.states.shape))
    cache.lengths = [3, 8, 5]
    before = cache.states.clone()
    cache.move(2, 0)
    assert cache.lengths == [5, 8, 5]
    assert torch.equal(cache.states[:, 0, ..., :5, :], before[:, 2, ..., :5, :])
    assert torch.equal(cache.states[:, 0, ..., 5:, :], before[:, 0, ..., 5:, :])
    assert torch.equal(cache.states[:, 1:], before[:, 1:])


def test_filler_beside_a_neighbours_guess_is_not_counted_as_drafted(generator):
    """Counts of n-gram drafts are a text's own, whatever its neighbours find in theirs."""
    settings = {"max_new_tokens": 40, "temperature": 0.0, **WAYS["ngram"]}
    generator.eos_ids = ()
    for index, one in generator.generate_batch(PROMPTS, 7, **settings):
        alone = generator.generate(PROMPTS[index], **settings)
        assert (one.drafted, one.accepted) == (alone.drafted, alone.accepted)


def test_every_text_ends_once(generator):
    """Also one that ends in the round that it joined: with one token, or with two."""
    for max_new_tokens in (1, 2, 3):
        ended = [index for index, _ in generator.generate_batch(PROMPTS, 2, max_new_tokens=max_new_tokens)]
        assert sorted(ended) == list(range(len(PROMPTS)))

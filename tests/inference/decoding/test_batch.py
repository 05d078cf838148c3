"""Batches: texts of unequal length side by side, coming and going, each as it would be alone."""

import gc
from collections import defaultdict

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.decoding.batch import Batch
from lskip.inference.drafting.cost_aware import CostAwareDraft
from lskip.inference.drafting.ngram import NgramIndex

PROMPTS = [[7, 42, 99], [5] * 30, [250], [18, 77, 3, 4], [9, 9, 9, 9, 9, 9], [31, 41, 59, 26, 53], [100]]
WAYS = {
    "autoregressive": {},
    "fixed_exit": {"exit_layer": 2},
    "layers": {"exit_layer": 2, "num_speculations": 3},
    "ngram": {"draft": "ngram", "num_speculations": 4},
}


@pytest.fixture
def generator(tiny_model, tiny_tokenizer):
    """Return a generator of random texts, which one token in twelve ends."""
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


def test_a_free_slot_is_taken_at_once(generator, monkeypatch):
    """In every round as many texts run as there are slots, or texts left; those that end early come out early."""
    running = []
    advance = Batch._advance
    monkeypatch.setattr(Batch, "_advance", lambda self: running.append(len(self.requests)) or advance(self))
    settings = {"temperature": 1.5, "seed": 5, "max_new_tokens": 30}
    lengths = {i: len(one.token_ids) for i, one in generator.generate_batch(PROMPTS, 3, **settings)}
    # A text is in a round for each of its tokens but the first, which the prefill brings.
    assert sum(running) == sum(length - 1 for length in lengths.values())
    full = [count == 3 for count in running]
    assert full == sorted(full, reverse=True)  # once a slot stays free, no text was waiting
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
    monkeypatch.setattr(Batch, "steps", None)
    with pytest.raises(ValueError, match=r"prompts\[1\]: prompt: is empty"):
        generator.generate_batch([[1], []])
    with pytest.raises(ValueError, match="batch_size: 0 is not a whole number from 1 up"):
        generator.generate_batch([[1]], 0)
    assert list(generator.generate_batch([])) == []


def test_the_cache_is_sized_to_the_request(generator):
    settings = generator.settings(max_new_tokens=10)
    made = []
    new_cache = generator.runner.new_cache
    generator.runner.new_cache = lambda slots, cells: made.append((slots, cells)) or new_cache(slots, cells)
    generator.generate(PROMPTS[0], max_new_tokens=10, exit_layer=2, num_speculations=3)
    list(generator.generate_batch(PROMPTS, 4, max_new_tokens=10, exit_layer=2, num_speculations=3))
    # The last token of a text is never run; in a batch, slots near their end draft along with the others.
    assert made == [(1, 3 + 10 - 1), (4, 30 + 10 - 1 + 3)]
    assert settings.max_new_tokens == 10


def test_memory_counts_every_weight_once(tiny_model):
    model = tiny_model("llama")
    parts = TextGenerator(model, weights="plain").memory()
    norms = sum(p.nbytes for name, p in model.named_parameters() if "norm" in name)
    assert sum(parts.values()) + norms == sum(p.nbytes for p in model.parameters())
    assert parts["head"] == 0 and parts["embedding"] == model.lm_head.weight.nbytes
    packed = TextGenerator(model, weights="packed").memory()
    assert packed["head"] == packed["embedding"]  # a tied head in another layout is kept beside the embedding
    rounded = TextGenerator(model, weights="plain", draft_weights="int8").memory()
    assert 0.25 * (parts["blocks"] + parts["embedding"]) < rounded["draft"] < 0.35 * sum(parts.values())


def test_slots_move_when_a_text_leaves(tiny_model):
    """Slot 0 of the cache gets the text of slot 2, and nothing else changes."""
    generator = TextGenerator(tiny_model("llama"))
    cache = generator.runner.new_cache(3, 8)
    cache.kv.copy_(torch.randn(cache.kv.shape))
    cache.lengths = [3, 8, 5]
    before = cache.kv.clone()
    cache.move(2, 0)
    assert cache.lengths == [5, 8, 5]
    assert torch.equal(cache.kv[:, 0, ..., :5, :], before[:, 2, ..., :5, :])
    assert torch.equal(cache.kv[:, 0, ..., 5:, :], before[:, 0, ..., 5:, :])
    assert torch.equal(cache.kv[:, 1:], before[:, 1:])


def test_filler_beside_a_neighbours_guess_is_not_counted_as_drafted(generator):
    """Counts of n-gram drafts are a text's own, whatever n-grams its neighbours have."""
    settings = {"max_new_tokens": 40, "temperature": 0.0, **WAYS["ngram"]}
    generator.eos_ids = ()
    for index, one in generator.generate_batch(PROMPTS, 7, **settings):
        alone = generator.generate(PROMPTS[index], **settings)
        assert (one.drafted, one.accepted) == (alone.drafted, alone.accepted)


def test_every_text_ends_once(generator):
    """A text may end in the round that it joined, with one token or with two."""
    for max_new_tokens in (1, 2, 3):
        ended = [index for index, _ in generator.generate_batch(PROMPTS, 2, max_new_tokens=max_new_tokens)]
        assert sorted(ended) == list(range(len(PROMPTS)))


def living_numbers() -> int:
    """Return the number of elements of all living tensors."""
    gc.collect()
    return sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor)


KEPT = [
    pytest.param("generate_batch", {}, id="B4 plain"),
    pytest.param("generate_batch", {"exit_layer": 2, "num_speculations": 6}, id="B4 layers"),
    pytest.param("generate_batch", {"exit_layer": 2, "num_speculations": 6, "acceptance": "rejection"}, id="rejection"),
    pytest.param("generate_batch", {"draft": "ngram", "num_speculations": 6}, id="ngram"),
    pytest.param("stream_batch", {"repetition_penalty": 1.2, "top_k": 50}, id="penalty, streamed"),
]


@pytest.mark.kind("B4 finished texts keep their noise")
@pytest.mark.parametrize(("method", "settings"), KEPT)
def test_texts_that_have_ended_keep_nothing(tiny_model, tiny_tokenizer, method, settings):
    generator = TextGenerator(tiny_model("llama", vocab_size=5000, eos_token_id=None), tiny_tokenizer)
    prompts = [[7, 8, 9, 7, 8, 9 + i] for i in range(50)]
    under_way = getattr(generator, method)(prompts, 4, max_new_tokens=8, temperature=1.0, seed=0, **settings)
    held, due = [], [12, 44]
    for index, _ in under_way:
        if due and index >= due[0]:
            held.append(living_numbers())
            due.pop(0)
    # A text's noise is 5,000 numbers a token; what is under way at a moment differs by some of it.
    assert abs(held[1] - held[0]) < 2 * 8 * 5000


def test_an_index_of_ngrams_is_gone_with_its_text(tiny_model):
    generator = TextGenerator(tiny_model("llama", eos_token_id=None))
    drafts = {"draft": "ngram", "num_speculations": 4}
    before = living_indices()  # of other tests
    for number, _ in enumerate(generator.generate_batch([[7, 8, 7, 8]] * 40, 4, max_new_tokens=6, **drafts)):
        if number == 30:
            assert living_indices() - before <= 8


def living_indices() -> int:
    gc.collect()
    return sum(type(each) is NgramIndex and bool(each.text) for each in gc.get_objects())


NOT_FINITE = "K8 what is not finite"


@pytest.mark.kind(NOT_FINITE)
@pytest.mark.parametrize(
    ("part", "value"),
    [
        pytest.param("model.norm.weight", float("nan"), id="B40 the norm, as with rms_norm_eps NaN"),
        pytest.param("model.layers.1.mlp.down_proj.weight", float("nan"), id="NaN in a block"),
        pytest.param("model.layers.0.mlp.up_proj.weight", 3e38, id="too large for float32"),
        pytest.param("lm_head.weight", float("inf"), id="an infinite head"),
    ],
)
def test_a_model_whose_logits_are_none_answers_nothing(tiny_model, part, value):
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_parameter(part)[:] = value
    generator = TextGenerator(model)
    for drafts in ({}, {"exit_layer": 2, "num_speculations": 2}):
        with pytest.raises(ValueError, match=r"^model: what it computes for this prompt is not finite"):
            generator.generate(PROMPTS[0], **drafts)
        with pytest.raises(ValueError, match=r"^model: what it computes"):
            list(generator.generate_batch(PROMPTS, 2, **drafts))


SIZES = "B15 B16 sizes without bounds"


@pytest.mark.kind(SIZES)
@pytest.mark.parametrize(
    "settings",
    [
        {"max_new_tokens": 10**12},
        {"max_new_tokens": 10**30},
        {"exit_layer": 2, "num_speculations": 10**9},
        {"draft": "ngram", "num_speculations": 10**18},
        {"exit_layer": 2, "num_speculations": 10**9, "draft_policy": CostAwareDraft()},
        {"temperature": 1.0, "top_k": 10**30},
        {"temperature": 1.0, "seed": 2**64 - 1},
        {"temperature": 1e-30, "seed": 0},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_numbers_beyond_all_bounds_take_what_the_context_takes(tiny_model, quick_costs, settings):
    generator = TextGenerator(tiny_model("llama", eos_token_id=None))
    base = {"max_new_tokens": 12} | settings
    ended = dict(generator.generate_batch(PROMPTS[:3], 10**9, **base))
    lengths = [min(base["max_new_tokens"], 128 - len(prompt)) for prompt in PROMPTS[:3]]
    assert [len(ended[index].token_ids) for index in range(3)] == lengths
    if settings.get("temperature", 0) < 1:
        plain = dict(generator.generate_batch(PROMPTS[:3], max_new_tokens=base["max_new_tokens"]))
        assert [ended[index].token_ids for index in range(3)] == [plain[index].token_ids for index in range(3)]


@pytest.mark.kind(SIZES)
def test_a_stop_string_longer_than_any_text_stops_nothing(tiny_model, tiny_tokenizer):
    generator = TextGenerator(tiny_model("llama", eos_token_id=None), tiny_tokenizer)
    assert len(generator.generate("x", max_new_tokens=50, stop_strings=["a" * 10**6]).token_ids) == 50


# Long prompts that join piece by piece


@pytest.mark.parametrize("way", WAYS)
def test_a_long_prompt_joins_piece_by_piece_while_others_go_on(tiny_model, tiny_tokenizer, way):
    """Every round brings the texts under way their tokens, though some end while the long prompt comes in."""
    generator = TextGenerator(tiny_model("llama", max_position_embeddings=2048), tiny_tokenizer)
    long = [token % 300 for token in range(7, 1500)]
    prompts = [[7, 42, 99], [250, 3], long, [18, 77]]
    settings = generator.settings(temperature=1.5, seed=5, **WAYS[way])
    lengths = (3, 40, 20, 20)
    requests = [
        generator.prepare(prompt, generator.settings(**{**vars(settings), "max_new_tokens": length}), index)
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]
    batch = Batch(generator.runners, settings, 3, 1600, lambda: None, bounds_prefill=True)
    for request in requests:
        batch.add(request)
    rounds = defaultdict(list)
    count = 0
    while batch.busy:
        count += 1
        got = {request.index: tokens for news in batch.steps() for request, tokens in news}
        for index, tokens in got.items():
            rounds[index].append(count)
            assert tokens
    assert rounds[2][0] - rounds[1][0] >= -(-len(long) // 256)  # it came in pieces
    assert rounds[1] == list(range(rounds[1][0], rounds[1][-1] + 1))  # and the other had its tokens in each round
    assert rounds[0][-1] < rounds[2][0]  # a slot before its own was free by then
    for request, prompt, length in zip(requests, prompts, lengths, strict=True):
        alone = generator.generate(prompt, **{**vars(settings), "max_new_tokens": length, "seed": 5 + request.index})
        assert request.generation.token_ids == alone.token_ids


def test_short_prompts_join_together_up_to_a_piece_of_a_long_one(tiny_model):
    """Sixty tokens each: four join before a round, in which the first texts draft while the others would wait."""
    generator = TextGenerator(tiny_model("llama", max_position_embeddings=512, eos_token_id=None))
    settings = generator.settings(max_new_tokens=20)
    requests = [generator.prepare([7 + index] * 60, settings) for index in range(6)]
    batch = Batch(generator.runners, settings, 6, 200, lambda: None, bounds_prefill=True)
    for request in requests:
        batch.add(request)
    begun = []
    for _ in range(3):
        list(batch.steps())
        begun.append(sum(bool(request.generation.token_ids) for request in requests))
    assert begun == [4, 6, 6]


def test_first_tokens_are_told_before_the_round_and_who_comes_meanwhile_joins_in_it(tiny_model):
    generator = TextGenerator(tiny_model("llama", eos_token_id=None))
    settings = generator.settings(max_new_tokens=20)
    one, other = (generator.prepare(prompt, settings) for prompt in PROMPTS[:2])
    batch = Batch(generator.runners, settings, 2, 100, lambda: None)
    batch.add(one)
    steps = batch.steps()
    assert next(steps) == [(one, generator.generate(PROMPTS[0], max_new_tokens=1).token_ids)]
    batch.add(other)
    assert next(steps) == [(other, generator.generate(PROMPTS[1], max_new_tokens=1).token_ids)]
    assert {request: len(tokens) for request, tokens in next(steps)} == {one: 1, other: 1}
    assert not list(steps)


def test_a_request_that_joins_can_be_cancelled(tiny_model, tiny_tokenizer):
    generator = TextGenerator(tiny_model("llama", max_position_embeddings=2048), tiny_tokenizer)
    settings = generator.settings(max_new_tokens=5)
    batch = Batch(generator.runners, settings, 1, 1024, lambda: None, bounds_prefill=True)
    one, other = generator.prepare([3] * 900, settings), generator.prepare([7, 42, 99], settings)
    batch.add(one)
    batch.add(other)
    assert list(batch.steps()) == [[]]  # its first piece, of four
    batch.cancel(one)
    while batch.busy:
        list(batch.steps())
    assert one.generation.token_ids == []
    assert other.generation.token_ids == generator.generate([7, 42, 99], max_new_tokens=5).token_ids

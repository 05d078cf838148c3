"""Prompts, stopping, streaming and the counts of TextGenerator."""

import pytest
import torch

from lskip.inference import TextGenerator
from lskip.inference.text import TextPieces, decode_text

PROMPT = [7, 42, 99, 3, 250, 18, 77]
SPECULATE = {"exit_layer": 2, "num_speculations": 5}


@pytest.fixture
def endless(tiny_model):
    """Return a generator without an end token that accepts every draft, and its text."""
    model = tiny_model("llama", eos_token_id=None)
    for layer in model.model.layers[2:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    generator = TextGenerator(model)
    return generator, generator.generate(PROMPT, max_new_tokens=60).token_ids


def test_end_token_inside_a_draft_ends_the_text(endless):
    generator, text = endless
    index = next(i for i in range(7, 60) if text[i] not in text[:i])
    generator.eos_ids = (299, text[index])
    ours = generator.generate(PROMPT, max_new_tokens=60, **SPECULATE)
    assert (ours.token_ids, ours.finish_reason) == (text[: index + 1], "eos")
    assert ours.accepted == sum(count * rounds for count, rounds in ours.accepted_counts.items())
    assert ours.accepted <= len(ours.token_ids) <= ours.accepted + ours.rounds
    assert generator.generate(PROMPT, max_new_tokens=60).token_ids == ours.token_ids


@pytest.mark.parametrize("max_new_tokens", range(1, 15))
def test_max_new_tokens_inside_a_draft(endless, max_new_tokens):
    generator, text = endless
    ours = generator.generate(PROMPT, max_new_tokens=max_new_tokens, **SPECULATE)
    assert (ours.token_ids, ours.finish_reason) == (text[:max_new_tokens], "length")
    assert ours.acceptance_rate in (None, 1.0)


@pytest.mark.parametrize("speculate", [{}, SPECULATE])
def test_the_context_ends_the_text(tiny_model, speculate):
    model = tiny_model("llama", max_position_embeddings=20, eos_token_id=None)
    ours = TextGenerator(model).generate(PROMPT, max_new_tokens=500, **speculate)
    assert (len(ours.token_ids), ours.finish_reason) == (13, "context")
    filled = TextGenerator(model).generate(PROMPT, max_new_tokens=13, **speculate)
    assert (filled.token_ids, filled.finish_reason) == (ours.token_ids, "length")


def test_streamed_pieces_are_the_text(tiny_model, tiny_tokenizer):
    generator = TextGenerator(tiny_model("llama"), tiny_tokenizer)
    for speculate in ({}, SPECULATE):
        stream = generator.stream("def add", max_new_tokens=50, temperature=1.2, seed=4, **speculate)
        pieces = list(stream)
        assert len(pieces) > 5
        assert "".join(pieces) == stream.generation.text
        assert stream.generation.text == decode_text(tiny_tokenizer, stream.generation.token_ids)
        assert (
            stream.generation.token_ids
            == generator.generate("def add", max_new_tokens=50, temperature=1.2, seed=4).token_ids
        )


def test_no_piece_ends_inside_a_character(tiny_tokenizer):
    text = "naïve 日本語 🙂 ok"
    ids = tiny_tokenizer(text)["input_ids"]
    assert len(ids) > len(text)  # characters of several tokens
    pieces = TextPieces(tiny_tokenizer)
    out = [pieces.push([token]) for token in ids]
    assert "".join(out) == text and pieces.rest() == ""
    assert not any("\ufffd" in piece for piece in out)
    assert "🙂" in out


def test_a_character_cut_off_at_the_end_is_not_lost(tiny_tokenizer):
    ids = tiny_tokenizer("a🙂")["input_ids"][:-1]
    pieces = TextPieces(tiny_tokenizer)
    out = [pieces.push([token]) for token in ids]
    assert "".join(out) == "a"
    assert "a" + pieces.rest() == decode_text(tiny_tokenizer, ids)


def test_leaving_a_stream_early_keeps_what_there_is(tiny_model, tiny_tokenizer):
    generator = TextGenerator(tiny_model("llama", eos_token_id=None), tiny_tokenizer)
    whole = generator.generate("x", max_new_tokens=30)
    stream = generator.stream("x", max_new_tokens=30)
    for _ in stream:
        break
    assert 0 < len(stream.generation.token_ids) < 30
    assert stream.generation.token_ids == whole.token_ids[: len(stream.generation.token_ids)]
    assert stream.generation.finish_reason is None


def test_grad_mode_is_the_callers_between_pieces(tiny_model, tiny_tokenizer):
    generator = TextGenerator(tiny_model("llama"), tiny_tokenizer)
    for _ in generator.stream("x", max_new_tokens=5, min_new_tokens=5):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_prompt_forms_agree(tiny_model, tiny_tokenizer):
    generator = TextGenerator(tiny_model("llama"), tiny_tokenizer)
    ids = tiny_tokenizer("for i in")["input_ids"]
    truth = generator.generate("for i in", max_new_tokens=10).token_ids
    for prompt in (ids, torch.tensor(ids), torch.tensor([ids])):
        ours = generator.generate(prompt, max_new_tokens=10)
        assert ours.token_ids == truth and ours.prompt_tokens == len(ids)


def test_a_chat_template_is_used_when_there_is_one(tiny_model, tiny_tokenizer):
    from copy import deepcopy

    tokenizer = deepcopy(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[me]{% endif %}"
    )
    generator = TextGenerator(tiny_model("llama"), tokenizer)
    templated = generator.generate(tokenizer("[user]hi[me]")["input_ids"], max_new_tokens=8)
    for ours in (
        generator.generate("hi", max_new_tokens=8),
        generator.generate([{"role": "user", "content": "hi"}], max_new_tokens=8),
    ):
        assert (ours.token_ids, ours.prompt_tokens) == (templated.token_ids, templated.prompt_tokens)
    plain = generator.generate("hi", max_new_tokens=8, chat=False)
    assert plain.prompt_tokens == len(tokenizer("hi")["input_ids"])


def test_defaults_come_from_the_generation_config(tiny_model, tiny_tokenizer):
    model = tiny_model("llama")
    model.generation_config.update(do_sample=True, temperature=0.6, top_k=40, top_p=0.9, max_new_tokens=17)
    model.generation_config.eos_token_id = [3, 9]
    generator = TextGenerator(model, tiny_tokenizer)
    defaults = generator.defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.max_new_tokens) == (0.6, 40, 0.9, 17)
    assert generator.eos_ids == (3, 9)
    model.generation_config.update(do_sample=False)
    assert TextGenerator(model).defaults.temperature == 0.0
    bare = tiny_model("llama", eos_token_id=None)
    assert TextGenerator(bare).defaults.max_new_tokens == 256
    assert TextGenerator(bare).eos_ids == ()
    assert TextGenerator(bare, tiny_tokenizer).eos_ids == (0,)


def test_counts_and_seconds(tiny_model):
    ours = TextGenerator(tiny_model("llama")).generate(PROMPT, max_new_tokens=20, min_new_tokens=20)
    assert (ours.prompt_tokens, len(ours.token_ids), ours.rounds) == (7, 20, 20)
    assert ours.seconds > 0 and ours.tokens_per_second == pytest.approx(20 / ours.seconds)

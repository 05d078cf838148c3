"""The end of a text, against decoding every prefix of it."""

import random
from itertools import pairwise

import pytest

from lskip.inference import TextGenerator
from lskip.inference.stopping import StopRule, stop_rule
from tests.tokenizer_kinds import KINDS, in_rounds, random_tokens, tokenizer_of

BYTES = "K1 text that depends on how its tokens come"


class Pieces:
    """Tokenizer whose token i is the i-th of some texts; it counts the tokens that it decodes."""

    def __init__(self, *pieces: str):
        self.pieces, self.decoded = pieces, 0

    def decode(self, ids, **_):
        self.decoded += len(ids)
        return "".join(self.pieces[token] for token in ids)


def expected(tokens, rule):
    """Return the first prefix that ends the text, and the reason, by brute force."""
    for num in range(1, len(tokens) + 1):
        text = rule.tokenizer.decode(tokens[:num], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokens[num - 1] in rule.eos_ids:
            return tokens[:num], "eos"
        if any(stop_string in text for stop_string in rule.stop_strings):
            return tokens[:num], "stop_string"
        if num == rule.max_new_tokens:
            return tokens[:num], rule.limit
    return tokens, None


def cut_in_rounds(rounds, rule):
    done, reason = [], None
    for tokens in rounds:
        kept, reason = rule.cut(tokens, done)
        done = done + kept
        if reason is not None:
            break
    return done, reason


def random_stop_strings(text, draw):
    """Return some strings that mostly are in the text, and one that mostly is not."""
    inside = [text[start : start + draw.choice([1, 3, 7, 30])] for start in draw.choices(range(len(text) + 1), k=2)]
    outside = draw.choice(["end.\n", "🙃", " ab", "##", "</s>", "m_end|>", "zzz" * 40])
    return tuple(text for text in (*inside, outside) if text and "\ufffd" not in text)


@pytest.mark.kind(BYTES)
@pytest.mark.parametrize("kind", KINDS)
def test_stop_strings_end_a_text_where_the_first_decoded_prefix_holds_one(kind):
    tokenizer, draw = tokenizer_of(kind), random.Random(0)
    reasons = []
    for _ in range(500):
        tokens = random_tokens(tokenizer, draw)
        text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
        eos_ids = frozenset([1]) if draw.random() < 0.5 else frozenset()
        stop_strings = random_stop_strings(text, draw) if draw.random() < 0.7 else ("zzz",)
        rule = StopRule(eos_ids, draw.randint(1, 60), "length", stop_strings, tokenizer)
        truth = expected(tokens, rule)
        assert cut_in_rounds(in_rounds(tokens, draw), rule) == truth
        reasons.append(truth[1])
    assert all(reasons.count(reason) >= 10 for reason in ("eos", "stop_string", "length"))


TOKENS = ["!", *(f"<0x{byte:02X}>" for byte in "\n🌍".encode())]


@pytest.mark.kind(BYTES)
@pytest.mark.parametrize(
    ("names", "rounds", "stop_string", "length"),
    [
        pytest.param(TOKENS, [1, 3, 2], "!\n", 2, id="F1 a round ends inside a character"),
        pytest.param(TOKENS, [1, 1, 4], "!\n", 2, id="F1 a token a round"),
        pytest.param(TOKENS, [6], "!\n", 2, id="all in one round"),
        pytest.param(TOKENS, [2, 4], "\n🌍", 6, id="the character is part of it"),
        pytest.param(TOKENS * 200, [5] * 240, "🌍!\n", 8, id="a long text"),
        pytest.param([*TOKENS[2:] * 100, "<0x0A>", *TOKENS[2:]], [7] * 58, "🌍\n", 401, id="a long run of bytes"),
    ],
)
def test_a_stop_string_before_a_cut_character(names, rounds, stop_string, length):
    tokenizer = tokenizer_of("byte fallback")
    ids, places = tokenizer.convert_tokens_to_ids(names), [0]
    for size in rounds:
        places.append(places[-1] + size)
    came = [ids[start:end] for start, end in pairwise(places)]
    rule = stop_rule([], 1, 5000, 10_000, (stop_string,), tokenizer)
    assert cut_in_rounds(came, rule) == (ids[:length], "stop_string")


@pytest.mark.kind(BYTES, "F1")
@pytest.mark.parametrize("num_speculations", [0, 1, 2, 3, 8])
def test_drafting_does_not_move_the_end(tiny_model, num_speculations):
    """The model's blocks add nothing, so that every exit agrees, and embedding and head alone decide the text."""
    import torch

    tokenizer = tokenizer_of("byte fallback")
    ids = tokenizer.convert_tokens_to_ids([*TOKENS, "a"])
    model = tiny_model("llama", vocab_size=300, tie_word_embeddings=False, eos_token_id=None)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for place, token in enumerate(ids):  # each is followed by the next
            model.model.embed_tokens.weight[token] = 0
            model.model.embed_tokens.weight[token, place] = 1
            model.lm_head.weight[ids[(place + 1) % len(ids)], place] = 1
    drafts = {"exit_layer": 2, "num_speculations": num_speculations} if num_speculations else {}
    generator = TextGenerator(model, tokenizer)
    assert generator.generate([ids[-1]], max_new_tokens=6, **drafts).text == "!\n🌍"
    ours = generator.generate([ids[-1]], max_new_tokens=6, stop_strings=["!\n"], **drafts)
    assert (ours.text, ours.finish_reason) == ("!\n", "stop_string")


def test_a_match_spans_tokens_and_rounds():
    rule = stop_rule((), 10, 100, 200, ("stop",), Pieces("s", "to", "pper", "st", " "))
    assert rule.cut([4, 0, 1], []) == ([4, 0, 1], None)
    assert rule.cut([2, 4, 4], [4, 0, 1]) == ([2], "stop_string")
    assert rule.cut([2], [4, 0, 4, 1]) == ([2], None)


def test_a_character_that_is_split_over_tokens_and_rounds(tiny_tokenizer):
    ids = tiny_tokenizer("a🙂b")["input_ids"]
    rule = stop_rule((), 10, 100, 200, ("🙂",), tiny_tokenizer)
    assert len(ids) == 6
    assert rule.cut(ids[:3], []) == (ids[:3], None)
    assert rule.cut(ids[3:], ids[:3]) == (ids[3:5], "stop_string")


def test_what_comes_first_in_token_order_ends_the_text():
    pieces = Pieces("a", "b", "<eos>", "")
    rule = stop_rule((2,), 10, 4, 200, ("ab",), pieces)
    assert rule.cut([0, 1, 2], []) == ([0, 1], "stop_string")
    assert rule.cut([0, 2, 1], []) == ([0, 2], "eos")
    assert rule.cut([1, 1, 0, 1], []) == ([1, 1, 0, 1], "stop_string")  # rather than "length"
    assert rule.cut([1, 1, 1, 0, 1], []) == ([1, 1, 1, 0], "length")  # not by what is beyond the limit
    assert stop_rule((2,), 10, 4, 200, ("<eos>",), pieces).cut([0, 2], []) == ([0, 2], "eos")


def test_special_tokens_count(tiny_tokenizer):
    rule = stop_rule((), 10, 100, 200, ("<|endoftext|>",), tiny_tokenizer)
    assert rule.cut([70, 0, 71], []) == ([70, 0], "stop_string")


def test_the_work_of_a_round_does_not_grow_with_the_text():
    pieces = Pieces("a", "b", "long piece")
    rule = stop_rule((), 10, 10**5, 10**6, ("ba", "bcd"), pieces)
    for done in ([2] * 50, [2] * 5000, [0] * 5000):
        pieces.decoded = 0
        assert rule.cut([0, 1], done) == ([0, 1], None)
        assert pieces.decoded < 60


def test_tokens_without_text_do_not_hide_a_match():
    rule = stop_rule((), 10, 10**4, 10**5, ("ab",), Pieces("a", "b", ""))
    assert rule.cut([1], [0] + [2] * 300) == ([1], "stop_string")


def test_without_stop_strings_worked_by_hand():
    rule = stop_rule((5, 6), prompt_tokens=10, max_new_tokens=4, context_length=100)
    assert rule.cut([1, 2], []) == ([1, 2], None)
    assert rule.cut([1, 2, 3], [7, 7]) == ([1, 2], "length")
    assert rule.cut([1, 6, 5], []) == ([1, 6], "eos")
    assert rule.cut([1, 1, 5], [7, 7]) == ([1, 1], "length")
    assert rule.cut([5], [7, 7, 7]) == ([5], "eos")
    assert stop_rule((), 98, 4, 100).cut([1, 2, 3], []) == ([1, 2], "context")


def test_a_prompt_that_fills_the_context():
    with pytest.raises(ValueError, match="prompt: 100 tokens leave no room"):
        stop_rule((), 100, 4, 100)

"""Where a text ends, against decoding every prefix of it."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lskip.inference.stopping import StopRule, stop_rule

WORDS = "stop the naïve Σtop 🙂🙃 stop\n\nend 語尾 a b ab aab end.\n"


@pytest.fixture(scope="module")
def sentence_tokenizer():
    """Marks spaces inside tokens and drops one at the start of whatever it decodes, as sentencepiece does."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    bpe.decoder = decoders.Metaspace()
    bpe.train_from_iterator([WORDS], trainers.BpeTrainer(vocab_size=80, special_tokens=["</s>"], show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")


class Pieces:
    """A tokenizer whose token i is the i-th of some texts; it counts the tokens that it decodes."""

    def __init__(self, *pieces: str):
        self.pieces, self.decoded = pieces, 0

    def decode(self, ids, **_):
        self.decoded += len(ids)
        return "".join(self.pieces[token] for token in ids)


def expected(tokens, rule):
    """The rule by brute force: the first prefix that ends the text, and why."""
    for num in range(1, len(tokens) + 1):
        text = rule.tokenizer.decode(tokens[:num], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if tokens[num - 1] in rule.eos_ids:
            return tokens[:num], "eos"
        if any(stop_string in text for stop_string in rule.stop_strings):
            return tokens[:num], "stop_string"
        if num == rule.max_new_tokens:
            return tokens[:num], rule.limit
    return tokens, None


def cut_in_rounds(tokens, rule, draw):
    done, reason = [], None
    while reason is None and len(done) < len(tokens):
        kept, reason = rule.cut(tokens[len(done) : len(done) + draw.randint(1, 6)], done)
        done = done + kept
    return done, reason


def random_tokens(tokenizer, draw):
    """A text with cut characters, joined tokens and an end-of-text token now and then."""
    ids = tokenizer(draw.choice([WORDS, WORDS[::-1]]))["input_ids"]
    pieces = [ids[start : start + draw.randint(1, 12)] for start in draw.choices(range(len(ids)), k=6)]
    tokens = [token for piece in pieces for token in piece]
    if draw.random() < 0.5:
        tokens.insert(draw.randrange(len(tokens)), 0)
    return tokens


def random_stop_strings(tokenizer, tokens, draw):
    """One that is in the text, mostly, and one that mostly is not."""
    text = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    start = draw.randrange(max(len(text), 1))
    inside = text[start : start + draw.randint(1, 7)]
    return tuple(
        text for text in (inside, draw.choice(["end.\n", "🙃", " ab", "尾 "])) if text and "\ufffd" not in text
    )


@pytest.mark.parametrize("name", ["tiny_tokenizer", "sentence_tokenizer"])
def test_stop_strings_end_a_text_where_the_first_decoded_prefix_holds_one(name, request):
    tokenizer = request.getfixturevalue(name)
    draw = random.Random(0)
    reasons = []
    for _ in range(400):
        tokens = random_tokens(tokenizer, draw)
        stop_strings = random_stop_strings(tokenizer, tokens, draw)
        rule = StopRule(frozenset([0]), draw.randint(1, 60), "length", stop_strings, tokenizer)
        truth = expected(tokens, rule)
        assert cut_in_rounds(tokens, rule, draw) == truth
        reasons.append(truth[1])
    assert all(reasons.count(reason) >= 10 for reason in ("eos", "stop_string", "length"))


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

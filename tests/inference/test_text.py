"""Pieces of a text as they are streamed, against the text decoded at once."""

import random

import pytest

from lskip.inference.text import TextPieces, decode_text
from tests.tokenizer_kinds import KINDS, in_rounds, random_tokens, tokenizer_of

BYTES = "K1 text that depends on how its tokens come"


def streamed(tokenizer, rounds) -> list[str]:
    pieces = TextPieces(tokenizer)
    return [*map(pieces.push, rounds), pieces.rest()]


@pytest.mark.kind(BYTES)
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_joined_are_the_text_however_its_tokens_come(kind):
    tokenizer, draw = tokenizer_of(kind), random.Random(0)
    readable = 0
    for _ in range(500):
        ids = random_tokens(tokenizer, draw)
        text = "".join(streamed(tokenizer, in_rounds(ids, draw)))
        assert text == decode_text(tokenizer, ids)
        whole = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if "\ufffd" not in whole:
            readable += 1
            assert text == whole
    assert readable > 100


@pytest.mark.kind(BYTES)
@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        pytest.param("!\n🌍", 3, ["!", "\n", "\ufffd"], id="F3 a newline before a cut character"),
        pytest.param("中🌍", 5, ["中", "\ufffd\ufffd"], id="a character before a cut one"),
        pytest.param("中文🌍b", 11, ["中", "文", "🌍", "b"], id="nothing cut"),
    ],
)
def test_what_was_given_stays_where_a_character_is_cut(text, tokens, expected):
    tokenizer = tokenizer_of("byte fallback")
    ids = tokenizer(text)["input_ids"][:tokens]
    assert [piece for piece in streamed(tokenizer, [[token] for token in ids]) if piece] == expected
    assert decode_text(tokenizer, ids) == "".join(expected)


@pytest.mark.kind(BYTES)
def test_a_special_token_takes_no_space_away():
    tokenizer = tokenizer_of("metaspace")
    (a,), (b,) = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "ab")
    assert "".join(streamed(tokenizer, [[a], [1], [b]])) == "a b"


@pytest.mark.kind(BYTES)
def test_what_never_becomes_a_character_is_not_held_back_for_ever():
    tokenizer = tokenizer_of("byte fallback")
    (byte,) = tokenizer.convert_tokens_to_ids(["<0xFF>"])
    pieces = TextPieces(tokenizer)
    given = "".join(pieces.push([byte]) for _ in range(600))
    assert len(given) >= 300 and set(given) == {"\ufffd"}
    assert given + pieces.rest() == "\ufffd" * 600

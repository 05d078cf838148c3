"""Tokenization of plain text, in bounded memory; special tokens that it spells are plain text."""

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from lskip.models.encoding import encode

PIECE = 2**18  # characters that are tokenized at once; each takes about 350 bytes
WINDOW = 64  # characters on each side of a cut by which it is checked
TRIES = 32


def encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the tokens of each text, without special tokens around it or in it."""
    options = {"add_special_tokens": False, "split_special_tokens": True}
    return encode(tokenizer, texts, "source", **options).input_ids if texts else []


def text_runs(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], limit: int | None = None
) -> Iterator[tuple[list[int], bool]]:
    """Yield the tokens of each text, of a long one in several runs, and whether a run is the text's last.

    A long text ends with the run that reaches `limit` tokens.
    """
    short = []
    for text in texts:
        if len(text) <= PIECE:
            short.append(text)
            continue
        yield from ((ids, True) for ids in encode_plain(tokenizer, short))
        short, count = [], 0
        for piece, is_last in cut_text(tokenizer, text):
            (ids,) = encode_plain(tokenizer, [piece])
            count += len(ids)
            is_last = is_last or (limit is not None and count >= limit)
            yield ids, is_last
            if is_last:
                break
    yield from ((ids, True) for ids in encode_plain(tokenizer, short))


def cut_text(tokenizer: PreTrainedTokenizerBase, text: str, size: int = PIECE) -> Iterator[tuple[str, bool]]:
    """Yield pieces of a text, and whether each is the last; joined, their tokens are the text's, where possible."""
    start = 0
    while len(text) - start > size:
        end, following = place_to_cut(tokenizer, text, start + size)
        yield text[start:end], False
        start = following
    yield text[start:], True


def place_to_cut(tokenizer: PreTrainedTokenizerBase, text: str, about: int) -> tuple[int, int]:
    """Return where a piece ends, before `about`, and where the next begins.

    A space at the cut is left out for tokenizers that put one before each text.
    """
    blanks = [about - WINDOW + each.start() for each in re.finditer(r"\s", text[about - WINDOW : about])]
    for place in [*reversed(blanks), *range(about, about - TRIES, -1)]:
        left, right = text[place - WINDOW : place], text[place : place + WINDOW]
        whole, first, second, without = encode_plain(tokenizer, [left + right, left, right, right[1:]])
        if first + second == whole:
            return place, place
        if right[:1].isspace() and first + without == whole:
            return place, place + 1
    return about, about


def special_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern | None:
    """Return a pattern that matches the special tokens in a text; None where there are none."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    spelled = sorted({*special, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, spelled))) if spelled else None

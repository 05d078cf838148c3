"""End of a text: at an end-of-text token, a stop string, the number of tokens asked for, or the context's end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from lskip.inference.text import LONGEST_HELD, UNFINISHED, decode_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Characters decoded before those that matter: a start inside a text may drop a space, or show up to three pieces of a
# character that was cut.
LOOKBACK = 8


@dataclass(frozen=True)
class StopRule:
    """End of a text: the first of `eos_ids`, the token that completes a stop string (both kept), or a length.

    Attributes:
        eos_ids: tokens that end a text.
        max_new_tokens: tokens that may be generated at most, the context's room considered.
        limit: the reason for an end there: "length" (as asked) or "context" (no more positions).
        stop_strings: looked for in what was generated, special tokens included, never in the prompt.
        tokenizer: needed with stop_strings.
    """

    eos_ids: frozenset[int]
    max_new_tokens: int
    limit: str
    stop_strings: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def cut(self, tokens: list[int], done: list[int]) -> tuple[list[int], str | None]:
        """Return the first of `tokens` that still belong to a text of `done` so far, and the reason for its end.

        Returns:
            The kept tokens, and "eos", "stop_string", "length" or "context"; None: the text goes on.
        """
        tokens = tokens[: self.max_new_tokens - len(done)]
        plain = list(takewhile(lambda token: token not in self.eos_ids, tokens))
        if num := self._until_stop_string(plain, done):
            return plain[:num], "stop_string"
        if len(plain) < len(tokens):
            return tokens[: len(plain) + 1], "eos"
        return tokens, self.limit if len(done) + len(tokens) == self.max_new_tokens else None

    def up_to_end(self, tokens: Sequence[int]) -> Sequence[int]:
        """Return the first of `tokens` up to one that ends a text, that one included; all where none does."""
        ends = (at for at, token in enumerate(tokens, start=1) if token in self.eos_ids)
        return tokens[: next(ends, len(tokens))]

    def _until_stop_string(self, tokens: list[int], done: list[int]) -> int:
        """Return how many of `tokens` complete a stop string; 0: they do not.

        Each prefix is tried: an incomplete character behind a stop string can make it unreadable again.
        """
        if self.stop_strings:
            for num in range(1, len(tokens) + 1):
                if self._completes_one(done, tokens[:num]):
                    return num
        return 0

    def _completes_one(self, done: list[int], tokens: list[int]) -> bool:
        """Return whether the last of `tokens`, behind `done`, completes a stop string.

        The work is bounded, however long the text, and where decoding starts depends on the text alone, not on its
        rounds.
        """
        characters = max(map(len, self.stop_strings)) + LOOKBACK
        size = characters  # as a rule a token is a character at least
        while True:
            start = self._no_character_cut(done, tokens, len(done) + len(tokens) - 1 - size)
            ids = [*done[start:], *tokens[max(start - len(done), 0) :]]
            if start == 0 or _num_characters(self._decode(ids[:-1])) >= characters:
                break
            size *= 2
        # A start inside a text may show what is not in it, such as the mark of a word's second part.
        text = self._decode(ids)[LOOKBACK // 2 if start else 0 :]
        return any(stop_string in text for stop_string in self.stop_strings)

    def _no_character_cut(self, done: list[int], tokens: list[int], start: int) -> int:
        """Return the last place up to `start` where decoding may begin, outside a run of byte tokens.

        A tokenizer shows no character of a run that is not valid UTF-8 throughout. A long run is cut between two
        characters.
        """
        values, first = self._byte_values, max(start, 0)

        def value(place: int) -> int | None:
            return values.get(done[place] if place < len(done) else tokens[place - len(done)])

        if not values:
            return first
        while first > 0 and value(first) is not None and value(first - 1) is not None:
            if start - first >= LONGEST_HELD and value(first) >> 6 != 0b10:  # no byte within a character
                break
            first -= 1
        return first

    @cached_property
    def _byte_values(self) -> dict[int, int]:
        """Byte by token id, of a tokenizer that writes characters it does not know as <0xE4><0xB8><0xAD>."""
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return {}
        vocabulary = self.tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        unknown = self.tokenizer.unk_token_id
        return {token: byte for byte, token in enumerate(vocabulary) if token not in (None, unknown)}

    def _decode(self, ids: list[int]) -> str:
        return decode_tokens(self.tokenizer, ids, skip_special_tokens=False)


def _num_characters(text: str) -> int:
    """Return a lower bound of the characters in `text`: of an incomplete one each byte is shown as a character."""
    return len(text) - 3 * text.count(UNFINISHED) // 4


def stop_rule(
    eos_ids: Iterable[int],
    prompt_tokens: int,
    max_new_tokens: int,
    context_length: int,
    stop_strings: tuple[str, ...] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> StopRule:
    """Return the rule for a prompt of `prompt_tokens` in a context of `context_length` positions.

    Raises:
        ValueError: the prompt leaves no room for a single token.
    """
    assert tokenizer is not None or not stop_strings, "stop strings are refused earlier without a tokenizer"
    room = context_length - prompt_tokens
    if room < 1:
        raise ValueError(
            f"prompt: {prompt_tokens} tokens leave no room for an answer in the model's context of {context_length}"
        )
    limit = "context" if room < max_new_tokens else "length"
    return StopRule(frozenset(eos_ids), min(max_new_tokens, room), limit, stop_strings, tokenizer)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...]:
    """Return the tokens that end a text: generation_config's, else the tokenizer's, else none.

    Ids beyond the model's vocabulary are left out. ValueError for what is no token id at all.
    """
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list | tuple) else [ids]
    if not all(type(token) is int for token in ids):
        raise ValueError(f"generation_config.eos_token_id: {ids!r} is not made of token ids (it comes with the model)")
    size = model.get_output_embeddings().weight.shape[0]
    return tuple(token for token in ids if 0 <= token < size)

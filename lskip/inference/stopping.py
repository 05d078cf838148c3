"""When a text ends: an end-of-text token, a stop string, the number of tokens asked for, or the context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerFast

from lskip.inference.text import LONGEST_HELD, UNFINISHED, decode_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Decoding that starts inside a text may drop a space or show up to three pieces of a character that was cut.
MARGIN = 8


@dataclass(frozen=True)
class StopRule:
    """Ends a text at the first token of `eos_ids`, or that completes a stop string (both kept), or at a number.

    Attributes:
        eos_ids: tokens that end a text.
        max_new_tokens: what may be generated at most, context included.
        limit: why it ends there: "length" (as asked) or "context" (no more positions).
        stop_strings: they are looked for in what was generated, special tokens included, never in the prompt.
        tokenizer: needed with stop_strings.
    """

    eos_ids: frozenset[int]
    max_new_tokens: int
    limit: str
    stop_strings: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def cut(self, tokens: list[int], done: list[int]) -> tuple[list[int], str | None]:
        """What of `tokens` belongs to a text that has generated `done` so far, and why it ends there.

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

    def _until_stop_string(self, tokens: list[int], done: list[int]) -> int:
        """How many of `tokens` it takes to complete a stop string; 0: they do not.

        Each is tried by itself: an incomplete character behind a stop string can make it unreadable again.
        """
        if self.stop_strings:
            for num in range(1, len(tokens) + 1):
                if self._completes_one(done, tokens[:num]):
                    return num
        return 0

    def _completes_one(self, done: list[int], tokens: list[int]) -> bool:
        """Whether the last of `tokens`, behind `done`, completes a stop string.

        Where decoding starts depends on the text alone, not on how it came in rounds. That is bounded work, however
        long the text.
        """
        characters = max(map(len, self.stop_strings)) + MARGIN
        size = characters  # as a rule a token is a character at least
        while True:
            start = self._no_character_cut(done, tokens, len(done) + len(tokens) - 1 - size)
            ids = [*done[start:], *tokens[max(start - len(done), 0) :]]
            if start == 0 or _num_characters(self._decode(ids[:-1])) >= characters:
                break
            size *= 2
        # Decoding that starts inside a text may show what is not in it, such as the mark of a word's second part.
        text = self._decode(ids)[MARGIN // 2 if start else 0 :]
        return any(stop_string in text for stop_string in self.stop_strings)

    def _no_character_cut(self, done: list[int], tokens: list[int], start: int) -> int:
        """The last place up to `start` where decoding may begin: the beginning of a run of byte tokens.

        Of a run that is wrong somewhere nothing is shown. Of a long one, the beginning of a character.
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
        """Token id -> byte, of a tokenizer that writes characters it does not know as <0xE4><0xB8><0xAD>."""
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return {}
        vocabulary = self.tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
        unknown = self.tokenizer.unk_token_id
        return {token: byte for byte, token in enumerate(vocabulary) if token not in (None, unknown)}

    def _decode(self, ids: list[int]) -> str:
        return decode_tokens(self.tokenizer, ids, skip_special_tokens=False)


def _num_characters(text: str) -> int:
    """How many characters `text` has at least: a byte of an incomplete one is shown as if it were one itself."""
    return len(text) - 3 * text.count(UNFINISHED) // 4


def stop_rule(
    eos_ids: Iterable[int],
    prompt_tokens: int,
    max_new_tokens: int,
    context_length: int,
    stop_strings: tuple[str, ...] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> StopRule:
    """The rule for a prompt of `prompt_tokens` in a context of `context_length` positions.

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
    """Tokens that end a text: generation_config's, else the tokenizer's, else none.

    What is no token of the model ends nothing. ValueError for what is no token id at all.
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

"""When a text ends: an end-of-text token, a stop string, the number of tokens asked for, or the context."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

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
        """How many of `tokens` it takes to complete a stop string; 0: they do not."""
        if not self.stop_strings:
            return 0
        tail = self._tail(done)
        if not self._has_stop_string(tail + tokens):
            return 0
        return next(num for num in range(1, len(tokens) + 1) if self._has_stop_string(tail + tokens[:num]))

    def _tail(self, done: list[int]) -> list[int]:
        """The end of `done` that can hold the beginning of a stop string: bounded work, however long the text."""
        characters = max(map(len, self.stop_strings)) + MARGIN
        size = characters  # as a rule a token is a character at least
        while size < len(done) and len(self._decode(done[-size:])) < characters:
            size *= 2
        return done[-size:]

    def _has_stop_string(self, ids: list[int]) -> bool:
        text = self._decode(ids)
        return any(stop_string in text for stop_string in self.stop_strings)

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


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
    """Tokens that end a text: generation_config's, else the tokenizer's, else none."""
    ids = model.generation_config.eos_token_id if model.generation_config is not None else None
    if ids is None and tokenizer is not None:
        ids = tokenizer.eos_token_id
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list | tuple) else (ids,)

"""When a text ends: an end-of-text token, the number of tokens asked for, or the context."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StopRule:
    """Ends a text at the first token of `eos_ids` (kept) or after `max_new_tokens`.

    Attributes:
        eos_ids: tokens that end a text.
        max_new_tokens: what may be generated at most, context included.
        limit: why it ends there: "length" (as asked) or "context" (no more positions).
    """

    eos_ids: frozenset[int]
    max_new_tokens: int
    limit: str

    def cut(self, tokens: list[int], done: int) -> tuple[list[int], str | None]:
        """The part of `tokens` that belongs to a text of `done` tokens so far, and why it ends (None: it goes on)."""
        for index, token in enumerate(tokens[: self.max_new_tokens - done]):
            if token in self.eos_ids:
                return tokens[: index + 1], "eos"
        tokens = tokens[: self.max_new_tokens - done]
        return tokens, self.limit if done + len(tokens) == self.max_new_tokens else None


def stop_rule(eos_ids: tuple[int, ...], prompt_tokens: int, max_new_tokens: int, context_length: int) -> StopRule:
    """The rule for a prompt of `prompt_tokens` in a context of `context_length` positions.

    Raises:
        ValueError: the prompt leaves no room for a single token.
    """
    room = context_length - prompt_tokens
    if room < 1:
        raise ValueError(
            f"prompt: {prompt_tokens} tokens leave no room for an answer in the model's context of {context_length}"
        )
    limit = "context" if room < max_new_tokens else "length"
    return StopRule(frozenset(eos_ids), min(max_new_tokens, room), limit)

"""Structured output: a text is chosen among the tokens with which it still follows its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

if TYPE_CHECKING:
    from llguidance import LLTokenizer
    from transformers import PreTrainedTokenizerBase

KEPT_MASKS = 64  # of the prefixes that were looked at last: a round's drafts are verified with those of drafting


class GrammarError(ValueError):
    """A grammar asks for too much work amid a text.

    Attributes:
        mask: whose.
    """

    def __init__(self, mask: GrammarMask, reason: str):
        super().__init__(f"json_schema, regex: {reason}")
        self.mask = mask


def grammar_tokenizer(
    tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos_ids: Sequence[int]
) -> LLTokenizer:
    """Return a tokenizer as llguidance takes it, which takes a second to make.

    Raises:
        ValueError: there is none, it is not a fast one, or no token ends a text.
    """
    from llguidance.hf import from_tokenizer

    if not eos_ids:
        raise ValueError("json_schema, regex: need a model with a token that ends a text, and it has none")
    if tokenizer is None:
        raise ValueError("json_schema, regex: need a tokenizer, and the model came without one")
    try:
        return from_tokenizer(tokenizer, n_vocab=max(vocab_size, len(tokenizer)), eos_token=list(eos_ids))
    except ValueError as error:
        raise ValueError(f"json_schema, regex: do not work with this tokenizer: {error}") from error


class GrammarMask(LogitsProcessor):
    """Leaves one text the tokens with which it can still become one of the grammar.

    It is asked for the same places while drafting and while verifying, and for places behind tokens that will be
    refused. So it goes by the tokens themselves: back to what they share with those before, and on from there.
    """

    def __init__(self, tokenizer: LLTokenizer, grammar: str, prompt_tokens: int):
        """Prepare for the text behind a prompt of so many tokens.

        Raises:
            ValueError: the grammar is too large.
        """
        from llguidance import LLMatcher

        self.prompt_tokens = prompt_tokens
        self._matcher = LLMatcher(tokenizer, grammar)
        if self._matcher.is_error():
            raise ValueError(f"json_schema, regex: {self._matcher.get_error().splitlines()[0]}")
        self._at: list[int] = []  # tokens that the matcher has consumed
        self._masks: dict[tuple[int, ...], Tensor | None] = {}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores [1, V] of the token behind input_ids [1, n], -inf for those that the grammar forbids.

        Raises:
            GrammarError: the grammar asks for too much work.
        """
        text = tuple(input_ids[0, self.prompt_tokens :].tolist())
        if text not in self._masks:
            while len(self._masks) >= KEPT_MASKS:
                del self._masks[next(iter(self._masks))]
            self._masks[text] = self._mask_behind(list(text), scores.shape[-1])
        mask = self._masks[text]
        if mask is None:
            return scores
        # What another rule forbids is still better than what the grammar does: where both leave nothing, it wins.
        allowed = scores.clamp(min=torch.finfo(scores.dtype).min)
        return torch.where(mask.to(scores.device), allowed, float("-inf"))

    def possible(self, text: list[int], guess: list[int]) -> list[int]:
        """Return the first tokens of a guess of what follows `text`, prompt included, before a forbidden one.

        Raises:
            GrammarError: the grammar asks for too much work.
        """
        self._go_behind(text[self.prompt_tokens :])
        allowed = self._matcher.validate_tokens(guess)
        self._check()
        return guess[:allowed]

    def _mask_behind(self, text: list[int], vocab_size: int) -> Tensor | None:
        """Return which tokens [V] may follow; None behind a token that may not be there, which is about to be refused.

        Behind the end of a text any may: what was drafted there is left out.
        """
        self._go_behind(text)
        if len(self._at) < len(text):
            return None
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return torch.from_numpy(np.unpackbits(bits, count=vocab_size, bitorder="little").astype(bool))

    def _go_behind(self, text: list[int]) -> None:
        """Lead the matcher behind a text, or before its first token that may not be there."""
        shared = 0
        for before, now in zip(self._at, text, strict=False):
            if before != now:
                break
            shared += 1
        self._matcher.rollback(len(self._at) - shared)
        consumed = self._matcher.try_consume_tokens(text[shared:])
        self._at = text[: shared + consumed]
        self._check()

    def _check(self) -> None:
        """Raise GrammarError where the matcher has given up: it forbids everything from then on."""
        if self._matcher.is_error():
            raise GrammarError(self, self._matcher.get_error().splitlines()[0])

"""What a prompt brought: its tokens and text, and the counts that tell how it was decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lskip.inference.text import TextPieces, decode_text


@dataclass
class Generation:
    """What one prompt brought.

    Attributes:
        text: the continuation, special tokens left out ("" without a tokenizer).
        token_ids: its tokens, an end-of-text token included.
        prompt_tokens: tokens of the prompt, chat template included.
        seconds: from the prompt's tokens to the last token; the prompt's own pass is part of it.
        finish_reason: "eos", "stop_string", "length" (max_new_tokens reached), "context" (no position left), or None
            while it runs or where the caller stopped it.
        drafted: tokens drafted. accepted: of these, how many are in the text.
        rounds: passes of the whole model (of the exit, at a fixed exit), the one that takes the prompt included.
        accepted_counts: accepted tokens of a drafting round -> how many rounds had that many.
        layers_run: with an exit criterion, blocks that the tokens after the first ran, in all.
        seed: fixes the sampled text; the one drawn when none was asked for.
        states: where they were asked for, [2, tokens of prompt and text, D] in bfloat16 on the CPU: after the exit's
            blocks, and after the final norm; zeros for the last token, which no block has seen.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    seconds: float = 0.0
    finish_reason: str | None = None
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    accepted_counts: Counter[int] = field(default_factory=Counter)
    layers_run: int = 0
    seed: int = 0
    states: Tensor | None = None

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / drafted; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float:
        """Emitted tokens per verification."""
        return len(self.token_ids) / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    @property
    def mean_exit_layer(self) -> float | None:
        """Blocks that a token ran on average; None without an exit criterion."""
        return self.layers_run / (len(self.token_ids) - 1) if self.layers_run else None

    def add(self, kept: list[int], drafted: int = 0, accepted: int = 0) -> None:
        """Counts a round of which `kept` tokens belong to the text: what follows a stop is accepted by nobody."""
        accepted = min(accepted, len(kept))
        self.token_ids += kept
        self.rounds += 1
        self.drafted += drafted
        self.accepted += accepted
        if drafted:
            self.accepted_counts[accepted] += 1


class TextStream:
    """A generation under way: iterate for pieces of text, each final and never a part of a character.

    `generation` holds what there is so far, complete once the iteration has ended. Leaving early (a break, or
    ctrl-C) is fine.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, rounds: Iterator[list[int]], generation: Generation):
        self._tokenizer, self._rounds, self._generation = tokenizer, rounds, generation

    def __iter__(self) -> Iterator[str]:
        if self._tokenizer is None:
            raise ValueError("prompt: streaming text needs a tokenizer, and the model came without one")
        pieces = TextPieces(self._tokenizer)
        for tokens in self._rounds:
            if piece := pieces.push(tokens):
                yield piece
        if piece := pieces.rest():
            yield piece

    def run(self) -> Generation:
        """Generates to the end."""
        for _ in self._rounds:
            pass
        return self.generation

    @property
    def generation(self) -> Generation:
        """The outcome so far."""
        if self._tokenizer is not None:
            self._generation.text = decode_text(self._tokenizer, self._generation.token_ids)
        return self._generation

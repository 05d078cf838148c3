"""The outcome of a prompt: its tokens and text, and counts of drafted and accepted tokens."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lskip.inference.drafting.draft import Draft
from lskip.inference.text import TextPieces, decode_text


class TextRound(NamedTuple):
    """One round of a text: what was drafted, and what became of it.

    Attributes:
        drafted: the drafted tokens; empty in a round that drafts nothing, and in the prefill.
        accepted: how many of them, from the first on, are in the text.
        own: the model's own token behind these; None where the text ended before it.
        draft: what drafted them; None: nothing did.
    """

    drafted: tuple[int, ...]
    accepted: int
    own: int | None
    draft: Draft | None

    @property
    def kinds(self) -> list[str]:
        """How each of its tokens came: "accepted" (drafted, and right), then the model's own.

        That one is "corrected" (in place of a draft that was wrong), "bonus" (behind drafts that were all right) or
        "plain" (nothing was drafted).
        """
        own = "plain" if not self.drafted else "bonus" if self.accepted == len(self.drafted) else "corrected"
        return ["accepted"] * self.accepted + ([] if self.own is None else [own])


@dataclass
class Generation:
    """The outcome of one prompt.

    Attributes:
        text: the continuation, special tokens left out ("" without a tokenizer).
        token_ids: its tokens, an end-of-text token included.
        logprobs: their log probabilities by the model's own logits; empty unless asked for.
        prompt_tokens: tokens of the prompt, chat template included.
        cached_prompt_tokens: how many of them were not run, since an earlier text of a server began with them.
        seconds: from the start of the prefill to the last token.
        finish_reason: "eos", "stop_string", "length" (max_new_tokens reached), "context" (no position left), or None
            while it runs or where the caller stopped it.
        drafted: tokens drafted.
        accepted: drafted tokens that are in the text.
        rounds: passes of the whole model (at a fixed exit: of its blocks), the prefill included.
        accepted_counts: number of accepted tokens -> drafting rounds with that number.
        history: every round in turn, the prefill's first. Its accepted and own tokens are `token_ids`.
        layers_run: with an exit criterion, the sum of the exit layers of all tokens but the first.
        seed: of sampling; where the settings name none, the one that was drawn.
        states: where they were asked for, [2, tokens of prompt and text, D] in bfloat16 on the CPU: after the exit's
            blocks, and after the final norm; zeros for the last token, which no block has seen.
    """

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    seconds: float = 0.0
    finish_reason: str | None = None
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    accepted_counts: Counter[int] = field(default_factory=Counter)
    history: list[TextRound] = field(default_factory=list)
    layers_run: int = 0
    seed: int = 0
    states: Tensor | None = None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def tokens_per_round(self) -> float:
        """Mean number of tokens that a round adds to the text."""
        return len(self.token_ids) / self.rounds if self.rounds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds if self.seconds else 0.0

    @property
    def mean_exit_layer(self) -> float | None:
        """Mean exit layer of the tokens after the first; None without an exit criterion."""
        return self.layers_run / (len(self.token_ids) - 1) if self.layers_run else None

    def add(self, kept: list[int], drafted: list[int], accepted: int, draft: Draft | None) -> None:
        """Add a round's `kept` tokens and its record; drafted tokens behind the end of the text are not accepted."""
        accepted = min(accepted, len(kept))
        own = kept[accepted] if accepted < len(kept) else None
        self.token_ids += kept
        self.rounds += 1
        self.drafted += len(drafted)
        self.accepted += accepted
        if drafted:
            self.accepted_counts[accepted] += 1
        self.history.append(TextRound(tuple(drafted), accepted, own, draft if drafted else None))


class TextStream:
    """A generation under way, as an iterable of pieces of text, each final and never a part of a character.

    `generation` is what there is so far, complete once the iteration has ended. It may be left early (a break, or
    Ctrl-C).
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
        """Generate to the end and return the outcome."""
        for _ in self._rounds:
            pass
        return self.generation

    @property
    def generation(self) -> Generation:
        """Outcome so far."""
        if self._tokenizer is not None:
            self._generation.text = decode_text(self._tokenizer, self._generation.token_ids)
        return self._generation

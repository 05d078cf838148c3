"""A prompt on its way to a text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from lskip.inference.decoding.sampling import TokenChooser
from lskip.inference.drafting.draft import Draft
from lskip.inference.generation import Generation
from lskip.inference.layers.kv_cache import PREFILL_ROWS
from lskip.inference.stopping import StopRule


@dataclass(eq=False)
class Request:
    """One prompt on its way to a text.

    Attributes:
        prompt: token ids.
        chooser: chooses its tokens.
        stop: ends its text.
        generation: the outcome so far.
        index: its place among the prompts of a batch.
        began: time of the start of its prefill, of time.perf_counter.
        most_drafted: tokens that a round may draft for it at most; None: as many as the batch's settings say.
        deepest_draft: exit layer of the drafts that it allows, at most; None: any.
    """

    prompt: list[int]
    chooser: TokenChooser
    stop: StopRule
    generation: Generation
    index: int = 0
    began: float = 0.0
    most_drafted: int | None = None
    deepest_draft: int | None = None

    @property
    def left(self) -> int:
        """Number of tokens that it may still get."""
        return self.stop.max_new_tokens - len(self.generation.token_ids)

    @property
    def ended(self) -> bool:
        return self.generation.finish_reason is not None

    def allows(self, draft: Draft) -> bool:
        return self.deepest_draft is None or draft.exit_layer <= self.deepest_draft

    def add(
        self,
        tokens: list[int],
        drafted: Sequence[int] = (),
        accepted: int = 0,
        draft: Draft | None = None,
        logprobs: Sequence[float] = (),
    ) -> list[int]:
        """Add a round's tokens up to the end of the text, and return these."""
        # What was drafted beyond its last token, or behind an end of the text, was drafted for its neighbours.
        drafted = self.stop.up_to_end(drafted[: self.left - 1])
        kept, self.generation.finish_reason = self.stop.cut(tokens, self.generation.token_ids)
        self.generation.add(kept, drafted, min(accepted, len(drafted)), draft)
        if self.chooser.logprobs:
            self.generation.logprobs += logprobs[: len(kept)]
        self.generation.seconds = time.perf_counter() - self.began
        self.chooser.text += kept
        return kept


@dataclass
class Joining:
    """A request whose prompt is under way, in the slot behind the texts that there were when it began.

    Attributes:
        pieces: runs a piece of the prompt at each step.
        start: tokens of the prompt that have been run.
    """

    request: Request
    slot: int
    pieces: Iterator[Tensor | None]
    start: int = 0

    @property
    def next_piece(self) -> int:
        """Number of tokens of the next piece."""
        return min(len(self.request.prompt) - self.start, PREFILL_ROWS)


class RequestError(ValueError):
    """One request cannot be answered; the others of its batch can.

    Attributes:
        request: which.
    """

    def __init__(self, request: Request, reason: ValueError):
        super().__init__(str(reason))
        self.request = request

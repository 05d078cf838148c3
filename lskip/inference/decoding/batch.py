"""Texts come and go: a batch whose lanes are refilled from a queue while the others go on (continuous batching)."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lskip.inference.decoding.batch_chooser import BatchChooser
from lskip.inference.decoding.early_exit import exit_round
from lskip.inference.decoding.engine import (
    LONGEST_DRAFT,
    Drafted,
    Lanes,
    Round,
    check_logits,
    draft,
    nothing_drafted,
    prefill,
    verify,
)
from lskip.inference.decoding.sampling import TokenChooser
from lskip.inference.decoding.state_recorder import StateRecorder
from lskip.inference.drafting.adapter import AdapterLanes, AdapterStep
from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import PLAIN, DraftPlan
from lskip.inference.drafting.ngrams import NgramIndex
from lskip.inference.drafting.policies import DraftPolicy, FixedDraft, drafts_of
from lskip.inference.exit_criteria import ExitCriterion, Logits
from lskip.inference.generation import Generation
from lskip.inference.runners.base import Step
from lskip.inference.runners.exit_head_runner import read_at
from lskip.inference.settings import GenerationSettings
from lskip.inference.stopping import StopRule

if TYPE_CHECKING:
    from lskip.models.exit_heads import TrainedExits


@dataclass(eq=False)
class Text:
    """One prompt and what becomes of it.

    Attributes:
        prompt: token ids.
        chooser: how its tokens are chosen.
        stop: when it ends.
        generation: the outcome, growing.
        ngrams: of prompt and outcome so far as `guess` has needed them.
        index: its place among the prompts of a batch.
    """

    prompt: list[int]
    chooser: TokenChooser
    stop: StopRule
    generation: Generation
    ngrams: NgramIndex = field(default_factory=NgramIndex)
    index: int = 0
    began: float = 0.0

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.stop.max_new_tokens - len(self.generation.token_ids)

    @property
    def ended(self) -> bool:
        return self.generation.finish_reason is not None

    def guess(self, num_speculations: int) -> list[int]:
        """Tokens that followed the same n-gram earlier in the text."""
        self.ngrams.push(self.chooser.text[len(self.ngrams.text) :])  # only here: most texts are never asked
        return self.ngrams.guess(num_speculations)

    def add(self, tokens: list[int], drafted: int = 0, accepted: int = 0) -> list[int]:
        """Takes a round's tokens up to where the text ends, and returns these."""
        kept, self.generation.finish_reason = self.stop.cut(tokens, self.generation.token_ids)
        self.generation.add(kept, drafted, accepted)
        self.generation.seconds = time.perf_counter() - self.began
        self.chooser.text += kept
        return kept


class Batch:
    """Decodes any number of texts, at most so many at a time as there are lanes.

    Lanes 0 … A-1 of the cache are in use. A text that ends gives its lane to the last one's, whose keys and values
    move, once; then waiting texts join behind it, each prefilled by itself.
    """

    def __init__(
        self,
        step: Step,
        draft_step: Step | None,
        settings: GenerationSettings,
        lanes: int,
        slots: int,
        costs: Callable[[], Costs],
        adapter: AdapterStep | None = None,
        exits: TrainedExits | None = None,
        recorder: StateRecorder | None = None,
    ):
        """Args:
        step: the model's blocks.
        draft_step: the same in rounded weights, or None.
        settings: how to draft and how deep to go; how tokens are chosen is each text's own.
        lanes: texts that are decoded at a time.
        slots: positions that the longest text needs, its last token left out.
        costs: measures what rounds cost, for a policy that asks.
        adapter: the model's exit adapter, or None.
        exits: what the model's exits have of their own, or None.
        recorder: keeps the states of each text for its Generation, where no adapter is; None: nobody does.
        """
        self.step, self.draft_step, self.settings, self.exits = step, draft_step, settings, exits
        self.full, num_speculations = full_depth(settings, step.num_layers), longest_draft(settings)
        # A lane near its end drafts as many as the others: room for what it will not keep.
        self.cache = step.new_cache(lanes, slots + (num_speculations if lanes > 1 else 0))
        self.lanes = Lanes(self.cache, torch.empty(0, dtype=torch.long, device=step.device))
        self.texts: list[Text] = []
        self.waiting: deque[Text] = deque()
        self.policy: DraftPolicy = settings.draft_policy or FixedDraft()
        self.criterion = bound(settings.exit_criterion, exits)
        self.stops_draft = bound(getattr(self.policy, "criterion", None), exits)
        self.reading = read_at(step, exits, self.full)
        exit_layer = None if adapter is None else adapter.shape.exit_layer
        self.drafts = drafts_of(settings, step.num_layers, draft_step is not None, exit_layer)
        self.recorder = self.lanes.observer = recorder
        self.adapter: AdapterLanes | None = None
        if any(draft.kind == "adapter" for draft in self.drafts):
            self.adapter = self.lanes.observer = AdapterLanes.beside(self.cache, adapter)
        if self.drafts:
            self.policy.begin(self.drafts, costs, num_speculations)

    def add(self, text: Text) -> None:
        """Queues a text; it joins when a lane is free."""
        self.waiting.append(text)

    @torch.inference_mode()
    def cancel(self, text: Text) -> None:
        """Takes a text out, whether it waits or runs."""
        if text in self.waiting:
            self.waiting.remove(text)
        elif text in self.texts:
            self._leave(self.texts.index(text))

    @property
    def busy(self) -> bool:
        """Whether there is a text that has not ended."""
        return bool(self.texts or self.waiting)

    @torch.inference_mode()
    def round(self) -> list[tuple[Text, list[int]]]:
        """Lets waiting texts join, and adds tokens to every text; returns what each one got."""
        news = self._join()
        if self.texts:
            for text, tokens in self._advance():
                news[text] = news.get(text, []) + tokens
        for lane in reversed(range(len(self.texts))):
            if self.texts[lane].ended:
                self._record(self.texts[lane], lane)
                self._leave(lane)
        return list(news.items())

    def _join(self) -> dict[Text, list[int]]:
        """Prefills waiting texts into free lanes; the prompt's pass brings the first token."""
        news = {}
        while self.waiting and len(self.texts) < len(self.cache.lengths):
            text = self.waiting.popleft()
            text.began = time.perf_counter()
            lane = len(self.texts)
            observer = None if self.lanes.observer is None else self.lanes.observer.begin(lane)
            logits = prefill(self.reading, self.cache.lane(lane), text.prompt, self.full, observer)
            check_logits(logits)
            self.cache.lengths[lane] = len(text.prompt)
            none = torch.empty(1, 0, dtype=torch.long, device=logits.device)
            _, token = BatchChooser([text.chooser]).settle(logits, none)
            news[text] = text.add(token.tolist())
            if text.ended:
                self._record(text, lane)
            else:
                self.texts.append(text)
                self.lanes.pending = torch.cat([self.lanes.pending, token])
        return news

    def _record(self, text: Text, lane: int) -> None:
        """Gives a text that has ended its states, before another has its lane."""
        if self.recorder is not None:
            text.generation.states = self.recorder.of(lane, len(text.prompt) + len(text.generation.token_ids) - 1)

    def _leave(self, lane: int) -> None:
        last = len(self.texts) - 1
        if lane != last:
            self.cache.move(last, lane)
            self.texts[lane] = self.texts[last]
            self.lanes.pending[lane] = self.lanes.pending[last]
            if self.lanes.observer is not None:
                self.lanes.observer.move(last, lane)
        self.texts.pop()
        self.lanes.pending = self.lanes.pending[:last]

    def _advance(self) -> list[tuple[Text, list[int]]]:
        chooser = BatchChooser([text.chooser for text in self.texts])
        outcome = self._speculate(chooser) if self.criterion is None else self._exit(chooser)
        return [self._take(lane, outcome) for lane in range(len(self.texts))]

    def _speculate(self, chooser: BatchChooser) -> Round:
        began = time.perf_counter()
        plan, drafted = self._draft(chooser)
        outcome = verify(self.reading, self.lanes, drafted, self.full, chooser)
        if self.drafts:
            self.policy.learn(plan, max(outcome.drafted), outcome.accepted, time.perf_counter() - began)
        return outcome

    def _exit(self, chooser: BatchChooser) -> Round:
        outcome, depths = exit_round(self.step, self.lanes, self.criterion, self.full, chooser, self.exits)
        for text, depth in zip(self.texts, depths, strict=True):
            text.generation.layers_run += depth
        return outcome

    def _take(self, lane: int, outcome: Round) -> tuple[Text, list[int]]:
        text = self.texts[lane]
        # What was drafted beyond a text's last token was drafted for its neighbours.
        drafted = min(outcome.drafted[lane], text.left - 1)
        return text, text.add(outcome.tokens[lane], drafted, min(outcome.accepted[lane], drafted))

    def _draft(self, chooser: BatchChooser) -> tuple[DraftPlan, Drafted]:
        """What the policy plans for this round, carried out."""
        nothing = PLAIN, nothing_drafted(self.lanes)
        most = self._most()
        if not self.drafts or most < 1:
            return nothing
        plan = self.policy.plan(len(self.texts), most)
        if plan.draft is not None and plan.draft.kind == "ngram":
            if (guessed := self._guess(plan.num_speculations)) is not None:
                return plan, guessed
            plan = self.policy.plan(len(self.texts), most, without=frozenset([plan.draft]))
        if plan.draft is None or plan.num_speculations == 0:
            return nothing
        step = self.draft_step if plan.draft.kind == "weights" else self.step
        exit_layer, goes_on = plan.draft.exit_layer, partial(self._goes_on, plan.draft.exit_layer)
        decode = self.adapter.reader() if plan.draft.kind == "adapter" else None
        reading = read_at(step, self.exits, exit_layer)
        drafted = draft(reading, self.lanes, exit_layer, plan.num_speculations, chooser, goes_on, decode)
        # States of rounded weights are not the model's own: verification starts at the first block. Both share the
        # cache: drafts see the model's own keys and values, and verification writes over theirs.
        return plan, drafted if step is self.step else Drafted(drafted.ids)

    def _most(self) -> int:
        """Tokens that a lane can be drafted: more than any text may still get is of no use, nor has it a slot."""
        room = self.cache.slots - 1 - max(self.lanes.starts)
        return min(room, max(text.left for text in self.texts) - 1, LONGEST_DRAFT)

    def _goes_on(
        self, exit_layer: int, logits: Logits, margins: Callable[[], Tensor] | None, ids: Tensor, states: Tensor
    ) -> bool:
        if self.stops_draft is not None:
            sure = self.stops_draft.exits(exit_layer, states[:, 0], states[:, 0], lambda: logits()[:, 0])
            return 2 * int((~sure).sum()) < len(sure)
        return self.policy.goes_on(
            lambda: logits()[:, 0].float().softmax(-1).gather(1, ids[:, None])[:, 0].tolist(),
            None if margins is None else lambda: margins().tolist(),
        )

    def _guess(self, num_speculations: int) -> Drafted | None:
        """Tokens that followed the same n-grams before; None when no text has any."""
        guesses = [text.guess(num_speculations) for text in self.texts]
        if not (longest := max(map(len, guesses))):
            return None
        filled = [guess + [0] * (longest - len(guess)) for guess in guesses]
        ids = torch.tensor(filled, device=self.step.device)
        return Drafted(ids, counts=[len(guess) for guess in guesses])


def bound(criterion: ExitCriterion | None, exits: TrainedExits | None) -> ExitCriterion | None:
    """A criterion for this model; ValueError if it needs an exit classifier that the model does not have."""
    return None if criterion is None else criterion.bound(None if exits is None else exits.classifier)


def longest_draft(settings: GenerationSettings) -> int:
    """Tokens that a round may draft in each lane at most."""
    return min(settings.num_speculations, LONGEST_DRAFT)


def full_depth(settings: GenerationSettings, num_layers: int) -> int:
    """Blocks that decide a token: all, or at a fixed exit its own."""
    return num_layers if settings.num_speculations else settings.exit_layer or num_layers

"""Continuous batching: a batch whose slots are refilled from a queue while the other texts go on."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from lskip.inference.decoding.batch_chooser import BatchChooser
from lskip.inference.decoding.early_exit import exit_round
from lskip.inference.decoding.engine import Round, logprobs_of, prefill, read, verify
from lskip.inference.decoding.grammar_mask import GrammarError
from lskip.inference.decoding.kept_texts import KeptTexts
from lskip.inference.decoding.probe import Probe, agreements
from lskip.inference.decoding.request import Joining, Request, RequestError
from lskip.inference.decoding.state_recorder import StateRecorder
from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import PLAIN, Draft, DraftPlan
from lskip.inference.drafting.drafter import Runners
from lskip.inference.drafting.drafts_on import DraftsOn
from lskip.inference.drafting.policies import DraftPolicy, FixedDraft
from lskip.inference.drafting.registry import DRAFTERS, drafts_of
from lskip.inference.drafting.round import (
    Drafted,
    Slots,
    check_drafted,
    check_plan,
    nothing_drafted,
    only_observer,
)
from lskip.inference.exit_criteria import bound
from lskip.inference.layers.kv_cache import PREFILL_ROWS
from lskip.inference.runners.adapter_exit_runner import AdapterExitRunner
from lskip.inference.runners.exit_head_runner import read_at
from lskip.inference.settings import GenerationSettings

LONGEST_DRAFT = PREFILL_ROWS - 1  # tokens in each slot that one pass may verify


class Batch:
    """Batch of requests, at most as many at a time as there are slots; others wait in a queue.

    Slots 0 … A-1 of the cache are in use. When a request ends, the one in the last slot moves into its slot, keys and
    values included. Waiting requests join behind the others, each prefilled alone.

    Attributes:
        requests: those with a slot, in the order of slots.
        joining: the one whose prefill is under way; None: there is none.
        waiting: those without.
    """

    def __init__(
        self,
        runners: Runners,
        settings: GenerationSettings,
        slots: int,
        cells: int,
        costs: Callable[[], Costs],
        recorder: StateRecorder | None = None,
        bounds_prefill: bool = False,
        keeps_texts: bool = False,
    ):
        """Make room in a cache.

        Args:
            runners: the model, and what may draft for it.
            settings: how to draft and how deep to go; each request's chooser has the settings of sampling.
            slots: requests that are decoded at a time.
            cells: cells that the longest text needs: one a token, but for its last.
            costs: measures what rounds cost, for a policy that asks.
            recorder: keeps the states of each text for its Generation, where there is no adapter; None: keep none.
            bounds_prefill: prefill PREFILL_ROWS tokens of prompts at most between two rounds of the texts under way.
            keeps_texts: a text that has ended keeps its slot's memory until that is needed, and a prompt that begins
                like it starts there; not where states are observed, or a window forgets.
        """
        self.runners, self.recorder, num_layers = runners, recorder, runners.model.num_layers
        self.most_prefilled = PREFILL_ROWS if bounds_prefill else math.inf
        self.full, num_speculations = settings.full_depth(num_layers), longest_draft(settings)
        self.runner = read_at(runners.model, runners.exits, self.full)
        if settings.exits_by_adapter(runners.available):
            self.runner = AdapterExitRunner(runners.model, runners.adapter.unrounded)
            self.full = self.runner.num_layers
        # A slot near its end drafts as many tokens as the others: cells for those that it will not keep.
        self.cache = self.runner.new_cache(slots, cells + (num_speculations if slots > 1 else 0))
        self.slots = Slots(self.cache, torch.empty(0, dtype=torch.long, device=runners.model.device))
        self.requests: list[Request] = []
        self.joining: Joining | None = None
        self.waiting: deque[Request] = deque()
        self.policy: DraftPolicy = settings.draft_policy or FixedDraft()
        self.criterion = bound(settings.exit_criterion, runners.exits)
        self.draft_criterion = bound(getattr(self.policy, "criterion", None), runners.exits)
        self.drafts = []
        if num_speculations:
            self.drafts = drafts_of(settings.draft, settings.exit_layer, runners.available)
        self.drafters = {draft.kind: DRAFTERS[draft.kind](runners, self.slots) for draft in self.drafts}
        self.slots.observer = only_observer(recorder, *(drafter.observer for drafter in self.drafters.values()))
        self.kept = None
        if keeps_texts and self.cache.keeps_all and self.slots.observer is None:
            self.kept = KeptTexts(self.cache)
        if self.drafts:
            self.policy.begin(self.drafts, costs, num_speculations)

    def add(self, request: Request) -> None:
        """Queue a request; it joins when a slot is free."""
        self.waiting.append(request)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Take a request out, whether it waits or runs."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif self.joining is not None and self.joining.request is request:
            self.joining = None
        elif request in self.requests:
            self._leave(self.requests.index(request))

    @property
    def busy(self) -> bool:
        """Whether there is a request that has not ended."""
        return bool(self.requests or self.joining or self.waiting)

    @torch.inference_mode()
    def steps(self) -> Iterator[list[tuple[Request, list[int]]]]:
        """Run a round: let waiting requests join, then add tokens to all; yield what requests got, step by step.

        Requests may be added and cancelled between two steps.

        Raises:
            RequestError: one cannot be answered; it is taken out, and the next round goes on with the others.
        """
        left = self.most_prefilled
        while (self.joining or self._begin_next()) and (piece := self.joining.next_piece) <= left:
            left -= piece
            yield self._prefill()
        if self.requests:
            news = self._advance()
            for slot in reversed(range(len(self.requests))):
                if self.requests[slot].ended:
                    self._record(self.requests[slot], slot)
                    self._leave(slot)
            yield news

    def _prefill(self) -> list[tuple[Request, list[int]]]:
        """Run the next piece of the prompt that joins; behind its last one return the text's first token."""
        request, self.joining.start = self.joining.request, self.joining.start + self.joining.next_piece
        try:
            states = next(self.joining.pieces)
            return [] if states is None else [(request, self._end_prefill(states))]
        except ValueError as error:
            self.joining = None
            raise RequestError(request, error) from error

    def _begin_next(self) -> bool:
        """Give the next waiting request a slot; return whether there is one, and room."""
        slot = len(self.requests)
        if not self.waiting or slot == len(self.cache.lengths):
            return False
        request = self.waiting.popleft()
        request.began = time.perf_counter()
        observer = None if self.slots.observer is None else self.slots.observer.begin(slot)
        for drafter in self.drafters.values():
            drafter.begin(slot)
        known = 0 if self.kept is None else self.kept.prepare(slot, request.prompt)
        request.generation.cached_prompt_tokens = known
        pieces = prefill(self.runner, self.cache.slot(slot), request.prompt, self.full, observer, known)
        self.joining = Joining(request, slot, pieces, known)
        return True

    def _end_prefill(self, states: Tensor) -> list[int]:
        """Give the request that joins its first token, and its place behind the others if it goes on."""
        request, slot = self.joining.request, self.joining.slot
        none = torch.empty(1, 0, dtype=torch.long, device=states.device)
        _, token, told = read(self.runner, states, none, BatchChooser([request.chooser]), check=True)
        self.joining = None
        self.cache.lengths[slot] = len(request.prompt)
        tokens = token.tolist()
        news = request.add(tokens, logprobs=logprobs_of(told, [tokens])[0])
        if request.ended:
            self._record(request, slot)
        else:
            if slot != len(self.requests):  # texts have ended since it began
                self._move(slot, len(self.requests))
            self.requests.append(request)
            self.slots.pending = torch.cat([self.slots.pending, token])
        return news

    def _record(self, request: Request, slot: int) -> None:
        """Store the states of a request that has ended in its Generation, before another has its slot."""
        if self.recorder is not None:
            request.generation.states = self.recorder.of(
                slot, len(request.prompt) + len(request.generation.token_ids) - 1
            )

    def _leave(self, slot: int) -> None:
        last, text = len(self.requests) - 1, self.requests[slot].chooser.text
        if slot != last:
            self._move(last, slot)
            self.requests[slot] = self.requests[last]
            self.slots.pending[slot] = self.slots.pending[last]
        self.requests.pop()
        self.slots.pending = self.slots.pending[:last]
        if self.kept is not None:
            self.kept.keep(last, text)

    def _move(self, source: int, target: int) -> None:
        """Move what is kept of the text in slot `source` to slot `target`, which has none."""
        if self.kept is None:
            self.cache.move(source, target)
        else:
            self.kept.exchange(source, target)
        if self.slots.observer is not None:
            self.slots.observer.move(source, target)
        for drafter in self.drafters.values():
            drafter.move(source, target)

    def _advance(self) -> list[tuple[Request, list[int]]]:
        chooser = BatchChooser([request.chooser for request in self.requests])
        try:
            outcome, draft = self._speculate(chooser) if self.criterion is None else (self._exit(chooser), None)
        except GrammarError as error:  # the round has changed nothing yet
            request = next(each for each in self.requests if error.mask in each.chooser.by_text)
            self._leave(self.requests.index(request))
            raise RequestError(request, error) from error
        return [
            (request, request.add(tokens, drafted, accepted, draft, logprobs))
            for request, tokens, drafted, accepted, logprobs in zip(self.requests, *outcome, strict=True)
        ]

    def _speculate(self, chooser: BatchChooser) -> tuple[Round, Draft | None]:
        began = time.perf_counter()
        plan, drafted = self._draft(chooser)
        plan, probe, foreseen = self._look(plan, chooser)
        outcome = verify(self.runner, self.slots, drafted, self.full, chooser, probe)
        if self.drafts:
            if plan.probed:
                self.policy.judge(agreements(plan.probed, probe, foreseen, outcome.tokens))
            most = max(map(len, outcome.drafted))
            self.policy.learn(plan, most, outcome.accepted, time.perf_counter() - began)
        return outcome, plan.draft

    def _look(
        self, plan: DraftPlan, chooser: BatchChooser
    ) -> tuple[DraftPlan, Probe | None, dict[Draft, list[list[int]]]]:
        """Return the plan with what can be told in this round, a probe of its exits, and what others foresee."""
        exits = [draft.exit_layer for draft in plan.probed if DRAFTERS[draft.kind].reads_exit]
        if exits and chooser.rejects:
            plan = plan._replace(probed=tuple(each for each in plan.probed if not DRAFTERS[each.kind].reads_exit))
            exits = []
        probe = Probe(self.runners, exits) if exits else None
        foreseeing = [draft for draft in plan.probed if DRAFTERS[draft.kind].foresees]
        # A round brings one token more than it drafts.
        most = plan.num_speculations + 1
        return plan, probe, {draft: chooser.possible(self.drafters[draft.kind].foresee(most)) for draft in foreseeing}

    def _exit(self, chooser: BatchChooser) -> Round:
        outcome, depths = exit_round(
            self.runners.model, self.slots, self.criterion, self.full, chooser, self.runners.exits
        )
        for request, depth in zip(self.requests, depths, strict=True):
            request.generation.layers_run += depth
        return outcome

    def _draft(self, chooser: BatchChooser) -> tuple[DraftPlan, Drafted]:
        """Return what the policy plans for this round, carried out; planned anew where a drafter has nothing."""
        most = self._most()
        without = frozenset(draft for draft in self.drafts if not all(each.allows(draft) for each in self.requests))
        self.slots.texts = [request.chooser.text for request in self.requests]
        self.policy.reach(sum(self.slots.starts) // len(self.slots.starts))
        while self.drafts and most >= 1:
            plan = self.policy.plan(len(self.requests), most, without)
            if plan.draft is None or plan.num_speculations == 0:
                return plan, nothing_drafted(self.slots)
            check_plan(plan, most, without)
            ends = [request.stop.eos_ids for request in self.requests]
            goes_on = DraftsOn(self.policy, self.draft_criterion, plan.draft.exit_layer, ends)
            drafter = self.drafters[plan.draft.kind]
            if (drafted := drafter.propose(plan.draft, plan.num_speculations, chooser, goes_on)) is not None:
                check_drafted(drafted, plan, len(self.requests))
                return plan, drafted
            without |= {plan.draft}
        return PLAIN, nothing_drafted(self.slots)

    def _most(self) -> int:
        """Return the most tokens that a round can draft in each slot, by what requests may get and by their cells."""
        room = self.cache.cells - 1 - max(self.slots.starts)
        allowed = [each.most_drafted for each in self.requests if each.most_drafted is not None]
        return min(room, max(request.left for request in self.requests) - 1, LONGEST_DRAFT, *allowed)


def longest_draft(settings: GenerationSettings) -> int:
    """Return the most tokens that a round may draft in each slot."""
    return min(settings.num_speculations, LONGEST_DRAFT)

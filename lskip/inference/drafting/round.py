"""Types that drafting and verification hand to each other in a round of decoding."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lskip.inference.drafting.draft import Draft, DraftPlan
from lskip.inference.layers.kv_cache import KVCache
from lskip.inference.runners.base import ModelRunner


class Chooser(Protocol):
    """Choice of tokens from logits; see BatchChooser."""

    takes_argmax: bool
    rejects: bool
    logprobs: bool

    def ban(self, logits: Tensor, drafted: Tensor) -> None: ...
    def sample(self, logits: Tensor, drafted: Tensor) -> Tensor: ...
    def verify(self, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]: ...
    def choose(self, logits: Tensor, drafted: Tensor) -> Tensor: ...
    def possible(self, guesses: list[list[int]]) -> list[list[int]]: ...


class Observer(Protocol):
    """Receiver of the states of the texts under way: AdapterSlots, StateRecorder."""

    exit_layer: int

    def begin(self, slot: int) -> Observer: ...
    def observe(
        self, exit_states: Tensor, last_states: Tensor, starts: list[int], accepted: list[int] | None = None
    ) -> None: ...
    def move(self, source: int, target: int) -> None: ...


def only_observer(*observers: Observer | None) -> Observer | None:
    """Return the one observer that there is, or None; ValueError where there are several."""
    found = [observer for observer in observers if observer is not None]
    if len(found) > 1:
        raise ValueError("draft: only one may observe states: states_at, the exit adapter or one drafter of your own")
    return found[0] if found else None


@dataclass
class Slots:
    """Texts under way, in the cache's first A slots.

    Attributes:
        pending: [A], the last token of each.
        texts: the tokens of each, prompt and answer so far, when a drafter is asked.
        observer: sees the states of all tokens that the texts keep, after its exit's blocks and after the final norm;
            None: there is none.
    """

    cache: KVCache
    pending: Tensor
    texts: list[list[int]] = field(default_factory=list)
    observer: Observer | None = None

    @property
    def starts(self) -> list[int]:
        """Positions of the pending tokens."""
        return self.cache.lengths[: len(self.pending)]


class Drafted(NamedTuple):
    """Drafted tokens, and the states with which verification goes on.

    Attributes:
        ids: [A, d].
        states: of the pending and of all drafted tokens but the last, [A, 1, D] each, after `exit_block` blocks
            of the model; empty where the draft left none.
        exit_block: blocks that the model need not run again for them.
        counts: drafted tokens of each slot, where the rest of its row is filler; None: d each.
    """

    ids: Tensor
    states: Sequence[Tensor] = ()
    exit_block: int = 0
    counts: list[int] | None = None


def check_plan(plan: DraftPlan, most: int, without: Collection[Draft]) -> None:
    """Raise ValueError where a policy plans more than it was asked for, or a draft that has nothing."""
    if not 1 <= plan.num_speculations <= most:
        raise ValueError(f"draft_policy: plans {plan.num_speculations} tokens, allowed in this round are 0 to {most}")
    if plan.draft in without:
        raise ValueError(f"draft_policy: plans {str(plan.draft)!r}, which has nothing to draft in this round")


def check_drafted(drafted: Drafted, plan: DraftPlan, slots: int) -> None:
    """Raise ValueError, naming the draft, unless ids and counts are of the shapes that were asked for."""
    ids, counts, most = drafted.ids, drafted.counts, plan.num_speculations
    if ids.dtype != torch.long or ids.dim() != 2 or len(ids) != slots or not 1 <= ids.shape[1] <= most:
        found = f"{list(ids.shape)} of {ids.dtype}"
        raise ValueError(f"draft: {str(plan.draft)!r} proposed ids {found}, not [{slots}, 1 to {most}] of torch.int64")
    if counts is not None and len(counts) != slots:
        raise ValueError(f"draft: {str(plan.draft)!r} proposed counts of {len(counts)} slots, not of {slots}")


def nothing_drafted(slots: Slots) -> Drafted:
    """Return the draft of a plain round."""
    return Drafted(slots.pending.new_empty(len(slots.pending), 0))


def find_argmax(runner: ModelRunner, x: Tensor, chooser: Chooser, drafted: Tensor) -> Tensor | None:
    """Return the argmax of x [A, n, D] where the chooser takes it and the runner finds it without all logits."""
    return runner.argmax(x, partial(chooser.ban, drafted=drafted)) if chooser.takes_argmax else None

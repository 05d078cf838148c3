"""Decoding a batch of texts: prefill, then rounds of draft and verify (arXiv 2404.16710, section 4.3).

Every text has a slot of the cache and, between rounds, one pending token: its last, which no block has seen yet.
A round drafts d tokens a slot, runs the blocks that the draft has not run once over the states that it left, and
keeps in each slot the longest prefix that the whole model agrees with, plus the model's own next token.
Autoregressive decoding is a round that drafts nothing; generating from a fixed exit is that on the first blocks.
What this file does not know: text, stopping, sampling, when slots come and go, how blocks are run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lskip.inference.layers.kv_cache import PREFILL_ROWS, KVCache
from lskip.inference.layers.lm_head import Argmax
from lskip.inference.runners.base import ModelRunner

LONGEST_DRAFT = PREFILL_ROWS - 1  # tokens in each slot that one pass may verify


class Chooser(Protocol):
    """How tokens are chosen: BatchChooser."""

    takes_argmax: bool

    def ban(self, logits: Tensor, drafted: Tensor) -> None: ...
    def sample(self, logits: Tensor, drafted: Tensor) -> Tensor: ...
    def verify(self, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]: ...


class Observer(Protocol):
    """Who sees the states of the texts under way: AdapterSlots, StateRecorder."""

    exit_layer: int

    def begin(self, slot: int) -> Observer: ...
    def observe(
        self, exit_states: Tensor, last_states: Tensor, starts: list[int], accepted: list[int] | None = None
    ) -> None: ...
    def move(self, source: int, target: int) -> None: ...


@dataclass
class Slots:
    """The texts under way, in the cache's first A slots.

    Attributes:
        pending: [A], the last token of each.
        observer: sees the states of all that they keep, at its exit and after the last block; None: nobody does.
    """

    cache: KVCache
    pending: Tensor
    observer: Observer | None = None

    @property
    def starts(self) -> list[int]:
        """Where the pending tokens stand."""
        return self.cache.lengths[: len(self.pending)]


class Drafted(NamedTuple):
    """What a draft leaves for verification.

    Attributes:
        ids: [A, d].
        states: of the pending and of all drafted tokens but the last, [A, 1, D] each, after `exit_block` blocks
            of the model; empty where something else drafted.
        exit_block: blocks that the model need not run again for them.
        counts: tokens of each slot that were drafted for it, where the rest of its row is filler; None: all.
    """

    ids: Tensor
    states: Sequence[Tensor] = ()
    exit_block: int = 0
    counts: list[int] | None = None


class Round(NamedTuple):
    """What a round brought, by slot: the tokens, how many were drafted, and how many of these are among the tokens."""

    tokens: list[list[int]]
    drafted: list[int]
    accepted: list[int]


def run_past(
    runner: ModelRunner, x: Tensor, cache: KVCache, starts: list[int], first: int, full: int, observer: Observer | None
) -> tuple[Tensor | None, Tensor]:
    """Blocks `first` … `full`-1 as `run` does: the states at an observer's exit (None without one), and at the end."""
    if observer is None:
        return None, runner.run(x, cache, starts, first, full)
    at_exit = runner.run(x, cache, starts, first, observer.exit_layer)
    return at_exit, runner.run(at_exit, cache, starts, observer.exit_layer, full)


def prefill(
    runner: ModelRunner, cache: KVCache, prompt: list[int], full: int, observer: Observer | None = None
) -> Tensor:
    """Runs blocks 0 … `full`-1 on a prompt, in pieces, into a `cache` of one slot, from its first cell on.

    Args:
        observer: of that slot.

    Returns:
        [1, 1, V]: the logits after its last token, the only ones that are needed.
    """
    start = 0
    for rows in torch.tensor([prompt], device=runner.device).split(PREFILL_ROWS, dim=1):
        at_exit, x = run_past(runner, runner.embed(rows, [start]), cache, [start], 0, full, observer)
        if observer is not None:
            observer.observe(at_exit, runner.norm(x), [start])
        start += rows.shape[1]
    return runner.decode(x[:, -1:])


def keep_agreeing(own: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """own [B, d+1], drafted [B, d] -> length of the prefix in which they agree [B], and `own` there [B]."""
    accepted = (own[:, :-1] == drafted).long().cumprod(1).sum(1)
    return accepted, own.gather(1, accepted[:, None])[:, 0]


def check_logits(logits: Tensor) -> None:
    """ValueError unless a token can be chosen by them; of numbers that are none, argmax takes any."""
    if not logits.max().isfinite():
        raise ValueError(
            "model: what it computes for this prompt is not finite (NaN or infinite logits); its weights or its config"
            " are broken, or dtype is too narrow for it"
        )


def nothing_drafted(slots: Slots) -> Drafted:
    """The draft of a plain round."""
    return Drafted(slots.pending.new_empty(len(slots.pending), 0))


def draft(
    runner: ModelRunner,
    slots: Slots,
    exit_block: int,
    num_speculations: int,
    chooser: Chooser,
    goes_on: Callable[[Callable[[], Tensor], Callable[[], Tensor] | None, Tensor, Tensor], bool] | None = None,
    decode: Callable[[Tensor, list[int]], Tensor] | None = None,
) -> Drafted:
    """Drafts up to `num_speculations` tokens a slot with blocks 0 … `exit_block`-1.

    Args:
        goes_on: is given, of what was drafted last, what makes the logits [A, 1, V], what makes the margin [A] between
            the two highest, the token ids [A] and the exit's states [A, 1, D]; False ends the draft. No margin from a
            GPU, which each drafted token would have to wait for, nor where noise has the last word.
        decode: makes logits [A, 1, V] of the exit's states [A, 1, D] and of where they stand; None: the runner's head.
    """
    starts, ids = slots.starts, slots.pending
    states, drafted = [], nothing_drafted(slots).ids
    tells_margins = chooser.takes_argmax and runner.device.type == "cpu"
    while True:
        position = [start + len(states) for start in starts]
        states.append(runner.run(runner.embed(ids[:, None], position), slots.cache, position, 0, exit_block))
        x = states[-1]
        logits = cache(partial(runner.decode, x) if decode is None else partial(decode, x, position))
        found = find_argmax(runner, x, chooser, drafted) if decode is None else None
        ids = chooser.sample(logits(), drafted) if found is None else found.ids[:, 0]
        drafted = torch.cat([drafted, ids[:, None]], 1)
        margins = partial(margin_of, logits, found) if tells_margins else None
        if len(states) == num_speculations or (goes_on is not None and not goes_on(logits, margins, ids, x)):
            return Drafted(drafted, states, exit_block)


def margin_of(logits: Callable[[], Tensor], found: Argmax | None) -> Tensor:
    """[A]: the lead of the highest of logits [A, 1, V], which are made only where nothing was found."""
    return lead(logits() if found is None else found.logits)[:, 0]


def lead(logits: Tensor) -> Tensor:
    """[..., V] -> [...]: how far the highest is above the next one; infinite where there is none."""
    if logits.shape[-1] == 1:
        return logits.new_full(logits.shape[:-1], torch.inf)
    first, second = logits.topk(2, -1).values.unbind(-1)
    return first - second


def find_argmax(runner: ModelRunner, x: Tensor, chooser: Chooser, drafted: Tensor) -> Argmax | None:
    """Of x [A, n, D], where the chooser takes the likeliest token and the runner finds it without logits."""
    return runner.argmax(x, partial(chooser.ban, drafted=drafted)) if chooser.takes_argmax else None


def verify(runner: ModelRunner, slots: Slots, drafted: Drafted, full: int, chooser: Chooser) -> Round:
    """Runs the rest of the `full` blocks over pending and drafted tokens, and settles what is kept.

    Adds 1 to d + 1 tokens to each slot.
    """
    starts, num_drafted = slots.starts, drafted.ids.shape[1]
    if drafted.states:
        last = [start + num_drafted for start in starts]
        x = runner.run(runner.embed(drafted.ids[:, -1:], last), slots.cache, last, 0, drafted.exit_block)
        x = torch.cat([*drafted.states, x], 1)
    else:
        x = runner.embed(torch.cat([slots.pending[:, None], drafted.ids], 1), starts)
    at_exit, x = run_past(runner, x, slots.cache, starts, drafted.exit_block, full, slots.observer)
    if (found := find_argmax(runner, x, chooser, drafted.ids)) is not None:
        accepted, own = keep_agreeing(found.ids, drafted.ids)
    else:
        accepted, own = chooser.verify(runner.decode(x), drafted.ids)
    # The round's one transfer from the device.
    table = torch.cat([accepted[:, None], own[:, None], drafted.ids], 1).tolist()
    if slots.observer is not None:
        slots.observer.observe(at_exit, runner.norm(x), starts, [count for count, *_ in table])
    slots.pending = own
    for slot, (count, *_) in enumerate(table):
        # Rolling back is not moving on: cells of refused tokens are beyond the new length, to be written over.
        slots.cache.lengths[slot] += 1 + count
    tokens = [[*ids[:count], token] for count, token, *ids in table]
    counts = drafted.counts or [num_drafted] * len(table)
    return Round(tokens, counts, [min(row[0], count) for row, count in zip(table, counts, strict=True)])

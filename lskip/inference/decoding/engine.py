"""Decoding of a batch of texts: prefill, then rounds of draft and verify (arXiv 2404.16710, section 4.3).

Every text has a slot of the cache and, between rounds, one pending token: its last, which no block has seen yet.
A round drafts d tokens a slot and runs the remaining blocks in one pass over the states that the draft left. Each slot
keeps the longest prefix that the full model agrees with, and the model's own next token.
Autoregressive decoding is rounds that draft nothing; a fixed exit is the same on the first blocks alone.
Stopping, sampling, slots' coming and going and the running of blocks are elsewhere.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lskip.inference.decoding.probe import Probe
from lskip.inference.drafting.round import Chooser, Drafted, Observer, Slots, find_argmax
from lskip.inference.layers.kv_cache import PREFILL_ROWS, KVCache
from lskip.inference.runners.base import ModelRunner


class Round(NamedTuple):
    """Outcome of a round, by slot.

    Attributes:
        tokens: the new tokens.
        drafted: the drafted ones.
        accepted: how many of these are among the new ones.
        logprobs: log probabilities of the new tokens; empty where no text of the batch asks for them.
    """

    tokens: list[list[int]]
    drafted: list[list[int]]
    accepted: list[int]
    logprobs: list[list[float]]


class LogProbs:
    """Log probabilities by a model's own logits, before anything is done to them."""

    def __init__(self, logits: Tensor):
        """Take logits [A, n, V] of new tokens, before they are written to."""
        self._logits, self._sums = logits, logits.float().logsumexp(-1)

    def of(self, tokens: list[list[int]]) -> list[list[float]]:
        """Return the log probabilities of each slot's tokens, at most n."""
        return [
            (self._logits[slot, range(len(row)), row].float() - self._sums[slot, : len(row)]).tolist()
            for slot, row in enumerate(tokens)
        ]


def choose(logits: Tensor, drafted: Tensor, chooser: Chooser) -> tuple[Tensor, Tensor, LogProbs | None]:
    """Return how many drafted tokens [A] are kept, the own token [A] behind them, and what is told of both."""
    told = LogProbs(logits) if chooser.logprobs else None
    return *chooser.verify(logits, drafted), told


def read(
    runner: ModelRunner, x: Tensor, drafted: Tensor, chooser: Chooser, check: bool = False
) -> tuple[Tensor, Tensor, LogProbs | None]:
    """Return what `choose` does of the logits of states x [A, n, D], without these where only the highest matters.

    Args:
        check: whether to raise ValueError where the highest is not finite; a GPU has to be waited for then.
    """
    if not chooser.logprobs and (found := find_argmax(runner, x, chooser, drafted)) is not None:
        return *keep_agreeing(found, drafted), None
    logits = runner.decode(x)
    if check:
        check_logits(logits)
    return choose(logits, drafted, chooser)


def logprobs_of(told: LogProbs | None, tokens: list[list[int]]) -> list[list[float]]:
    """Return the log probabilities of each slot's tokens; none where none are told."""
    return [[] for _ in tokens] if told is None else told.of(tokens)


def run_past(
    runner: ModelRunner, x: Tensor, cache: KVCache, starts: list[int], first: int, full: int, stops: Iterable[int]
) -> dict[int, Tensor]:
    """Run blocks `first` … `full`-1; return the states [A, n, D] after each of `stops` and after `full` blocks."""
    states = {}
    for last in sorted({*stops, full}):
        states[last] = x = runner.run(x, cache, starts, first, last)
        first = last
    return states


def _exit_of(observer: Observer | None) -> list[int]:
    """Return the exit that an observer sees, if there is one."""
    return [] if observer is None else [observer.exit_layer]


def prefill(
    runner: ModelRunner,
    cache: KVCache,
    prompt: list[int],
    full: int,
    observer: Observer | None = None,
    start: int = 0,
) -> Iterator[Tensor | None]:
    """Run blocks 0 … `full`-1 on a prompt, piece by piece, into a `cache` of one slot, from its first cell on.

    Args:
        observer: of that slot.
        start: tokens of the prompt whose keys and values the cache has already.

    Returns:
        None after each piece but the last; after that the states [1, 1, D] of the prompt's last token.
    """
    stops = _exit_of(observer)
    for rows in torch.tensor([prompt[start:]], device=runner.device).split(PREFILL_ROWS, dim=1):
        states = run_past(runner, runner.embed(rows, [start]), cache, [start], 0, full, stops)
        if observer is not None:
            observer.observe(states[observer.exit_layer], runner.norm(states[full]), [start])
        start += rows.shape[1]
        yield states[full][:, -1:] if start == len(prompt) else None


def keep_agreeing(own: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the length [B] of the prefix in which own [B, d+1] and drafted [B, d] agree, and `own` [B] behind it."""
    accepted = (own[:, :-1] == drafted).long().cumprod(1).sum(1)
    return accepted, own.gather(1, accepted[:, None])[:, 0]


def check_logits(logits: Tensor) -> None:
    """Raise ValueError where the highest logit is not finite, so that argmax would take any token."""
    if not logits.max().isfinite():
        raise ValueError(
            "model: what it computes for this prompt is not finite (NaN or infinite logits); its weights or its config"
            " are broken, or dtype is too narrow for it"
        )


def verify(
    runner: ModelRunner, slots: Slots, drafted: Drafted, full: int, chooser: Chooser, probe: Probe | None = None
) -> Round:
    """Run the rest of the `full` blocks over pending and drafted tokens, and add 1 to d + 1 tokens to each slot.

    Args:
        probe: is told what its exits say of the same positions; all blocks run then, whatever states the draft left.
    """
    if probe is not None:
        drafted = Drafted(drafted.ids, counts=drafted.counts)
    starts, num_drafted = slots.starts, drafted.ids.shape[1]
    if drafted.states:
        last = [start + num_drafted for start in starts]
        x = runner.run(runner.embed(drafted.ids[:, -1:], last), slots.cache, last, 0, drafted.exit_block)
        x = torch.cat([*drafted.states, x], 1)
    else:
        x = runner.embed(torch.cat([slots.pending[:, None], drafted.ids], 1), starts)
    stops = [*_exit_of(slots.observer), *([] if probe is None else probe.exits)]
    states = run_past(runner, x, slots.cache, starts, drafted.exit_block, full, stops)
    x = states[full]
    accepted, own, told = read(runner, x, drafted.ids, chooser)
    said = None if probe is None else probe.read(states, drafted.ids, chooser)
    # The round's one transfer from the device.
    table = torch.cat([accepted[:, None], own[:, None], drafted.ids], 1).tolist()
    if slots.observer is not None:
        slots.observer.observe(states[slots.observer.exit_layer], runner.norm(x), starts, [row[0] for row in table])
    slots.pending = own
    for slot, (count, *_) in enumerate(table):
        # Refused tokens need no rollback: their cells lie beyond the new length and are written over.
        slots.cache.lengths[slot] += 1 + count
    tokens = [[*ids[:count], token] for count, token, *ids in table]
    if said is not None:
        probe.compare(said, tokens)
    counts = drafted.counts or [num_drafted] * len(table)
    drafts = [ids[:count] for (_, _, *ids), count in zip(table, counts, strict=True)]
    right = [min(row[0], count) for row, count in zip(table, counts, strict=True)]
    return Round(tokens, drafts, right, logprobs_of(told, tokens))

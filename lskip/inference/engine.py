"""Decoding one sequence: prefill, then rounds of draft and verify (arXiv 2404.16710, section 4.3).

A round starts with tokens that no block has seen yet (`pending`: the end of the prompt, later the one token
that the last round ended with). It drafts d tokens with the first blocks, runs the rest of the blocks once over
the states that the draft left, and keeps the longest prefix that the whole model agrees with, plus the
model's own next token. Autoregressive decoding is a round that drafts nothing; generating from a fixed exit
is that on the first blocks. What this file does not know: text, stopping, sampling, how blocks are run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lskip.inference.cache import KVCache

PREFILL_ROWS = 256  # a pass's mask and activations grow with its rows: a long prompt goes in pieces

Chooser = Callable[[Tensor, int], Tensor]  # logits [N, V], position of the first -> token ids [N]


class Step(Protocol):
    """How blocks are run: LeanStep or ModuleStep. Rows [N, D] belong to consecutive positions."""

    num_layers: int
    device: torch.device

    def new_cache(self, slots: int) -> KVCache: ...
    def embed(self, ids: Tensor) -> Tensor: ...
    def run(self, x: Tensor, cache: KVCache, start: int, first: int, last: int) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...


class Depth(NamedTuple):
    """Blocks that draft, and blocks that decide (all of them, or `exit_layer` for a fixed exit)."""

    draft: int
    full: int


@dataclass
class Sequence:
    """One text being decoded. `cache.length` positions have been through every block; `pending` [P] follow."""

    cache: KVCache
    pending: Tensor

    @property
    def next_position(self) -> int:
        """Where the first token that is not known yet will stand."""
        return self.cache.length + len(self.pending)


class Round(NamedTuple):
    """What a round brought: `accepted` of `drafted` tokens and one of the model's own, in `tokens`."""

    tokens: list[int]
    drafted: int
    accepted: int


def prefill(step: Step, prompt: list[int], max_new_tokens: int, full: int, pending: int = PREFILL_ROWS) -> Sequence:
    """A sequence whose prompt has been through blocks 0 … `full`-1, except for its end, which the first round takes.

    Args:
        pending: how many tokens at most are left to the first round.
    """
    ids = torch.tensor(prompt, device=step.device)
    # The last token generated is never run, so the text needs one slot less than it has tokens.
    sequence = Sequence(step.new_cache(len(prompt) + max_new_tokens - 1), ids)
    while (surplus := len(sequence.pending) - pending) > 0:
        rows, sequence.pending = sequence.pending.tensor_split([min(surplus, PREFILL_ROWS)])
        step.run(step.embed(rows), sequence.cache, sequence.cache.length, 0, full)
        sequence.cache.length += len(rows)
    return sequence


def decode_round(
    step: Step, sequence: Sequence, depth: Depth, num_drafts: int, choose: Chooser, draft_step: Step | None = None
) -> Round:
    """One round, which adds 1 to `num_drafts` + 1 tokens to the text.

    Where `draft_step` drafts, with weights of its own, its states are not the model's: verification starts at the
    first block. Both share the cache: drafts see the model's own keys and values, and verification writes over theirs.
    """
    drafted, states = draft(draft_step or step, sequence, depth.draft, num_drafts, choose)
    if draft_step is None:
        first, states = depth.draft, exit_states(step, sequence, states, drafted, depth.draft)
    else:
        first, states = 0, step.embed(torch.cat([sequence.pending, *drafted]))
    own = verify(step, sequence, states, (first, depth.full), num_drafts, choose)
    tokens = torch.cat([*drafted, own]).tolist()  # the round's one transfer from the device
    drafted_ids, own_ids = tokens[:num_drafts], tokens[num_drafts:]
    accepted = agreeing_prefix(drafted_ids, own_ids)
    # Rolling back is not moving on: slots of refused tokens are beyond the new length, to be written over.
    sequence.cache.length += len(sequence.pending) + accepted
    sequence.pending = own[accepted : accepted + 1]
    return Round(own_ids[: accepted + 1], num_drafts, accepted)


def draft(
    step: Step, sequence: Sequence, exit_block: int, num_drafts: int, choose: Chooser
) -> tuple[list[Tensor], list[Tensor]]:
    """Drafts with blocks 0 … `exit_block`-1.

    Returns:
        The drafted tokens, each [1], and the states after these blocks of the pending tokens [P, D] and of all
        drafted ones but the last, each [1, D].
    """
    cache, position, ids = sequence.cache, sequence.cache.length, sequence.pending
    states, drafted = [], []
    for _ in range(num_drafts):
        states.append(step.run(step.embed(ids), cache, position, 0, exit_block))
        position += len(ids)
        ids = choose(step.decode(states[-1][-1:]), position)
        drafted.append(ids)
    return drafted, states


def exit_states(step: Step, sequence: Sequence, states: list[Tensor], drafted: list[Tensor], exit_block: int) -> Tensor:
    """[P + num_drafts, D]: `states`, and that of the last token, which no block has seen yet."""
    ids = drafted[-1] if drafted else sequence.pending
    position = sequence.cache.length + sum(map(len, states))
    return torch.cat([*states, step.run(step.embed(ids), sequence.cache, position, 0, exit_block)])


def verify(
    step: Step, sequence: Sequence, states: Tensor, blocks: tuple[int, int], num_drafts: int, choose: Chooser
) -> Tensor:
    """The model's own tokens [num_drafts + 1] for the positions from `next_position` on, given the draft.

    Args:
        states: [P + num_drafts, D], inputs of the first of `blocks` for the pending and the drafted tokens.
        blocks: from … to (not included).
    """
    x = step.run(states, sequence.cache, sequence.cache.length, *blocks)
    return choose(step.decode(x[-(num_drafts + 1) :]), sequence.next_position)


def agreeing_prefix(drafted: list[int], own: list[int]) -> int:
    """How many drafted tokens, from the first on, are the model's own."""
    accepted = 0
    while accepted < len(drafted) and drafted[accepted] == own[accepted]:
        accepted += 1
    return accepted

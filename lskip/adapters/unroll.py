"""The drafts of an exit adapter as decoding would make them: unrolled along a text, and what they would be worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import ExitAdapter

DRAFT_LENGTHS = (2, 4, 6)  # for which it is told how many tokens a round brings


def unrolled_states(
    adapter: ExitAdapter, exit_states: Tensor, last_states: Tensor, num_steps: int, starts: Tensor | None = None
) -> Iterator[Tensor]:
    """Yields for draft step j = 1, 2, … the states that the head reads, after the norm.

    Step 1 is computed at every position, [B, S, D]; each further one for the C rounds that begin at `starts` only, at
    the positions starts + j - 1, [B, C, D]: there it stands for the j-th token drafted. The model itself has run on
    what is before a round, so its queries see the keys of step 1 up to where the round began, and of each later step
    only the one of their own round. The second input is the last layer's state of the position before at step 1, and
    what the adapter made of that position one step earlier after that, which is trained through.

    Args:
        exit_states, last_states: [B, S, D], of the frozen model (padding at the right).
        starts: [C], ascending; None: every position. What a round would draft past the end means nothing.
    """
    joins, cache = adapter.shape.joins_last_state, DynamicCache()
    decoder, length = Decoder(adapter.body), exit_states.shape[1]
    windows = {decoder.window(block) for block in range(decoder.num_layers)}
    everywhere = torch.arange(length, device=exit_states.device)
    starts = everywhere if starts is None else starts
    began, previous = everywhere, one_later(last_states)
    for step in range(1, num_steps + 1):
        places = (began + step - 1).clamp(max=length - 1)
        here = exit_states if step == 1 else exit_states.index_select(1, places)
        masks = {window: chain_mask(began, length, step, window, exit_states.dtype) for window in windows}
        inputs = replace(decoder.block_inputs(here, places[None]), masks=masks, cache=cache)
        states = adapter.norm(adapter.run(adapter.joined(here, previous if joins else None), inputs))
        yield states
        previous = states.index_select(1, starts) if step == 1 else states
        began = starts


def one_later(states: Tensor) -> Tensor:
    """[B, S, D] moved by one position, zeros at the first."""
    return F.pad(states[:, :-1], (0, 0, 1, 0))


def chain_mask(starts: Tensor, length: int, step: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask [1, 1, C, length + (step - 1) C] of draft step `step` of C rounds.

    Its columns are the keys of step 1, at every position, and then those of steps 2 … `step`, a round each.
    """
    distance = starts[:, None] + step - 1 - torch.arange(length, device=starts.device)
    visible = [distance >= step - 1 if window is None else (distance >= step - 1) & (distance < window)]
    own = torch.eye(len(starts), dtype=torch.bool, device=starts.device)  # the last: no query is left without a key
    visible += [own & (window is None or step - earlier < window) for earlier in range(2, step + 1)]
    visible = torch.cat(visible, dim=1)
    mask = torch.zeros(visible.shape, dtype=dtype, device=starts.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def drafted_at(scored: Tensor, starts: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Where rounds that begin at `starts` [C] are at `step`.

    Returns:
        positions [C], the last one for what is past the end; and bool [B, C], which of them count: a round begins at
        a scored position, and ends with the last one.
    """
    places = starts + step - 1
    inside = places.clamp(max=scored.shape[1] - 1)
    return inside, scored[:, starts] & scored[:, inside] & (places == inside)


def report(hits: Sequence[Tensor]) -> dict:
    """Of held-out answers, [A, J] each: draft_agreement, agreement of steps 1 … J, tokens_per_round {d: …}.

    `draft_agreement` is step 1's. A step is only asked where the answer has had so many tokens: None where none has.
    """
    steps = range(hits[0].shape[1])
    asked = [torch.cat([answer[step:, step] for answer in hits]) for step in steps]
    agreement = [each.float().mean().item() if len(each) else None for each in asked]
    tokens = sum(len(answer) for answer in hits)
    per_round = {d: tokens / sum(num_rounds(answer.tolist(), d) for answer in hits) for d in DRAFT_LENGTHS}
    return {"draft_agreement": agreement[0], "agreement": agreement, "tokens_per_round": per_round}


def num_rounds(hits: list[list[bool]], num_speculations: int) -> int:
    """Rounds that decoding takes along one answer, hits [A][J]: each keeps its right drafts and adds a token."""
    rounds = start = 0
    while start < len(hits):
        accepted = 0
        while accepted < min(num_speculations, len(hits) - start) and hits[start + accepted][accepted]:
            accepted += 1
        start += accepted + 1
        rounds += 1
    return rounds

"""Drafts of an exit adapter unrolled along known texts, as decoding makes them, and their metrics."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import ExitAdapter

DRAFT_LENGTHS = (2, 4, 6)  # for which tokens_per_round is reported


def unrolled_states(
    adapter: ExitAdapter, exit_states: Tensor, last_states: Tensor, num_steps: int, starts: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield for draft step j = 1, 2, … the adapter's states after its norm, which the head reads.

    Step 1 is computed at every position, [B, S, D]; each further step only for the C rounds that begin at `starts`, at
    the positions starts + j - 1 of their j-th drafted tokens, [B, C, D]. In decoding, the model has verified all tokens
    before a round: queries therefore see the keys of step 1 up to the start of their round, and of each later step only
    the key of their own round. The second input is the last layer's state of the previous position in step 1, and after
    that the adapter's own state of that position from the step before, through which gradients flow.

    Args:
        adapter: the adapter.
        exit_states: [B, S, D], of the frozen model (padding at the right).
        last_states: [B, S, D], of the frozen model after the final norm.
        num_steps: number of draft steps.
        starts: [C], ascending; None: every position. States of rounds that go past the end are meaningless.
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
    """Return states [B, S, D] shifted by one position to the right, zeros at the first."""
    return F.pad(states[:, :-1], (0, 0, 1, 0))


def chain_mask(starts: Tensor, length: int, step: int, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return the additive mask [1, 1, C, length + (step - 1) C] of draft step `step` of C rounds.

    The columns are the keys of step 1 at every position, then for each of the steps 2 … `step` one key per round.
    """
    distance = starts[:, None] + step - 1 - torch.arange(length, device=starts.device)
    visible = [distance >= step - 1 if window is None else (distance >= step - 1) & (distance < window)]
    own = torch.eye(len(starts), dtype=torch.bool, device=starts.device)  # so no query is without a key
    visible += [own & (window is None or step - earlier < window) for earlier in range(2, step + 1)]
    visible = torch.cat(visible, dim=1)
    mask = torch.zeros(visible.shape, dtype=dtype, device=starts.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[None, None]


def drafted_at(scored: Tensor, starts: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Return the positions that rounds beginning at `starts` [C] draft in `step`, and which of them count.

    Returns:
        positions [C], clamped to the text; and bool [B, C], true where the round begins at a scored position and the
        drafted position is scored and inside the text.
    """
    places = starts + step - 1
    inside = places.clamp(max=scored.shape[1] - 1)
    return inside, scored[:, starts] & scored[:, inside] & (places == inside)


def draft_metrics(hits: Sequence[Tensor]) -> dict:
    """Return draft_agreement, agreement of steps 1 … J, and tokens_per_round {d: …} for hits [A, J] of each answer.

    `draft_agreement` is that of step 1. Step j counts from the j-th token of an answer on; None if no answer has it.
    """
    steps = range(hits[0].shape[1])
    asked = [torch.cat([answer[step:, step] for answer in hits]) for step in steps]
    agreement = [each.float().mean().item() if len(each) else None for each in asked]
    tokens = sum(len(answer) for answer in hits)
    per_round = {d: tokens / sum(num_rounds(answer.tolist(), d) for answer in hits) for d in DRAFT_LENGTHS}
    return {"draft_agreement": agreement[0], "agreement": agreement, "tokens_per_round": per_round}


def num_rounds(hits: list[list[bool]], num_speculations: int) -> int:
    """Return the number of rounds to decode one answer, hits [A][J]: a round accepts drafts up to the first miss."""
    rounds = start = 0
    while start < len(hits):
        accepted = 0
        while accepted < min(num_speculations, len(hits) - start) and hits[start + accepted][accepted]:
            accepted += 1
        start += accepted + 1
        rounds += 1
    return rounds

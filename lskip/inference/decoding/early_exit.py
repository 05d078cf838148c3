"""Early exit without verification: a criterion decides how deep each token goes, so the text is another one.

A token that has exited has no states above its exit for later tokens to attend to. Blocks above the exit make their
keys and values from its exit state instead (CALM, Schuster et al., arXiv 2207.07061).
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from lskip.inference.decoding.engine import Round, choose, logprobs_of
from lskip.inference.drafting.round import Chooser, Slots, nothing_drafted
from lskip.inference.exit_criteria import ExitCriterion, Logits
from lskip.inference.runners.base import ModelRunner
from lskip.inference.runners.exit_head_runner import read_at

if TYPE_CHECKING:
    from torch import Tensor

    from lskip.models.exit_heads import TrainedExits


def exit_round(
    runner: ModelRunner,
    slots: Slots,
    criterion: ExitCriterion,
    full: int,
    chooser: Chooser,
    trained: TrainedExits | None = None,
) -> tuple[Round, list[int]]:
    """Add one token to each slot, chosen at its own exit: after all `full` blocks where the criterion names none.

    Args:
        trained: affine maps of the exits; None: there are none.

    Returns:
        The round, and the exit layer of each slot's token.
    """
    logits, depths = descend(runner, slots, criterion, full, trained)
    _, slots.pending, told = choose(logits()[:, None], nothing_drafted(slots).ids, chooser)
    tokens = [[token] for token in slots.pending.tolist()]
    for slot in range(len(tokens)):
        slots.cache.lengths[slot] += 1
    return Round(tokens, [[] for _ in tokens], [0] * len(tokens), logprobs_of(told, tokens)), depths


def descend(
    runner: ModelRunner, slots: Slots, criterion: ExitCriterion, full: int, trained: TrainedExits | None = None
) -> tuple[Logits, list[int]]:
    """Run the pending tokens block by block until all have exited, and fill the cache above.

    All slots go through the blocks while one does: a few rows cost about what one does. One that has exited keeps its
    exit state, and each further block makes keys and values from it.

    Returns:
        Logits of the exits [A, V], and the exit layer of each slot.
    """
    starts = slots.starts
    x = runner.embed(slots.pending[:, None], starts)
    logits, depths = exit_logits(runner, x), [full] * len(starts)
    gone = torch.zeros(len(starts), dtype=torch.bool, device=x.device)
    for exit_layer in range(1, full + 1):
        before, x = x, runner.run(x, slots.cache, starts, exit_layer - 1, exit_layer)
        x = torch.where(gone[:, None, None], before, x)
        logits = exit_logits(read_at(runner, trained, exit_layer), x)
        if exit_layer == full or not criterion.looks_at(exit_layer):
            continue
        gone = gone | criterion.exits(exit_layer, before[:, 0], x[:, 0], logits)
        depths = [min(depth, exit_layer) if out else depth for depth, out in zip(depths, gone.tolist(), strict=True)]
        if max(depths) <= exit_layer:
            runner.fill(x, slots.cache, starts, exit_layer, full)
            break
    return logits, depths


def exit_logits(runner: ModelRunner, x: Tensor) -> Logits:
    """Return a function that decodes x [A, 1, D] to [A, V] when first called, and only then."""
    return cache(lambda: runner.decode(x)[:, 0])

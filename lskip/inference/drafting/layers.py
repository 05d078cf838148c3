"""Self-speculation: the model's own first layers draft (arXiv 2404.16710, section 4.3)."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import Draft
from lskip.inference.drafting.drafter import Available, Drafter, GoesOn
from lskip.inference.drafting.round import Chooser, Drafted, Slots, find_argmax, nothing_drafted
from lskip.inference.runners.base import ModelRunner


class LayersDrafter(Drafter):
    """Drafter of the model's blocks 1 … exit_layer; verification goes on from their keys, values and states."""

    kind = "layers"
    takes_exit = True
    leaves_states = True
    reads_exit = True

    @classmethod
    def check(cls, available: Available, exit_layer: int | None, count: int) -> None:
        if count and available.adapter_exit is not None:
            raise ValueError("draft: 'layers' does not go with an exit_adapter; use 'adapter', or load the model alone")
        if count and exit_layer in (None, available.num_layers):
            raise ValueError(
                f"num_speculations: {count} needs an exit_layer from 1 to {available.num_layers - 1} to draft"
                f" with (it is {exit_layer}), draft_weights, an exit_adapter, or draft 'ngram'"
            )

    @classmethod
    def drafts(cls, available: Available, exit_layer: int | None) -> list[Draft]:
        if available.adapter_exit is not None:
            return []
        exits = [exit_layer] if exit_layer else usual_exits(available.num_layers)
        return [Draft(cls.kind, each) for each in exits if each < available.num_layers]

    @classmethod
    def seconds(cls, draft: Draft, count: int, slots: int, costs: Costs) -> float:
        # Verification needs the states of the last drafted token too.
        last = draft.exit_layer * costs.model.block_seconds(slots)
        return count * costs.model.draft_seconds(draft.exit_layer, slots) + last

    def propose(self, draft: Draft, count: int, chooser: Chooser, goes_on: GoesOn) -> Drafted:
        runner = self.runners.reading_drafts(self.runners.model, draft.exit_layer)
        return draft_tokens(runner, self.slots, draft.exit_layer, count, chooser, goes_on)


def usual_exits(num_layers: int) -> list[int]:
    """Return the exits from which a policy chooses: those below the last layer of 1, 2, 3, 4, 6, 8, 12, 16, 24, …."""
    exits = [1, *sorted(part << power for part in (2, 3) for power in range(num_layers.bit_length()))]
    return [each for each in exits if each < num_layers]


def draft_tokens(
    runner: ModelRunner,
    slots: Slots,
    exit_block: int,
    num_speculations: int,
    chooser: Chooser,
    goes_on: GoesOn,
    decode: Callable[[Tensor, list[int]], Tensor] | None = None,
) -> Drafted:
    """Draft up to `num_speculations` tokens a slot with blocks 0 … `exit_block`-1.

    Args:
        goes_on: asked after each token but the last.
        decode: (exit's states [A, 1, D], their positions [A]) -> logits [A, 1, V]; None: the runner's norm and head.
    """
    starts, ids = slots.starts, slots.pending
    states, drafted = [], nothing_drafted(slots).ids
    while True:
        position = [start + len(states) for start in starts]
        states.append(runner.run(runner.embed(ids[:, None], position), slots.cache, position, 0, exit_block))
        x = states[-1]
        logits = cache(partial(runner.decode, x) if decode is None else partial(decode, x, position))
        found = find_argmax(runner, x, chooser, drafted) if decode is None else None
        ids = chooser.sample(logits(), drafted) if found is None else found[:, 0]
        drafted = torch.cat([drafted, ids[:, None]], 1)
        if len(states) == num_speculations or not goes_on(logits, ids, x):
            return Drafted(drafted, states, exit_block)

"""Self-speculation: the model's own first layers draft (arXiv 2404.16710, section 4.3)."""

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import Draft
from lskip.inference.drafting.drafter import Available, Drafter, GoesOn
from lskip.inference.drafting.round import Chooser, Drafted, Slots, find_argmax, nothing_drafted
from lskip.inference.layers.lm_head import Argmax
from lskip.inference.runners.base import ModelRunner


class LayersDrafter(Drafter):
    """Drafter of the model's blocks 1 … exit_layer; verification goes on from their keys, values and states."""

    kind = "layers"
    takes_exit = True
    leaves_states = True

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
        layers = available.num_layers
        exits = [exit_layer] if exit_layer else [layers // 4, layers // 3, layers // 2]
        return [Draft(cls.kind, each) for each in dict.fromkeys(exits) if 1 <= each < layers]

    @classmethod
    def seconds(cls, draft: Draft, count: int, slots: int, costs: Costs) -> float:
        # Verification needs the states of the last drafted token too.
        last = draft.exit_layer * costs.model.block_seconds(slots)
        return count * costs.model.draft_seconds(draft.exit_layer, slots) + last

    def propose(self, draft: Draft, count: int, chooser: Chooser, goes_on: GoesOn) -> Drafted:
        runner = self.runners.reading_drafts(self.runners.model, draft.exit_layer)
        return draft_tokens(runner, self.slots, draft.exit_layer, count, chooser, goes_on)


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
        goes_on: asked after each token but the last. It gets no margins from a GPU, for which each drafted token
            would have to wait, nor where tokens are sampled.
        decode: (exit's states [A, 1, D], their positions [A]) -> logits [A, 1, V]; None: the runner's norm and head.
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
        if len(states) == num_speculations or not goes_on(logits, margins, ids, x):
            return Drafted(drafted, states, exit_block)


def margin_of(logits: Callable[[], Tensor], found: Argmax | None) -> Tensor:
    """Return the margin [A] of logits [A, 1, V], or of the two highest in `found`, for which none are computed."""
    return lead(logits() if found is None else found.logits)[:, 0]


def lead(logits: Tensor) -> Tensor:
    """Return how far the highest of logits [..., V] is above the second: [...]; infinite where V is 1."""
    if logits.shape[-1] == 1:
        return logits.new_full(logits.shape[:-1], torch.inf)
    first, second = logits.topk(2, -1).values.unbind(-1)
    return first - second

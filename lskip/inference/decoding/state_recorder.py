"""Recording of texts' states while they are decoded, so that training on them needs no second pass."""

from __future__ import annotations

import torch
from torch import Tensor

from lskip.inference.drafting.drafter import Available
from lskip.inference.drafting.registry import DRAFTERS, drafts_of
from lskip.inference.runners.base import ModelRunner
from lskip.inference.settings import GenerationSettings


def check_states_at(states_at: int, settings: GenerationSettings, available: Available) -> None:
    """Raise ValueError where the states after `states_at` blocks, or after the last, are not computed."""
    num_layers = available.num_layers
    if not 1 <= states_at <= num_layers:
        raise ValueError(f"states_at: {states_at} is not from 1 to {num_layers}")
    exits = settings.exit_criterion is not None or settings.full_depth(num_layers) < num_layers
    if exits or available.adapter_exit is not None:
        raise ValueError("states_at: goes neither with an early exit nor with an exit_adapter")
    drafts = drafts_of(settings.draft, settings.exit_layer, available) if settings.num_speculations else []
    deepest = max((draft.exit_layer for draft in drafts if DRAFTERS[draft.kind].leaves_states), default=0)
    if deepest > states_at:  # verification starts from the draft's states, and never passes states_at
        raise ValueError(f"states_at: {states_at} lies below layer {deepest}, which drafts")


class StateRecorder:
    """Record of every slot's states after `exit_layer` blocks and after the final norm, in bfloat16.

    Attributes:
        states: [2, slots, cells, D]: the exit's, the last layer's. On the CPU, which has room for a batch of them.
    """

    def __init__(self, exit_layer: int, states: Tensor):
        self.exit_layer, self.states = exit_layer, states

    @classmethod
    def for_slots(cls, exit_layer: int, runner: ModelRunner, slots: int, cells: int) -> StateRecorder:
        """Return a recorder with room for `cells` positions of each text."""
        width = runner.embed(torch.zeros(1, 1, dtype=torch.long, device=runner.device), [0]).shape[-1]
        return cls(exit_layer, torch.zeros(2, slots, cells, width, dtype=torch.bfloat16))

    def begin(self, slot: int) -> StateRecorder:
        """Return a view of one slot, for a new text."""
        return StateRecorder(self.exit_layer, self.states[:, slot : slot + 1])

    def observe(
        self, exit_states: Tensor, last_states: Tensor, starts: list[int], accepted: list[int] | None = None
    ) -> None:
        """Record the states of the tokens that the texts keep; see Observer."""
        both = torch.stack([exit_states.bfloat16(), last_states.bfloat16()]).cpu()
        for slot, start in enumerate(starts):
            rows = both.shape[2] if accepted is None else 1 + accepted[slot]
            self.states[:, slot, start : start + rows] = both[:, slot, :rows]

    def move(self, source: int, target: int) -> None:
        """Give slot `target`, whose text has ended, what slot `source` has."""
        self.states[:, target] = self.states[:, source]

    def of(self, slot: int, length: int) -> Tensor:
        """Return the states [2, length + 1, D] of a text of which `length` tokens have been run; zeros for its last."""
        found = self.states[:, slot, : length + 1].clone()
        found[:, length] = 0
        return found

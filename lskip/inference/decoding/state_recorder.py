"""The states of texts while they are decoded, for whoever trains on them: no second pass over the text."""

from __future__ import annotations

import torch
from torch import Tensor

from lskip.inference.runners.base import ModelRunner


class StateRecorder:
    """Keeps, of every slot's text, the states after `exit_layer` blocks and after the final norm, in bfloat16.

    Attributes:
        states: [2, slots, cells, D]: the exit's, the last layer's. On the CPU, where a batch has room for them.
    """

    def __init__(self, exit_layer: int, states: Tensor):
        self.exit_layer, self.states = exit_layer, states

    @classmethod
    def for_slots(cls, exit_layer: int, runner: ModelRunner, slots: int, cells: int) -> StateRecorder:
        """Room for `cells` positions of each text."""
        width = runner.embed(torch.zeros(1, 1, dtype=torch.long, device=runner.device), [0]).shape[-1]
        return cls(exit_layer, torch.zeros(2, slots, cells, width, dtype=torch.bfloat16))

    def begin(self, slot: int) -> StateRecorder:
        """A view of one slot, for a new text."""
        return StateRecorder(self.exit_layer, self.states[:, slot : slot + 1])

    def observe(
        self, exit_states: Tensor, last_states: Tensor, starts: list[int], accepted: list[int] | None = None
    ) -> None:
        """As AdapterSlots.observe."""
        both = torch.stack([exit_states.bfloat16(), last_states.bfloat16()]).cpu()
        for slot, start in enumerate(starts):
            rows = both.shape[2] if accepted is None else 1 + accepted[slot]
            self.states[:, slot, start : start + rows] = both[:, slot, :rows]

    def move(self, source: int, target: int) -> None:
        """Gives slot `target`, whose text has ended, what slot `source` holds."""
        self.states[:, target] = self.states[:, source]

    def of(self, slot: int, length: int) -> Tensor:
        """[2, length + 1, D]: of a text of which `length` tokens have been run, zeros for its last, which was not."""
        found = self.states[:, slot, : length + 1].clone()
        found[:, length] = 0
        return found

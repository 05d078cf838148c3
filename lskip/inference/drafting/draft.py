"""What a round drafts: from which source, and how many tokens."""

from __future__ import annotations

from typing import NamedTuple


class Draft(NamedTuple):
    """A source of drafted tokens."""

    kind: str  # a name in registry.DRAFTERS
    exit_layer: int  # blocks that draft; 0 where none do

    def __str__(self) -> str:
        return f"{self.kind} {self.exit_layer}" if self.exit_layer else self.kind


class DraftPlan(NamedTuple):
    """What a round drafts: `num_speculations` tokens in each slot, from `draft`."""

    draft: Draft | None
    num_speculations: int


PLAIN = DraftPlan(None, 0)  # a round that drafts nothing

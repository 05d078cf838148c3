"""Drafts and plans: the source that a round drafts from, and the number of tokens."""

from typing import NamedTuple


class Draft(NamedTuple):
    """A kind of drafter and the number of the model's blocks that it runs."""

    kind: str  # a name in registry.DRAFTERS
    exit_layer: int  # 0: none

    def __str__(self) -> str:
        return f"{self.kind} {self.exit_layer}" if self.exit_layer else self.kind


class DraftPlan(NamedTuple):
    """Plan of a round: `num_speculations` tokens in each slot, from `draft` (None: none).

    `probed` are drafts of which the policy is to be told what they would have said (DraftPolicy.judge).
    """

    draft: Draft | None
    num_speculations: int
    probed: tuple[Draft, ...] = ()


PLAIN = DraftPlan(None, 0)  # a round that drafts nothing

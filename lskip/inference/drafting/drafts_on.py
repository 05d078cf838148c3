"""Whether a round drafts on: asked after each token of drafts that make one token after another."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.exit_criteria import ExitCriterion, Logits


class DraftsOn:
    """The decision of one round: on until the drafts of all texts have ended, or few are sure, or the policy stops."""

    def __init__(
        self,
        policy: DraftPolicy,
        criterion: ExitCriterion | None,
        exit_layer: int,
        eos_ids: Sequence[Collection[int]],
    ):
        """Begin a round.

        Args:
            criterion: the policy's, bound to the model; None: the policy itself decides.
            exit_layer: of the draft.
            eos_ids: of each slot, the tokens that end its text.
        """
        self.policy, self.criterion, self.exit_layer, self.eos_ids = policy, criterion, exit_layer, eos_ids
        self.ended = [False] * len(eos_ids)

    def __call__(self, logits: Logits, ids: Tensor, states: Tensor) -> bool:
        """Return whether to draft on behind the tokens `ids` [A], by the exit's logits and states [A, 1, D]."""
        if ids.device.type == "cpu":  # elsewhere each look would wait for the device, and cost more than it saves
            self.ended = [
                ended or token in ends
                for ended, token, ends in zip(self.ended, ids.tolist(), self.eos_ids, strict=True)
            ]
            if all(self.ended):
                return False
        if self.criterion is not None:
            sure = self.criterion.exits(self.exit_layer, states[:, 0], states[:, 0], lambda: logits()[:, 0])
            return 2 * int((~sure).sum()) < len(sure)
        return self.policy.goes_on(lambda: logits()[:, 0].float().softmax(-1).gather(1, ids[:, None])[:, 0].tolist())

"""Who drafts a round, and how many tokens: policies that decide it round by round (CostAwareDraft: cost_aware.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lskip.inference.drafting.draft import PLAIN, Draft, DraftPlan
from lskip.inference.exit_criteria import ExitCriterion
from lskip.utils.checks import check_real

if TYPE_CHECKING:
    from lskip.inference.drafting.costs import Costs


class DraftPolicy(ABC):
    """Decides what each round drafts, and learns from what came of it. Subclass it for a policy of your own.

    It may live on over many prompts. Under shared noise the text does not depend on it, only the time does.
    """

    drafts: tuple[Draft, ...] = ()
    num_speculations = 0
    chooses_draft = False  # whether it picks among all drafts, and so needs none named
    criterion: ExitCriterion | None = None  # asked in place of goes_on, of each token's exit

    def begin(self, drafts: Sequence[Draft], costs: Callable[[], Costs], num_speculations: int) -> None:
        """At the start of a generation, or of a batch.

        Args:
            drafts: what there is to choose from; the first is what the user named.
            costs: measures the model where that has not been done: call it only if they matter.
            num_speculations: tokens that a round may draft in each slot at most.
        """
        self.drafts, self.num_speculations = tuple(drafts), num_speculations

    @abstractmethod
    def plan(self, slots: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        """What the next round drafts. It changes nothing, so that it may be asked again for the same round.

        Args:
            slots: texts decoded together, all of which draft the same number of tokens.
            most: a bound on num_speculations for this round.
            without: drafts that have nothing to offer in this round: n-grams that do not occur in the text.
        """

    def goes_on(
        self, probabilities: Callable[[], list[float]], margins: Callable[[], list[float]] | None = None
    ) -> bool:
        """Whether to draft another token; asked after each drafted token but the plan's last.

        Args:
            probabilities: makes, by slot, the draft's of the token it has just drafted; to call it is to wait for the
                device.
            margins: likewise, how far that token's logit is above the next one's; None where it would mean to wait
                for a GPU, or says nothing since tokens are sampled.
        """
        return True

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        """After each round.

        Args:
            drafted: tokens drafted in each slot, perhaps fewer than planned.
            accepted: how many of them were accepted, by slot.
            seconds: what the round took, where it was timed.
        """
        return

    def summary(self) -> dict[str, Any]:
        """What was learnt, in plain types, for printing."""
        return {}


class FixedDraft(DraftPolicy):
    """The draft that the user named, the same number of tokens every round."""

    def plan(self, slots: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        count = min(most, self.num_speculations)
        if count < 1 or not self.drafts or self.drafts[0] in without:
            return PLAIN
        return DraftPlan(self.drafts[0], count)


class ConfidenceDraft(FixedDraft):
    """The draft that the user named, stopped when it gives the token it has just drafted too little probability.

    Of several slots at least half must be under the threshold. It adapts after each round as in Draft & Verify
    (Zhang et al., arXiv 2309.08168; transformers' assistant_confidence_threshold fits a ROC curve instead, where
    scikit-learn is installed). With A the mean of the round's acceptance_rate and the previous A: the threshold
    rises by `step` where A < target, and falls by `step` otherwise, unless the round drafted all it might: then
    the threshold stopped nothing. (The authors aim at .9, in steps of .001.)
    """

    def __init__(self, threshold: float = 0.6, target: float = 0.8, step: float = 0.01):
        """Where the threshold begins, the acceptance_rate it aims at, its move; ValueError unless all from 0 to 1."""
        for name, value in (("threshold", threshold), ("target", target), ("step", step)):
            check_real(name, value, "from 0 to 1", lambda number: 0 <= number <= 1)
        self.threshold, self.target, self.step = threshold, target, step
        self.acceptance_rate: float | None = None

    def goes_on(
        self, probabilities: Callable[[], list[float]], margins: Callable[[], list[float]] | None = None
    ) -> bool:
        given = probabilities()
        return 2 * sum(probability < self.threshold for probability in given) < len(given)

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        if drafted == 0:
            return
        rate = sum(accepted) / (drafted * len(accepted))
        self.acceptance_rate = rate if self.acceptance_rate is None else (self.acceptance_rate + rate) / 2
        if self.acceptance_rate < self.target:
            self.threshold = min(1.0, self.threshold + self.step)
        elif drafted < plan.num_speculations:
            self.threshold = max(0.0, self.threshold - self.step)

    def summary(self) -> dict[str, Any]:
        return {"threshold": self.threshold, "acceptance_rate": self.acceptance_rate}


class CriterionDraft(FixedDraft):
    """The draft that the user named, stopped where an exit criterion, in at least half of the slots, is unsure.

    The same question as in early exit, but here the model verifies, and the text stays its own.
    """

    def __init__(self, criterion: ExitCriterion):
        """Entropy, Margin or LearnedExit; ValueError for one that compares blocks: a draft has one state."""
        if criterion.compares_blocks:
            name = type(criterion).__name__
            raise ValueError(f"criterion: {name} compares two blocks' states, a draft has its exit's alone")
        self.criterion = criterion

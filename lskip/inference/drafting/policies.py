"""Draft policies, which choose each round's draft and number of tokens (CostAwareDraft: cost_aware.py)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import PLAIN, Draft, DraftPlan
from lskip.inference.exit_criteria import ExitCriterion
from lskip.utils.checks import check_real


class DraftPolicy(ABC):
    """Choice of each round's draft, which learns from the outcome. Subclass it for a policy of your own.

    One policy may serve many prompts. Under shared noise the text does not depend on it, only the time does.
    """

    drafts: tuple[Draft, ...] = ()
    num_speculations = 0
    chooses_draft = False  # whether it picks among all drafts, and so needs none named
    criterion: ExitCriterion | None = None  # asked in place of goes_on, with the exit's state of each drafted token

    def begin(self, drafts: Sequence[Draft], costs: Callable[[], Costs], num_speculations: int) -> None:
        """Prepare for a generation, or a batch of them.

        Args:
            drafts: the drafts to choose from, the one that the user named first.
            costs: returns the costs of the model's passes; measures them first where that has not been done, so call
                it only if they matter.
            num_speculations: tokens that a round may draft in each slot at most.
        """
        self.drafts, self.num_speculations = tuple(drafts), num_speculations

    def reach(self, positions: int) -> None:
        """Learn, before a round is planned, how many tokens the texts have by now, on average."""
        return

    @abstractmethod
    def plan(self, slots: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        """Return the plan of the next round. It may be called again for the same round, and learns nothing.

        Args:
            slots: texts decoded together, all of which draft the same number of tokens.
            most: a bound on num_speculations for this round.
            without: drafts that have no tokens in this round: n-grams that do not occur in the text.
        """

    def goes_on(self, probabilities: Callable[[], list[float]]) -> bool:
        """Return whether to draft another token; asked after each drafted token but the plan's last.

        Args:
            probabilities: returns, by slot, the probability that the draft gave the token just drafted. The call waits
                for the device.
        """
        return True

    def judge(self, agreed: Mapping[Draft, Sequence[Sequence[bool]]]) -> None:
        """Learn what the drafts that the plan wanted `probed` would have said; called before `learn`.

        Args:
            agreed: by draft and slot, whether it would have chosen the token that the text got, at successive
                positions. What cannot be told is left out.
        """
        return

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        """Learn from the outcome of a round.

        Args:
            drafted: tokens drafted in each slot, perhaps fewer than planned.
            accepted: how many of them were accepted, by slot.
            seconds: the round's time; None where it was not timed.
        """
        return

    def learnt(self) -> dict[str, Any]:
        """Return what the next process may begin with, in plain types, for `recall`; kept in the costs_file."""
        return {}

    def recall(self, learnt: dict[str, Any]) -> None:
        """Begin with what `learnt` said in an earlier process, before the first `begin`.

        Raises:
            ValueError: what is wrong in it.
        """
        return

    def summary(self) -> dict[str, Any]:
        """Return what was learnt, in plain types, for printing."""
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
        """Set the rule; ValueError unless all numbers are from 0 to 1.

        Args:
            threshold: the first threshold on the probability of the drafted token.
            target: the acceptance_rate to aim at.
            step: the threshold's move after a round.
        """
        for name, value in (("threshold", threshold), ("target", target), ("step", step)):
            check_real(name, value, "from 0 to 1", lambda number: 0 <= number <= 1)
        self.threshold, self.target, self.step = threshold, target, step
        self.acceptance_rate: float | None = None

    def goes_on(self, probabilities: Callable[[], list[float]]) -> bool:
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

    The criterion is the same as in early exit, but here the model verifies, so the text stays its own.
    """

    def __init__(self, criterion: ExitCriterion):
        """Set the criterion; ValueError for one that compares blocks, since a draft has one state.

        Args:
            criterion: Entropy, Margin or LearnedExit.
        """
        if criterion.compares_blocks:
            name = type(criterion).__name__
            raise ValueError(f"criterion: {name} compares two blocks' states, a draft has its exit's alone")
        self.criterion = criterion

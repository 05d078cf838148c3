"""Who drafts a round, and how many tokens: policies that decide it round by round."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from lskip.checks import check_real, check_whole
from lskip.inference.acceptance import ByMargin, Record
from lskip.inference.exits import ExitCriterion

if TYPE_CHECKING:
    from lskip.inference.costs import Costs


class Draft(NamedTuple):
    """A source of drafted tokens."""

    # "layers" (the model's first blocks), "adapter" (those and an exit adapter), "weights" (blocks in rounded weights),
    # or "ngram" (the text)
    kind: str
    exit_layer: int  # how many blocks draft; 0 for "ngram"

    def __str__(self) -> str:
        return f"{self.kind} {self.exit_layer}" if self.exit_layer else self.kind


class DraftPlan(NamedTuple):
    """What a round drafts: `num_speculations` tokens in each lane, from `draft`."""

    draft: Draft | None
    num_speculations: int


PLAIN = DraftPlan(None, 0)  # a round that drafts nothing


class Underway(NamedTuple):
    """The round that CostAwareDraft has planned: what another token must promise, and what is known of those there are.

    Attributes:
        plan: what it drafts.
        is_try: whether it is to find out about a draft.
        speed: tokens that the best plan known brings in a plain step's time.
        reach: by lane, the chance that all its tokens so far are accepted.
        seen: of each token so far the margins, by lane.
    """

    plan: DraftPlan
    is_try: bool
    speed: float
    reach: list[float]
    seen: list[list[float]]


NOTHING = Underway(PLAIN, False, 1.0, [], [])


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
            num_speculations: tokens that a round may draft in each lane at most.
        """
        self.drafts, self.num_speculations = tuple(drafts), num_speculations

    @abstractmethod
    def plan(self, lanes: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        """What the next round drafts. It changes nothing, so that it may be asked again for the same round.

        Args:
            lanes: texts decoded together, all of which draft the same number of tokens.
            most: a bound on num_speculations for this round.
            without: drafts that have nothing to offer in this round: n-grams that do not occur in the text.
        """

    def goes_on(
        self, probabilities: Callable[[], list[float]], margins: Callable[[], list[float]] | None = None
    ) -> bool:
        """Whether to draft another token; asked after each drafted token but the plan's last.

        Args:
            probabilities: makes, by lane, the draft's of the token it has just drafted; to call it is to wait for the
                device.
            margins: likewise, how far that token's logit is above the next one's; None where it would mean to wait
                for a GPU, or says nothing since tokens are sampled.
        """
        return True

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        """After each round.

        Args:
            drafted: tokens drafted in each lane, perhaps fewer than planned.
            accepted: how many of them were accepted, by lane.
            seconds: what the round took, where it was timed.
        """
        return

    def summary(self) -> dict[str, Any]:
        """What was learnt, in plain types, for printing."""
        return {}


class FixedDraft(DraftPolicy):
    """The draft that the user named, the same number of tokens every round."""

    def plan(self, lanes: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        count = min(most, self.num_speculations)
        if count < 1 or not self.drafts or self.drafts[0] in without:
            return PLAIN
        return DraftPlan(self.drafts[0], count)


class ConfidenceDraft(FixedDraft):
    """The draft that the user named, stopped when it gives the token it has just drafted too little probability.

    Of several lanes at least half must be under the threshold. It adapts after each round as in Draft & Verify
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
    """The draft that the user named, stopped where an exit criterion, in at least half of the lanes, is unsure.

    The same question as in early exit, but here the model verifies, and the text stays its own.
    """

    def __init__(self, criterion: ExitCriterion):
        """Entropy, Margin or LearnedExit; ValueError for one that compares blocks: a draft has one state."""
        if criterion.compares_blocks:
            name = type(criterion).__name__
            raise ValueError(f"criterion: {name} compares two blocks' states, a draft has its exit's alone")
        self.criterion = criterion


class CostAwareDraft(DraftPolicy):
    """Each round the draft and the number of tokens that promise most tokens per second; none where none pays.

    A round of d tokens, each accepted with chance q, brings 1 + q + ... + q^d tokens; q is
    counted for each draft. A round costs what `Costs` say, corrected by what rounds took where they are timed.
    A draft that is not in use is tried where a hopeful q would make it the fastest, the least tested one first.
    Where margins can be seen, q is counted by margin too, and a round ends where more tokens promise less for their
    cost than the draft does on the whole: it is planned as long as may be.

    What may be lost is bounded, in plain steps: by `_patience` against plain decoding, whatever the reason, and by
    `_curiosity` against the best plan known, in tries. Both begin at ALLOWANCE, grow by `budget` of the time, and
    never exceed SAVINGS. A round that would overdraw them if all its tokens were refused is not planned. So by
    these costs, and by what rounds took where they are timed, N tokens a lane take at most (1 + budget) N + ALLOWANCE
    plain steps, whatever is accepted: by default never less than 0.97 x plain decoding's speed from 300 tokens on.
    (A later stretch may lose SAVINGS.)
    """

    ALLOWANCE = 6.0
    SAVINGS = 20.0
    MARGIN = 1.02  # what a draft must promise over plain decoding to be used, and over the best plan to be tried
    FADING = 10  # counts fade as slowly as if a token were tested in one round of so many
    PLAIN_EVERY = 100  # rounds that are timed before a plain one must be among them again

    chooses_draft = True

    def __init__(self, budget: float = 0.01, memory: int = 80):
        """The share of time that may be lost, and how many tested tokens the count of q goes back.

        Raises:
            ValueError: a budget that is not from 0 to 1, or a memory that is not a whole number from 2 up.
        """
        check_real("budget", budget, "from 0 to 1", lambda number: 0 <= number <= 1)
        check_whole("memory", memory, 2)
        self.budget, self.memory = budget, memory
        self._records: dict[Draft, Record] = {}
        self._plain_rounds = 0
        self._patience = self._curiosity = self.ALLOWANCE
        self._by_margin: dict[Draft, ByMargin] = {}
        self._under_way = NOTHING
        self._ratios = {"plain": 1.0}  # kind of draft -> seconds measured over predicted
        self._since_plain = self.PLAIN_EVERY - 1  # timed rounds since a plain one

    def begin(self, drafts: Sequence[Draft], costs: Callable[[], Costs], num_speculations: int) -> None:
        super().begin(drafts, costs, num_speculations)
        self._tables: dict[tuple[Draft, int], list[float]] = {}
        self._costs = costs()
        self._records = {draft: Record() for draft in self.drafts} | self._records

    def plan(self, lanes: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        self._under_way = NOTHING
        most = min(most, self.num_speculations)
        drafts = [draft for draft in self.drafts if draft not in without]
        if most < 1 or not drafts or self._since_plain >= self.PLAIN_EVERY:
            return PLAIN
        offers = [(*self._offer(draft, self._records[draft].cautious, lanes, most), draft) for draft in drafts]
        best = max(offers)
        speed, count, used = best if best[0] >= self.MARGIN else (1.0, 0, None)
        trial = self._trial([draft for draft in drafts if draft != used], lanes, most, speed)
        if trial is None and used in self._by_margin:
            count = max(count, self._longest(used, lanes, most))
        plan = trial or DraftPlan(used, count)
        self._under_way = Underway(plan, trial is not None, speed, [1.0] * lanes, [])
        return plan

    def _longest(self, draft: Draft, lanes: int, most: int) -> int:
        """The most tokens that patience allows for, should all of them be refused."""
        limit = (1 + self._patience) / self._ratio(draft.kind)
        return len(list(takewhile(lambda steps: steps <= limit, self._steps(draft, lanes)[:most])))

    def goes_on(
        self, probabilities: Callable[[], list[float]], margins: Callable[[], list[float]] | None = None
    ) -> bool:
        if margins is None:
            return True
        (draft, most), _, speed, reach, seen = self._under_way
        by_margin, usual = self._by_margin.setdefault(draft, ByMargin()), self._records[draft].likely
        seen.append(margins())
        reach[:] = [chance * by_margin.chance(margin, usual) for chance, margin in zip(reach, seen[-1], strict=True)]
        steps, now, ratio = self._steps(draft, len(reach)), len(seen) - 1, self._ratio(draft.kind)
        chance, tokens = sum(reach) / len(reach), 0.0
        for after in range(now + 1, most):  # further ones may pay where the next alone does not: rows cost unevenly
            chance *= usual
            tokens += chance
            if tokens >= speed * ratio * (steps[after] - steps[now]):
                return True
        return False

    def _trial(self, drafts: list[Draft], lanes: int, most: int, speed: float) -> DraftPlan | None:
        """The least tested of `drafts` that might beat `speed`, with as many tokens as are likeliest to pay."""
        for draft in sorted(drafts, key=lambda draft: self._records[draft].tested):
            record = self._records[draft]
            if self._offer(draft, record.hopeful, lanes, most)[0] < speed * self.MARGIN:
                continue
            # If all is refused, the round brings one token, for which the best plan takes 1 / speed.
            count = self._offer(draft, record.likely, lanes, most, self._curiosity + 1 / speed)[1]
            if count:
                return DraftPlan(draft, count)
        return None

    def _offer(self, draft: Draft, chance: float, lanes: int, most: int, limit: float = math.inf) -> tuple[float, int]:
        """What a draft promises if each token is accepted with `chance`: its best speed over plain, and tokens for it.

        Rounds that cost more than `limit` plain steps, or more than patience allows, are left out: (0, 0) if all are.
        """
        ratio, limit = self._ratio(draft.kind), min(limit, 1 + self._patience)
        best, reached, tokens = (0.0, 0), 1.0, 1.0
        for count, steps in enumerate(self._steps(draft, lanes)[:most], 1):
            reached *= chance
            tokens += reached
            steps *= ratio
            if steps <= limit and tokens > best[0] * steps:
                best = tokens / steps, count
        return best

    def _steps(self, draft: Draft, lanes: int) -> list[float]:
        """The cost of a round with 1, 2, ... num_speculations tokens in plain steps, as the table of costs has it."""
        if (draft, lanes) not in self._tables:
            rounds = [self._costs.round(DraftPlan(draft, 1 + d), lanes) for d in range(self.num_speculations)]
            self._tables[draft, lanes] = [seconds / self._costs.plain(lanes) for seconds in rounds]
        return self._tables[draft, lanes]

    def _ratio(self, kind: str) -> float:
        """By how much rounds of this kind exceed their predicted cost, compared with plain rounds."""
        return self._ratios.get(kind, self._ratios["plain"]) / self._ratios["plain"]

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        for record in self._records.values():  # so that a draft that is not in use becomes worth another try
            record.add(0, 0, kept=1 - 1 / (self.FADING * self.memory))
        kind, steps, lanes = "plain", 1.0, len(accepted)
        if drafted:
            record, kind = self._records[plan.draft], plan.draft.kind
            refused = sum(count < drafted for count in accepted)
            record.add(sum(accepted), refused, kept=(1 - 1 / self.memory) ** (sum(accepted) + refused))
            record.rounds[drafted] += 1
            self._learn_by_margin(plan.draft, accepted)
            steps = self._steps(plan.draft, lanes)[drafted - 1]
        self._plain_rounds += not drafted
        self._spend(self._taken(kind, steps, lanes, seconds), 1 + sum(accepted) / lanes)
        if seconds is not None:
            self._correct(kind, seconds / (steps * self._costs.plain(lanes)))

    def _learn_by_margin(self, draft: Draft, accepted: list[int]) -> None:
        for lane, count in enumerate(accepted):
            for index, margins in enumerate(self._under_way.seen[: count + 1]):
                self._by_margin[draft].add(margins[lane], index < count, kept=1 - 1 / self.memory)

    def _taken(self, kind: str, steps: float, lanes: int, seconds: float | None) -> float:
        """Plain steps that a round took: measured where it drafted and was timed, for what it lost is lost.

        Within a factor of two of what was expected: a hiccup of the machine is not the draft's.
        """
        expected = steps * self._ratio(kind)
        if kind == "plain" or seconds is None:
            return expected
        measured = seconds / (self._costs.plain(lanes) * self._ratios["plain"])
        return min(max(measured, expected / 2), expected * 2)

    def _spend(self, steps: float, tokens: float) -> None:
        """Books a round that cost so many plain steps and brought so many tokens to each lane."""
        self._patience = min(self.SAVINGS, self._patience + (1 + self.budget) * tokens - steps)
        lost = steps - tokens / self._under_way.speed if self._under_way.is_try else 0.0
        self._curiosity = min(self.SAVINGS, self._curiosity + self.budget * steps - lost)

    def _correct(self, kind: str, ratio: float) -> None:
        """Takes in a round's seconds measured over predicted; a single hiccup of the machine moves little."""
        known = self._ratios.get(kind, self._ratios["plain"])
        self._ratios[kind] = known + (min(max(ratio, 0.8 * known), 1.25 * known) - known) / 4
        self._since_plain = 0 if kind == "plain" else self._since_plain + 1

    def summary(self) -> dict[str, Any]:
        """By draft (and "plain"): rounds, the q of late (None: nothing tested), and num_speculations -> rounds."""
        said: dict[str, Any] = {"plain": {"rounds": self._plain_rounds}}
        for draft, record in self._records.items():
            q = record.accepted / record.tested if record.tested else None
            counts = dict(sorted(record.rounds.items()))
            said[str(draft)] = {"rounds": sum(counts.values()), "q": q, "num_speculations": counts}
        return said

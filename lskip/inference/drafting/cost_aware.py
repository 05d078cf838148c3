"""The policy that drafts what pays, by the costs of passes on this machine and the acceptance so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from statistics import mean
from typing import Any, NamedTuple

from lskip.inference.drafting.acceptance import ByMargin, Record
from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import PLAIN, Draft, DraftPlan
from lskip.inference.drafting.policies import DraftPolicy
from lskip.inference.drafting.registry import round_seconds
from lskip.utils.checks import check_real, check_whole


class Underway(NamedTuple):
    """The round that CostAwareDraft has planned, and its drafted tokens so far.

    Attributes:
        plan: draft and number of tokens.
        is_try: whether its purpose is to learn a draft's acceptance.
        in_vain: whether it drafts nothing because no draft promised to pay.
        speed: tokens that the best plan known brings in the time of a plain round.
        reach: by slot, the chance that all its tokens so far are accepted.
        seen: margins of each token so far, by slot.
    """

    plan: DraftPlan
    is_try: bool
    in_vain: bool
    speed: float
    reach: list[float]
    seen: list[list[float]]


NOTHING = Underway(PLAIN, False, False, 1.0, [], [])


class CostAwareDraft(DraftPolicy):
    """The draft and the number of tokens that promise most tokens per second, each round; none where none pays.

    A round of d tokens, each accepted with chance q, brings 1 + q + ... + q^d tokens; q is counted for each draft. A
    round's seconds come from `Costs`, corrected by measured rounds where they are timed.
    A draft that is not in use is tried where a hopeful q would make it the fastest, the least tested one first.
    Where margins can be seen, q is counted by margin too. Then a round is planned as long as may be, and ends where
    more tokens promise less for their cost than the draft does on average. Where no draft promises to pay, the next
    REST rounds are plain without a new plan.

    Losses are bounded, in times of a plain round: by `_patience` against plain decoding, whatever the reason, and by
    `_curiosity` against the best plan known, in tries. Both begin at ALLOWANCE, grow by `budget` of the time, and
    never exceed SAVINGS. A round that would overdraw them if all its tokens were refused is not planned. So, by these
    seconds, N tokens a slot take at most (1 + budget) N + ALLOWANCE plain rounds, whatever is accepted: by default
    never less than 0.97 x plain decoding's speed from 300 tokens on. (A later stretch may lose SAVINGS.)
    """

    ALLOWANCE = 6.0
    SAVINGS = 20.0
    MIN_SPEEDUP = 1.02  # over plain decoding, for a draft to be used; over the best plan, for it to be tried
    FADING = 10  # counts fade as slowly as if a token were tested in one round of so many
    PLAIN_EVERY = 50  # timed rounds after which a plain one is timed again, behind one that is not (_has_just_drafted)
    TABLE = 8  # weight of the table of costs, in timed rounds
    STEADY = 32  # timed rounds that the correction averages: after few, the plan that looks best is the luckiest
    REST = 8  # plain rounds without a plan where no draft paid: planning takes a hundredth of a small model's round

    chooses_draft = True

    def __init__(self, budget: float = 0.01, memory: int = 80):
        """Set what the policy may lose and remember.

        Args:
            budget: share of the time that may be lost.
            memory: tested tokens that the count of q goes back.

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
        self._timed: dict[str, float] = {}  # kind of draft -> rounds of late
        self._since_plain = self.PLAIN_EVERY - 1  # timed rounds since a plain one
        self._has_just_drafted = False  # drafting drives the model's weights out of caches: a plain round is slow then
        self._resting = 0  # slots of plain rounds that go without a plan
        self._rested: list[float | None] = []  # seconds of these, where they were timed

    def begin(self, drafts: Sequence[Draft], costs: Callable[[], Costs], num_speculations: int) -> None:
        super().begin(drafts, costs, num_speculations)
        self._tables: dict[tuple[Draft, int], list[float]] = {}
        self._costs, self._resting = costs(), 0
        self._records = {draft: Record() for draft in self.drafts} | self._records

    def plan(self, slots: int, most: int, without: frozenset[Draft] = frozenset()) -> DraftPlan:
        if slots == self._resting:
            return PLAIN
        self._under_way = NOTHING
        most = min(most, self.num_speculations)
        drafts = [draft for draft in self.drafts if draft not in without]
        if most < 1 or not drafts or self._since_plain >= self.PLAIN_EVERY:
            return PLAIN
        offers = [(*self._offer(draft, self._records[draft].cautious, slots, most), draft) for draft in drafts]
        best = max(offers)
        speed, count, used = best if best[0] >= self.MIN_SPEEDUP else (1.0, 0, None)
        trial = self._trial([draft for draft in drafts if draft != used], slots, most, speed)
        if trial is None and used in self._by_margin:
            count = max(count, self._longest(used, slots, most))
        plan = trial or DraftPlan(used, count)
        in_vain = plan == PLAIN and not without
        self._under_way = Underway(plan, trial is not None, in_vain, speed, [1.0] * slots, [])
        return plan

    def _longest(self, draft: Draft, slots: int, most: int) -> int:
        """Return the most tokens that patience allows, should all of them be refused."""
        limit = (1 + self._patience) / self._ratio(draft.kind)
        return len(list(takewhile(lambda steps: steps <= limit, self._steps(draft, slots)[:most])))

    def goes_on(
        self, probabilities: Callable[[], list[float]], margins: Callable[[], list[float]] | None = None
    ) -> bool:
        if margins is None:
            return True
        (draft, most), *_, speed, reach, seen = self._under_way
        by_margin, usual = self._by_margin.setdefault(draft, ByMargin()), self._records[draft].likely
        seen.append(margins())
        reach[:] = [chance * by_margin.chance(margin, usual) for chance, margin in zip(reach, seen[-1], strict=True)]
        steps, now, ratio = self._steps(draft, len(reach)), len(seen) - 1, self._ratio(draft.kind)
        chance, tokens = sum(reach) / len(reach), 0.0
        for after in range(now + 1, most):  # more may pay where the next alone does not: costs grow in steps
            chance *= usual
            tokens += chance
            if tokens >= speed * ratio * (steps[after] - steps[now]):
                return True
        return False

    def _trial(self, drafts: list[Draft], slots: int, most: int, speed: float) -> DraftPlan | None:
        """Return the least tested of `drafts` that might beat `speed`, with the tokens that would pay most; or None."""
        for draft in sorted(drafts, key=lambda draft: self._records[draft].tested):
            record = self._records[draft]
            if self._offer(draft, record.hopeful, slots, most)[0] < speed * self.MIN_SPEEDUP:
                continue
            # If all tokens are refused, the round brings one, for which the best plan takes 1 / speed.
            count = self._offer(draft, record.likely, slots, most, self._curiosity + 1 / speed)[1]
            if count:
                return DraftPlan(draft, count)
        return None

    def _offer(self, draft: Draft, chance: float, slots: int, most: int, limit: float = math.inf) -> tuple[float, int]:
        """Return a draft's best speed-up if each token is accepted with `chance`, and the number of tokens for it.

        Rounds that cost more than `limit` plain rounds, or more than patience allows, are left out: (0, 0) if all are.
        """
        ratio, limit = self._ratio(draft.kind), min(limit, 1 + self._patience)
        best, reached, tokens = (0.0, 0), 1.0, 1.0
        for count, steps in enumerate(self._steps(draft, slots)[:most], 1):
            reached *= chance
            tokens += reached
            steps *= ratio
            if steps <= limit and tokens > best[0] * steps:
                best = tokens / steps, count
        return best

    def _steps(self, draft: Draft, slots: int) -> list[float]:
        """Return the costs of rounds of 1, 2, … num_speculations tokens in plain rounds, by the table of costs."""
        if (draft, slots) not in self._tables:
            rounds = [round_seconds(self._costs, DraftPlan(draft, 1 + d), slots) for d in range(self.num_speculations)]
            self._tables[draft, slots] = [seconds / self._costs.plain(slots) for seconds in rounds]
        return self._tables[draft, slots]

    def _ratio(self, kind: str) -> float:
        """Return measured over predicted seconds of rounds of this kind, relative to the same of plain rounds."""
        return self._ratios.get(kind, self._ratios["plain"]) / self._ratios["plain"]

    def learn(self, plan: DraftPlan, drafted: int, accepted: list[int], seconds: float | None = None) -> None:
        slots = len(accepted)
        self._plain_rounds += not drafted
        if drafted:
            self._resting = 0
            self._learn_drafted(plan.draft, drafted, accepted, seconds)
        elif slots != self._resting:
            self._learn_plain([None if self._has_just_drafted else seconds], slots)
            self._resting, self._rested = slots if self._under_way.in_vain else 0, []
        else:
            self._rested.append(seconds)
            if len(self._rested) == self.REST:
                self._learn_plain(self._rested, slots)
                self._resting = 0
        self._has_just_drafted = drafted > 0

    def _learn_plain(self, seconds: list[float | None], slots: int) -> None:
        """Learn from rounds that drafted nothing; `seconds` of each, None where it was not timed."""
        self._fade(len(seconds))
        self._spend(len(seconds), len(seconds))
        if timed := [each for each in seconds if each is not None]:
            self._correct("plain", mean(timed) / self._costs.plain(slots), len(timed))

    def _learn_drafted(self, draft: Draft, drafted: int, accepted: list[int], seconds: float | None) -> None:
        self._fade(1)
        record, slots = self._records[draft], len(accepted)
        refused = sum(count < drafted for count in accepted)
        record.add(sum(accepted), refused, kept=(1 - 1 / self.memory) ** (sum(accepted) + refused))
        record.rounds[drafted] += 1
        self._learn_by_margin(draft, accepted)
        steps = self._steps(draft, slots)[drafted - 1]
        self._spend(self._taken(draft.kind, steps, slots, seconds), 1 + sum(accepted) / slots)
        if seconds is not None:
            self._correct(draft.kind, seconds / (steps * self._costs.plain(slots)), 1)

    def _fade(self, rounds: int) -> None:
        """Fade all counts, so that a draft that is not in use becomes worth another try."""
        for record in self._records.values():
            record.add(0, 0, kept=(1 - 1 / (self.FADING * self.memory)) ** rounds)

    def _learn_by_margin(self, draft: Draft, accepted: list[int]) -> None:
        for slot, count in enumerate(accepted):
            for index, margins in enumerate(self._under_way.seen[: count + 1]):
                self._by_margin[draft].add(margins[slot], index < count, kept=1 - 1 / self.memory)

    def _taken(self, kind: str, steps: float, slots: int, seconds: float | None) -> float:
        """Return the time of a drafting round in plain rounds: measured where it was timed, else expected.

        A measured one is kept within a factor of two of the expected one: a hiccup of the machine is not the draft's.
        """
        expected = steps * self._ratio(kind)
        if seconds is None:
            return expected
        measured = seconds / (self._costs.plain(slots) * self._ratios["plain"])
        return min(max(measured, expected / 2), expected * 2)

    def _spend(self, steps: float, tokens: float) -> None:
        """Book a round that cost so many plain rounds (`steps`) and brought so many tokens to each slot."""
        self._patience = min(self.SAVINGS, self._patience + (1 + self.budget) * tokens - steps)
        lost = steps - tokens / self._under_way.speed if self._under_way.is_try else 0.0
        self._curiosity = min(self.SAVINGS, self._curiosity + self.budget * steps - lost)

    def _correct(self, kind: str, ratio: float, rounds: int) -> None:
        """Average in the measured over the predicted seconds of rounds, cut so that one hiccup moves little."""
        known = self._ratios.get(kind, self._ratios["plain"])
        for other in self._timed:
            self._timed[other] *= (1 - 1 / self.STEADY) ** rounds
        self._timed[kind] = self._timed.get(kind, 0.0) + rounds
        share = rounds / (self.TABLE + self._timed[kind])
        self._ratios[kind] = known + share * (min(max(ratio, 0.8 * known), 1.25 * known) - known)
        self._since_plain = 0 if kind == "plain" else self._since_plain + 1

    def summary(self) -> dict[str, Any]:
        """Return, by draft (and "plain"): rounds, the recent q (None: nothing tested), num_speculations -> rounds."""
        said: dict[str, Any] = {"plain": {"rounds": self._plain_rounds}}
        for draft, record in self._records.items():
            q = record.accepted / record.tested if record.tested else None
            counts = dict(sorted(record.rounds.items()))
            said[str(draft)] = {"rounds": sum(counts.values()), "q": q, "num_speculations": counts}
        return said

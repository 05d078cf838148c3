"""Times of rounds in times of a plain one: by the table of costs, corrected by rounds that were timed."""

from __future__ import annotations

from lskip.inference.drafting.costs import Costs
from lskip.inference.drafting.draft import Draft, DraftPlan
from lskip.inference.drafting.registry import probe_seconds, round_seconds

TABLE = 8  # weight of what is believed of a draft's extra time, in timed rounds
STEADY = 64  # timed rounds that a correction averages: after few, the plan that looks best is the luckiest
PLAIN_EVERY = 32  # timed rounds after which a plain one is timed, at first; as long as it takes the same, ever fewer
FEW = 4  # plain rounds that are timed at first: all others are compared with them
SOON, SELDOM = 4, 512  # where it took another time, and at most
SAME = 0.25


class RoundTimes:
    """Costs of rounds on this machine, measured in plain rounds.

    A round of d drafted tokens takes s T + d x: T by the table of costs, s what plain rounds take over the table, and
    x what a drafted token takes besides (choosing it, Python, a table that is wrong), by draft; a draft that was
    never timed takes what others of its kind do.

    Attributes:
        scale: s.
        extra: x by draft and by kind, in plain rounds.
    """

    def __init__(self):
        self.scale, self.extra = 1.0, {}
        self._plain_timed, self._timed = 0, {}
        self._wait, self._since_plain = PLAIN_EVERY, 0
        self._are_timed = False
        self._has_just_drafted = False  # drafting drives the model's weights out of caches: a plain round is slow then
        self._tables: dict[tuple[Draft, int], list[float]] = {}

    def begin(self, costs: Costs, most: int) -> None:
        """Take the table of costs, for rounds of up to `most` drafted tokens."""
        self._costs, self._most, self._tables = costs, most, {}

    @property
    def plain_is_due(self) -> bool:
        """Whether a plain round is to be timed again."""
        return self._are_timed and (self._plain_timed < FEW or self._since_plain >= self._wait)

    def rounds(self, draft: Draft, slots: int) -> list[float]:
        """Return what rounds of 1, 2, … tokens of a draft cost."""
        extra = self._extra(draft)
        return [steps + count * extra for count, steps in enumerate(self._table(draft, slots), 1)]

    def probe(self, plan: DraftPlan, exits: int, slots: int) -> float:
        """Return what the round of `plan` costs besides, if verification's states are read at so many `exits`."""
        return probe_seconds(self._costs, plan, exits, slots) / self._costs.plain(slots)

    def expected(self, plan: DraftPlan, slots: int) -> float:
        """Return what a round costs, its probe left out."""
        if plan.draft is None or plan.num_speculations == 0:
            return 1.0
        return self._table(plan.draft, slots)[plan.num_speculations - 1] + plan.num_speculations * self._extra(
            plan.draft
        )

    def taken(self, expected: float, slots: int, seconds: float | None) -> float:
        """Return a round's time in plain rounds: measured where it was timed.

        It is kept within a factor of two of the expected one: a hiccup of the machine is not the draft's.
        """
        if seconds is None:
            return expected
        return min(max(self._in_plain_rounds(seconds, slots), expected / 2), expected * 2)

    def learn_plain(self, slots: int, seconds: float | None) -> None:
        """Learn from a round that drafted nothing and looked at nothing; it says little right after drafting."""
        self._are_timed |= seconds is not None
        if seconds is not None and not self._has_just_drafted:
            ratio, known = seconds / self._costs.plain(slots), self.scale
            if self._plain_timed:
                ratio = min(max(ratio, 0.7 * known), 1.4 * known)
            steady = abs(ratio - known) < SAME * known
            self._plain_timed = min(self._plain_timed + 1, STEADY if steady else FEW)
            self.scale += (ratio - known) / self._plain_timed
            if self._since_plain:
                self._wait = min(2 * self._wait, SELDOM) if steady else SOON
            self._since_plain = 0
        self._has_just_drafted = False

    def learn_drafted(self, draft: Draft, drafted: int, slots: int, seconds: float | None) -> None:
        """Learn from a round that drafted, and looked at nothing."""
        self._has_just_drafted = True
        if seconds is None:
            return
        self._are_timed, self._since_plain = True, self._since_plain + 1
        table, known = self._table(draft, slots)[drafted - 1], self._extra(draft)
        expected = max(table + drafted * known, 0.1)
        ratio = self._in_plain_rounds(seconds, slots) / expected
        found = (min(max(ratio, 0.7), 1.4) * expected - table) / drafted
        for name in (draft, draft.kind):
            timed = self._timed[name] = min(self._timed.get(name, 0.0) + 1, STEADY)
            before = self.extra.get(name, known)
            self.extra[name] = before + (found - before) / (timed + (TABLE if name == draft else 0))

    def _extra(self, draft: Draft) -> float:
        return self.extra.get(draft, self.extra.get(draft.kind, 0.0))

    def _in_plain_rounds(self, seconds: float, slots: int) -> float:
        return seconds / (self._costs.plain(slots) * self.scale)

    def _table(self, draft: Draft, slots: int) -> list[float]:
        if (draft, slots) not in self._tables:
            plain = self._costs.plain(slots)
            plans = [DraftPlan(draft, 1 + count) for count in range(self._most)]
            self._tables[draft, slots] = [round_seconds(self._costs, plan, slots) / plain for plan in plans]
        return self._tables[draft, slots]

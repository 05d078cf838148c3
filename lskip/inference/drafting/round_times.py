"""Times of rounds in times of a plain one: by the table of costs, corrected by rounds that were timed."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

from lskip.inference.drafting.costs import CONTEXT, Costs
from lskip.inference.drafting.draft import Draft, DraftPlan
from lskip.inference.drafting.registry import probe_seconds, round_seconds

TABLE = 8  # weight of what is believed of a draft's extra time, in timed rounds
STEADY = 64  # timed rounds that a correction averages: after few, the plan that looks best is the luckiest
FEW = 4  # plain rounds that are timed at first: all others are compared with them
AGAIN = 2  # where an earlier process has timed rounds, or some of other numbers of slots were
SOON = 8  # rounds that draft between two that are timed, at least
PLAIN_SHARE = 0.01  # of the tokens, at most, is lost by timing plain rounds again where drafts pay
SAME = 0.25  # a plain round that differs more says that the machine has changed


class Line:
    """Least squares of y = a + x d over the last STEADY rounds, pulled to a line that was believed before."""

    def __init__(self):
        self.sums = [0.0] * 5  # of 1, d, d^2, y, d y

    def add(self, d: int, y: float) -> None:
        """Add a round of d drafted tokens that took y."""
        terms = (1, d, d * d, y, d * y)
        self.sums = [(1 - 1 / STEADY) * total + term for total, term in zip(self.sums, terms, strict=True)]

    def fit(self, believed: tuple[float, float], weight: float) -> tuple[float, float]:
        """Return (a, x), where `believed` counts as much as `weight` rounds of four drafted tokens."""
        n, d, dd, y, dy = self.sums
        n, dd, y, dy = n + weight, dd + 16 * weight, y + weight * believed[0], dy + 16 * weight * believed[1]
        scale = n * dd - d * d
        return (y * dd - d * dy) / scale, (n * dy - d * y) / scale


@dataclass
class PlainTimes:
    """What plain rounds of about so many slots take over the table of costs.

    Attributes:
        scale: their time, in those of the table.
        timed: how many rounds say so.
        since: timed rounds that have drafted since.
    """

    scale: float = 1.0
    timed: int = 0
    since: int = 0

    def learn(self, ratio: float) -> None:
        """Learn from a plain round that took `ratio` times what the table says."""
        known = self.scale
        if self.timed:
            ratio = min(max(ratio, 0.7 * known), 1.4 * known)
        steady = abs(ratio - known) < SAME * known
        self.timed = min(self.timed + 1, STEADY if steady else FEW)
        self.scale += (ratio - known) / self.timed
        self.since = 0


class RoundTimes:
    """Costs of rounds on this machine, measured in plain rounds.

    A round of d drafted tokens takes s T + a + d x: T by the costs of texts of about this length, s what plain rounds
    of about so many slots take over these, a and x what a round and a drafted token take besides (choosing it, Python,
    a table that is wrong). These are fitted for each draft, and pulled to what all drafts of its kind take. The table
    knows one slot of many rows, so that s grows with slots: each has keys of its own to attend to, and a token to
    choose.

    Attributes:
        known: a and x by name of a draft or kind, in plain rounds, from an earlier process.
    """

    def __init__(self):
        self.known: dict[str, tuple[float, float]] = {}
        self._plain: dict[int, PlainTimes] = defaultdict(PlainTimes)  # by power_of slots
        self._lines: dict[Draft | str, Line] = {}
        self._are_timed = False
        self._has_just_drafted = False  # drafting drives the model's weights out of caches: a plain round is slow then
        self._costs: Costs | None = None
        self._most = 0
        self._far = 0  # doublings of CONTEXT up to the texts' length
        self._here: Costs | None = None  # costs of texts of about this length
        self._tables: dict[tuple[Draft, int, int], list[float]] = {}

    def begin(self, costs: Costs, most: int) -> bool:
        """Take the table of costs, for rounds of up to `most` drafted tokens; return whether they are others."""
        if (self._costs, self._most) == (costs, most):
            return False
        self._costs, self._most, self._tables, self._here = costs, most, {}, costs.at(CONTEXT << self._far)
        return True

    def reach(self, positions: int) -> bool:
        """Take the costs of texts of so many tokens, to the nearest doubling; return whether they are others."""
        far = max(0, round(math.log2(max(positions, 1) / CONTEXT)))
        if far == self._far:
            return False
        self._far, self._here = far, self._costs.at(CONTEXT << far)
        return True

    def plain_is_due(self, speed: float, slots: int) -> bool:
        """Return whether a plain round is to be timed again, where drafts are `speed` times as fast.

        The faster they are the more it costs, and the less it matters what exactly a plain round takes.
        """
        plain = self._plain[power_of(slots)]
        few = AGAIN if self.known or any(each.timed for each in self._plain.values() if each is not plain) else FEW
        lost = 2 * (speed - 1)  # two rounds: the one behind a drafted one is not timed
        return self._are_timed and (plain.timed < few or plain.since >= max(SOON, lost / PLAIN_SHARE))

    def rounds(self, draft: Draft, slots: int) -> list[float]:
        """Return what rounds of 1, 2, … tokens of a draft cost."""
        fixed, each = self._beyond(draft)
        return [steps + fixed + count * each for count, steps in enumerate(self._table(draft, slots), 1)]

    def probe(self, plan: DraftPlan, exits: int, slots: int) -> float:
        """Return what the round of `plan` costs besides, if verification's states are read at so many `exits`."""
        return probe_seconds(self._here, plan, exits, slots) / self._here.plain(slots)

    def expected(self, plan: DraftPlan, slots: int) -> float:
        """Return what a round costs, its probe left out."""
        count = plan.num_speculations
        if plan.draft is None or count == 0:
            return 1.0
        fixed, each = self._beyond(plan.draft)
        return self._table(plan.draft, slots)[count - 1] + fixed + count * each

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
            self._plain[power_of(slots)].learn(seconds / self._here.plain(slots))
        self._has_just_drafted = False

    def learn_drafted(self, draft: Draft, drafted: int, slots: int, seconds: float | None) -> None:
        """Learn from a round that drafted, and looked at nothing."""
        self._has_just_drafted = True
        if seconds is None:
            return
        self._are_timed = True
        self._plain[power_of(slots)].since += 1
        table, (fixed, each) = self._table(draft, slots)[drafted - 1], self._beyond(draft)
        expected = max(table + fixed + drafted * each, 0.1)
        found = min(max(self._in_plain_rounds(seconds, slots), 0.7 * expected), 1.4 * expected) - table
        for name in (draft, draft.kind):
            self._lines.setdefault(name, Line()).add(drafted, found)

    def _beyond(self, draft: Draft) -> tuple[float, float]:
        """Return what a round of a draft takes beyond the table: in any case, and for each drafted token."""
        alike = self._fit(draft.kind, (0.0, 0.0), 2.0)
        return self._fit(draft, alike, TABLE)

    def _fit(self, name: Draft | str, believed: tuple[float, float], weight: float) -> tuple[float, float]:
        believed = self.known.get(str(name), believed)
        return self._lines[name].fit(believed, weight) if name in self._lines else believed

    def learnt(self) -> dict[str, list[float]]:
        """Return what rounds take beyond the table by draft and by kind, for `known` of the next process."""
        drafts = [name for name in self._lines if isinstance(name, Draft)]
        kinds = {draft.kind: list(self._fit(draft.kind, (0.0, 0.0), 2.0)) for draft in drafts}
        return kinds | {str(draft): list(self._beyond(draft)) for draft in drafts}

    def _in_plain_rounds(self, seconds: float, slots: int) -> float:
        return seconds / (self._here.plain(slots) * self._scale(slots))

    def _scale(self, slots: int) -> float:
        """Return what plain rounds take over the table, of the nearest number of slots of which any were timed."""
        timed = [power for power, plain in self._plain.items() if plain.timed]
        nearest = min(timed, key=lambda power: abs(power - power_of(slots)), default=None)
        return 1.0 if nearest is None else self._plain[nearest].scale

    def _table(self, draft: Draft, slots: int) -> list[float]:
        place = draft, slots, self._far
        if place not in self._tables:
            plain = self._here.plain(slots)
            plans = [DraftPlan(draft, 1 + count) for count in range(self._most)]
            self._tables[place] = [round_seconds(self._here, plan, slots) / plain for plan in plans]
        return self._tables[place]


def power_of(slots: int) -> int:
    """Return the exponent of the least power of two that is not below a number of slots."""
    return (slots - 1).bit_length()

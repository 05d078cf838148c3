"""Counts of accepted and refused tokens of a draft, by their position in it, and the tokens that they promise."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul
from typing import NamedTuple

GROUPS = 5  # of positions that are counted together: 1, 2, 3 to 4, 5 to 8, and those beyond
FEW = 6.0  # tested tokens of a group that say little
PULL = 2.0  # imaginary tokens that pull a group's chance to that of the group before it


class Prior(NamedTuple):
    """What is believed of a draft before any of its tokens is tested.

    Attributes:
        chance: that a token is accepted.
        weight: imaginary tested tokens that say so.
    """

    chance: float = 0.5
    weight: float = 2.0


def group_of(position: int) -> int:
    """Return the group of a position in the draft, counted from 0."""
    return min(position.bit_length(), GROUPS - 1)


@dataclass
class Acceptance:
    """Counts of one draft's tested tokens: in each draft those up to the first refusal; older ones count less.

    Acceptance comes in runs: a token is accepted more often, the more before it were. So tokens are counted by group
    of positions, as hazards are: `accepted` and `refused` of a group are of drafts whose tokens before it were all
    accepted. A group that was hardly tested is believed to be as the one before it.
    """

    accepted: list[float] = field(default_factory=lambda: [0.0] * GROUPS)
    refused: list[float] = field(default_factory=lambda: [0.0] * GROUPS)

    @property
    def tested(self) -> float:
        return sum(self.accepted) + sum(self.refused)

    @property
    def rate(self) -> float | None:
        """Share of the tested tokens that was accepted; None where none was tested."""
        return sum(self.accepted) / self.tested if self.tested else None

    def is_short(self, count: int) -> bool:
        """Return whether too few drafts of so many tokens were tested to tell how long its runs are."""
        tested = [accepted + refused for accepted, refused in zip(self.accepted, self.refused, strict=True)]
        return min(tested[: group_of(count - 1) + 1]) < FEW

    def add_draft(self, accepted: int, drafted: int, kept: float = 1.0) -> None:
        """Count a draft of which the first `accepted` tokens were; older ones of a group count `kept` times as much."""
        for position in range(accepted):
            self._add(position, True, kept)
        if accepted < drafted:
            self._add(accepted, False, kept)

    def add_run(self, agrees: Iterable[bool], kept: float = 1.0) -> None:
        """Count successive positions of a text, at each of which the draft would have agreed or not.

        After a position where it does not a new draft would begin.
        """
        position = 0
        for agreed in agrees:
            self._add(position, agreed, kept)
            position = position + 1 if agreed else 0

    def _add(self, position: int, accepted: bool, kept: float) -> None:
        group = group_of(position)
        self.accepted[group] = self.accepted[group] * kept + accepted
        self.refused[group] = self.refused[group] * kept + (not accepted)

    def fade(self, kept: float) -> None:
        """Let what was counted so far count as `kept` times as much."""
        self.accepted = [count * kept for count in self.accepted]
        self.refused = [count * kept for count in self.refused]

    def beside(self, alike: Acceptance, most: float) -> Acceptance:
        """Return these counts and those of a draft that resembles this one, which count as `most` tokens at most."""
        share = min(1.0, most / alike.tested) if alike.tested else 0.0
        pairs = (self.accepted, alike.accepted), (self.refused, alike.refused)
        return Acceptance(*([mine + share * other for mine, other in zip(*pair, strict=True)] for pair in pairs))

    def pooled(self, prior: Prior) -> tuple[float, float]:
        """Return the chance of any token, and its standard error; (.5, .5) where nothing is known."""
        weight = self.tested + prior.weight
        chance = (sum(self.accepted) + prior.chance * prior.weight) / weight
        return chance, math.sqrt(chance * (1 - chance) / max(weight - 1, 1))

    def chances(self, prior: Prior, more: float = 0.0) -> list[float]:
        """Return the chance by group that a token is accepted, if those before it were, each higher by `more`."""
        chance, found = self.pooled(prior)[0], []
        for accepted, refused in zip(self.accepted, self.refused, strict=True):
            chance = (accepted + PULL * chance) / (accepted + refused + PULL)
            found.append(min(1.0, chance + more))
        return found


def expected_tokens(chances: Sequence[float], most: int) -> list[float]:
    """Return the tokens that rounds of 1, 2, … `most` drafted tokens bring, the model's own among them.

    1 + c_1 + c_1 c_2 + … + c_1 … c_d, c_i the chance of position i by its group; Leviathan et al. (arXiv 2211.17192)
    have all of them equal.
    """
    by_position = (chances[min(position.bit_length(), GROUPS - 1)] for position in range(most))
    return list(accumulate(accumulate(by_position, mul), initial=1.0))[1:]

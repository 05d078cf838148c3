"""Records of accepted and refused tokens, from which a policy estimates acceptance."""

import math
from bisect import bisect
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Record:
    """Counts of one draft's tested tokens: in each round of a slot, those up to the first refusal."""

    accepted: float = 0.0  # older ones count less
    refused: float = 0.0
    rounds: Counter[int] = field(default_factory=Counter)  # by number of drafted tokens

    @property
    def tested(self) -> float:
        return self.accepted + self.refused

    @property
    def cautious(self) -> float:
        """Chance that a token is accepted, with one imaginary refusal, so that little data promises little."""
        return self.accepted / (self.tested + 1)

    @property
    def likely(self) -> float:
        """Chance that a token is accepted, by Laplace's rule of succession."""
        return (self.accepted + 1) / (self.tested + 2)

    @property
    def hopeful(self) -> float:
        """One standard error above `likely`; 1 for an untested draft."""
        return self.likely + math.sqrt(self.likely * (1 - self.likely) / (self.tested + 1))

    def add(self, accepted: int, refused: int, kept: float) -> None:
        """Count tested tokens, after the earlier counts are multiplied by `kept`."""
        self.accepted = self.accepted * kept + accepted
        self.refused = self.refused * kept + refused


class ByMargin:
    """Records of one draft's tokens by margin, the lead of the draft's highest logit over the second.

    A draft that is nearly the model itself, in rounded weights, errs almost only where two tokens are about as
    probable.
    """

    EDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
    PRIOR = 2.0  # imaginary tokens, accepted as often as the draft's tokens of any margin

    def __init__(self):
        self._records = [Record() for _ in range(len(self.EDGES) + 1)]

    def chance(self, margin: float, usual: float) -> float:
        """Return the chance that a token of this margin is accepted, where `usual` is the chance of any token."""
        record = self._records[bisect(self.EDGES, margin)]
        return (record.accepted + self.PRIOR * usual) / (record.tested + self.PRIOR)

    def add(self, margin: float, accepted: bool, kept: float) -> None:
        """Count a tested token, after the earlier counts of such margins are multiplied by `kept`."""
        self._records[bisect(self.EDGES, margin)].add(accepted, not accepted, kept)

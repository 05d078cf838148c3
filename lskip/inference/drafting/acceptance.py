"""How far drafts were right so far, which a policy goes by."""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Record:
    """How tokens of one draft fared when they were tested: each up to the first refusal of its slot's round."""

    accepted: float = 0.0  # older ones count less
    refused: float = 0.0
    rounds: Counter[int] = field(default_factory=Counter)  # by tokens drafted

    @property
    def tested(self) -> float:
        return self.accepted + self.refused

    @property
    def cautious(self) -> float:
        """The chance that a token is accepted, with one imaginary refusal: what is hardly known is not relied on."""
        return self.accepted / (self.tested + 1)

    @property
    def likely(self) -> float:
        """The same by Laplace's rule of succession."""
        return (self.accepted + 1) / (self.tested + 2)

    @property
    def hopeful(self) -> float:
        """One standard error above that; 1 for an untested draft."""
        return self.likely + math.sqrt(self.likely * (1 - self.likely) / (self.tested + 1))

    def add(self, accepted: int, refused: int, kept: float) -> None:
        """Counts tested tokens; of earlier ones a share of `kept` remains."""
        self.accepted = self.accepted * kept + accepted
        self.refused = self.refused * kept + refused


class ByMargin:
    """How the tokens of one draft fared by their margin: how far the draft's logit was above the next one's.

    A draft that is nearly the model itself, its weights rounded, errs where two tokens are about as likely, and almost
    nowhere else.
    """

    EDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
    PRIOR = 2.0  # imaginary tokens that fared as the draft's tokens do

    def __init__(self):
        self._records = [Record() for _ in range(len(self.EDGES) + 1)]

    def chance(self, margin: float, usual: float) -> float:
        """That such a token is accepted, where `usual` is the chance of any."""
        record = self._records[bisect(self.EDGES, margin)]
        return (record.accepted + self.PRIOR * usual) / (record.tested + self.PRIOR)

    def add(self, margin: float, accepted: bool, kept: float) -> None:
        """Counts a tested token; of earlier ones like it a share of `kept` remains."""
        self._records[bisect(self.EDGES, margin)].add(accepted, not accepted, kept)

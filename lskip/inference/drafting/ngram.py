"""Drafting from the text itself: what followed the same n-gram earlier (prompt lookup)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lskip.inference.drafting.draft import Draft
from lskip.inference.drafting.drafter import Drafter, GoesOn, Runners
from lskip.inference.drafting.round import Chooser, Drafted, Slots
from lskip.utils.checks import check_whole


class NgramDrafter(Drafter):
    """Drafts what followed the last tokens of a text where they stood before in it."""

    kind = "ngram"

    def __init__(self, runners: Runners, slots: Slots):
        super().__init__(runners, slots)
        self._indices: dict[int, NgramIndex] = {}

    def begin(self, slot: int) -> None:
        self._indices[slot] = NgramIndex()

    def move(self, source: int, target: int) -> None:
        self._indices[target] = self._indices[source]

    def propose(self, draft: Draft, count: int, chooser: Chooser, goes_on: GoesOn) -> Drafted | None:
        guesses = [self._guess(slot, text, count) for slot, text in enumerate(self.slots.texts)]
        if not (longest := max(map(len, guesses))):
            return None
        filled = [guess + [0] * (longest - len(guess)) for guess in guesses]
        ids = torch.tensor(filled, device=self.slots.pending.device)
        return Drafted(ids, counts=[len(guess) for guess in guesses])

    def _guess(self, slot: int, text: list[int], count: int) -> list[int]:
        index = self._indices[slot]
        index.push(text[len(index.text) :])  # only now: most texts are never asked
        return index.guess(count)


class NgramIndex:
    """The text of one slot, and where each of its n-grams was last followed by a token.

    One dictionary entry a token and n: pushing costs the same however long the text is.
    """

    def __init__(self, max_n: int = 3, min_n: int = 2):
        """The last `max_n` tokens are looked up first, then fewer, down to `min_n`.

        Raises:
            ValueError: not whole numbers with 1 <= min_n <= max_n.
        """
        check_whole("min_n", min_n, 1)
        check_whole("max_n", max_n, 1)
        if min_n > max_n:
            raise ValueError(f"min_n: {min_n} is more than max_n, {max_n}")
        self.sizes = range(max_n, min_n - 1, -1)
        self.text: list[int] = []
        self.followers: dict[tuple[int, ...], int] = {}  # n-gram -> position of the token after its latest occurrence

    def push(self, ids: Iterable[int]) -> None:
        """Adds tokens to the end of the text."""
        for token in ids:
            # The n-grams that end here are entered only now that something follows them: the end of the text
            # itself is never found as its own earlier occurrence.
            end = len(self.text)
            for size in self.sizes:
                if size <= end:
                    self.followers[tuple(self.text[end - size :])] = end
            self.text.append(token)

    def guess(self, num: int) -> list[int]:
        """Up to `num` tokens that followed the latest earlier occurrence of the longest n-gram that ends the text.

        Fewer where the text ends; none where no n-gram occurred before.
        """
        for size in self.sizes:
            if (start := self.followers.get(tuple(self.text[-size:]))) is not None:
                return self.text[start : start + num]
        return []

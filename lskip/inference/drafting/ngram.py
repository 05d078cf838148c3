"""Prompt lookup: drafts of the tokens that followed the same n-gram earlier in the text."""

from collections.abc import Iterable
from itertools import cycle, islice

import torch

from lskip.inference.drafting.draft import Draft
from lskip.inference.drafting.drafter import Drafter, GoesOn, Runners
from lskip.inference.drafting.round import Chooser, Drafted, Slots
from lskip.utils.checks import check_whole


class NgramDrafter(Drafter):
    """Drafter of the tokens that followed the text's last n-gram at its latest earlier occurrence."""

    kind = "ngram"
    foresees = True

    def __init__(self, runners: Runners, slots: Slots):
        super().__init__(runners, slots)
        self._indices: dict[int, NgramIndex] = {}

    def begin(self, slot: int) -> None:
        self._indices[slot] = NgramIndex()

    def move(self, source: int, target: int) -> None:
        self._indices[target] = self._indices[source]

    def propose(self, draft: Draft, count: int, chooser: Chooser, goes_on: GoesOn) -> Drafted | None:
        guesses = chooser.possible(self.foresee(count))
        if not (longest := max(map(len, guesses))):
            return None
        filled = [guess + [0] * (longest - len(guess)) for guess in guesses]
        ids = torch.tensor(filled, device=self.slots.pending.device)
        return Drafted(ids, counts=[len(guess) for guess in guesses])

    def foresee(self, count: int) -> list[list[int]]:
        return [self._guess(slot, text, count) for slot, text in enumerate(self.slots.texts)]

    def _guess(self, slot: int, text: list[int], count: int) -> list[int]:
        index = self._indices[slot]
        index.push(text[len(index.text) :])  # only now, since most texts never draft
        return index.guess(count)


class NgramIndex:
    """Index of one text's n-grams, each with the position behind its latest occurrence.

    Each token adds one dictionary entry for each n, so that it takes the same time however long the text is.
    """

    def __init__(self, max_n: int = 3, min_n: int = 2):
        """Look up the last `max_n` tokens first, then fewer, down to `min_n`.

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
        """Add tokens to the end of the text."""
        for token in ids:
            # The n-grams that end here are entered only now that a token follows them, so that the end of the text is
            # never found as its own earlier occurrence.
            end = len(self.text)
            for size in self.sizes:
                if size <= end:
                    self.followers[tuple(self.text[end - size :])] = end
            self.text.append(token)

    def guess(self, num: int) -> list[int]:
        """Return `num` tokens that followed the latest earlier occurrence of the longest n-gram at the end, or none.

        Behind the text's end the guess follows itself: of a text that repeats its last few tokens it is more of them.
        """
        for size in self.sizes:
            if (start := self.followers.get(tuple(self.text[-size:]))) is not None:
                followed = self.text[start : start + num]
                return list(islice(cycle(followed), num))
        return []

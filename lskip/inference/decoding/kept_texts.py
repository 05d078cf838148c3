"""Texts that have ended, whose keys and values stay in free slots: a prompt that begins like one starts behind that."""

from __future__ import annotations

from itertools import takewhile

from lskip.inference.layers.kv_cache import KVCache


class KeptTexts:
    """What free slots of a cache still hold, until these are needed; the text that ended longest ago goes first.

    Attributes:
        texts: free slot -> the tokens whose keys and values its first cells hold, the oldest text first.
    """

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.texts: dict[int, list[int]] = {}

    def keep(self, slot: int, text: list[int]) -> None:
        """Note the tokens of a text in a slot that is free now, as far as the cache has them."""
        self.texts[slot] = text[: self.cache.lengths[slot]]

    def exchange(self, one: int, other: int) -> None:
        """Give each of two slots what the other holds."""
        self.cache.exchange(one, other)
        places = {one: other, other: one}
        self.texts = {places.get(slot, slot): text for slot, text in self.texts.items()}

    def prepare(self, slot: int, prompt: list[int]) -> int:
        """Make a free slot ready for a prompt, and return how many of the prompt's first tokens it holds already.

        At least the prompt's last token is left to be run.
        """
        shared = {place: _num_shared(text, prompt[:-1]) for place, text in self.texts.items()}
        best = max(shared, key=shared.get, default=slot)
        if not shared.get(best):  # nothing begins like it: take a slot without a text, else the oldest one's
            unused = (place for place in range(slot, len(self.cache.lengths)) if place not in self.texts)
            best = next(unused, None) if slot in self.texts else slot
            best = next(iter(self.texts)) if best is None else best
        if best != slot:
            self.exchange(best, slot)
        self.texts.pop(slot, None)
        return shared.get(best, 0)


def _num_shared(text: list[int], prompt: list[int]) -> int:
    """Return the length of the beginning that two lists of tokens share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, prompt, strict=False)))

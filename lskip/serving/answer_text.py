"""The text of an answer as its tokens come: final pieces, without the stop string that ends it."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lskip.inference.text import TextPieces


class AnswerText:
    """Text of an answer, in pieces that nothing later changes.

    The engine's texts end with the token that completes a stop string, and OpenAI's end before that string: what may
    begin one is held back until it is known not to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str]):
        self._pieces, self._stops = TextPieces(tokenizer), stop_strings
        self._held, self._stopped = "", False

    def push(self, tokens: list[int], ended: bool = False) -> str:
        """Return the text that is final now; all that is left of it where the answer has ended."""
        new = self._pieces.push(tokens) + (self._pieces.rest() if ended else "")
        if self._stopped:
            return ""
        text = self._held + new
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)]
        keep = 0 if ended else longest_begun(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def longest_begun(text: str, stops: Sequence[str]) -> int:
    """Return the length of the longest end of `text` with which one of `stops` begins."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    lengths = range(min(longest, len(text)), 0, -1)
    return next((length for length in lengths if any(stop.startswith(text[-length:]) for stop in stops)), 0)

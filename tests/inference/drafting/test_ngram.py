"""The n-gram index against a search through the whole text."""

import random

import pytest

from lskip.inference.drafting.ngram import NgramIndex


def searched(text, num, max_n, min_n):
    """Return the tokens behind the latest earlier occurrence of the longest n-gram at the end, by a full search.

    Token by token: what was guessed is text too, so that a guess may go beyond the end.
    """
    for size in range(max_n, min_n - 1, -1):
        for start in range(len(text) - size - 1, -1, -1):
            if len(text) > size and text[start : start + size] == text[-size:]:
                longer = list(text)
                for place in range(start + size, start + size + num):
                    longer.append(longer[place])
                return longer[len(text) :]
    return []


@pytest.mark.parametrize(("max_n", "min_n"), [(3, 2), (1, 1), (4, 1), (3, 3)])
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 8])
def test_guesses_what_a_search_finds(vocabulary, max_n, min_n):
    rng = random.Random(vocabulary)
    for _ in range(20):
        index, text = NgramIndex(max_n, min_n), []
        while len(text) < 60:
            piece = [rng.randrange(vocabulary) for _ in range(rng.choice([0, 1, 1, 2, 7]))]
            index.push(piece)
            text += piece
            num = rng.randrange(6)
            assert index.guess(num) == searched(text, num, max_n, min_n), (text, num)


def test_prefers_the_longer_match_then_the_later_one():
    index = NgramIndex()
    index.push([1, 2, 3, 7, 0, 2, 3, 8, 0, 2, 3, 9, 0, 1, 2, 3])
    assert index.guess(2) == [7, 0]  # 1 2 3 occurred once, 2 3 was last followed by 9
    index.push([5, 2, 3])
    assert index.guess(9) == [5, 2, 3] * 3  # the latest earlier 2 3, and where the text ends the guess follows itself


def test_finds_nothing_in_a_text_without_repetition():
    index = NgramIndex()
    assert index.guess(3) == []
    index.push(range(50))
    assert index.guess(3) == []


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((0, 0), "min_n: 0 is not"), ((2.0, 1), "max_n: 2.0 is not"), ((2, 3), "min_n: 3 is more than max_n, 2")],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        NgramIndex(*sizes)

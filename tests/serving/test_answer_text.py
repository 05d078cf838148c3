"""The text that clients get: whatever pieces it comes in, it ends before the first stop string."""

import random

import pytest

from lskip.serving.answer_text import AnswerText


@pytest.mark.parametrize("stops", [(), ("ab",), ("aab", "ba"), ("aaa", "aabaa"), ("é",)])
def test_pieces_make_up_the_text_before_the_first_stop(tiny_tokenizer, stops):
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices("aabé", k=rng.randrange(1, 12)))
        ids = tiny_tokenizer(text).input_ids
        found = [place for stop in stops if (place := text.find(stop)) >= 0]
        answer, pieces = AnswerText(tiny_tokenizer, stops), []
        while ids:
            count = rng.randrange(1, 4)
            pieces.append(answer.push(ids[:count], ended=count >= len(ids)))
            ids = ids[count:]
        assert "".join(pieces) == text[: min(found, default=len(text))]


def test_nothing_is_held_that_begins_no_stop_string(tiny_tokenizer):
    answer = AnswerText(tiny_tokenizer, ("xyz",))
    assert [answer.push(tiny_tokenizer(text).input_ids) for text in ("ab", "x", "y", "q")] == ["ab", "", "", "xyq"]

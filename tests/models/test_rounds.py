"""Rounds along a text, by hand and against a slow simulation of decoding."""

import pytest
import torch

from lskip.models.rounds import first_of_texts, round_starts


def simulated(agree: list[bool], num_speculations: int) -> list[int]:
    """Decode one text token by token, drafting as an exit that is right where `agree` says; where rounds begin."""
    starts, done = [], 0
    while done < len(agree):
        starts.append(done)
        if done:  # the prefill drafts nothing
            for _ in range(num_speculations):
                if done == len(agree) or not agree[done]:
                    break
                done += 1  # accepted
        done += done < len(agree)  # the model's own
    return starts


def starts_of(agree: list[bool], num_speculations: int) -> list[int]:
    first = torch.zeros(len(agree), dtype=torch.bool)
    first[:1] = True
    return round_starts(torch.tensor(agree, dtype=torch.bool), first, num_speculations).nonzero().flatten().tolist()


def test_texts_by_hand():
    # The prefill brings token 0; of tokens 1 to 4 two are drafted and accepted, the third is the model's own …
    assert starts_of([True] * 7, 2) == [0, 1, 4]
    # … a wrong one (2) ends its round at once, with the model's own in its place.
    assert starts_of([False, True, False, False, True, True], 4) == [0, 1, 3, 4]
    assert starts_of([False] * 3, 4) == [0, 1, 2]
    assert starts_of([True], 4) == [0] and starts_of([], 4) == []


def test_positions_of_texts_by_hand():
    # Two rows of 4: the first wholly scored, the second from its third token on; then two answers in one row.
    assert first_of_texts(torch.tensor([0, 1, 2, 5, 6])).tolist() == [True, False, False, True, False]
    assert first_of_texts(torch.tensor([3, 4, 6])).tolist() == [True, False, True]
    assert first_of_texts(torch.tensor([], dtype=torch.long)).tolist() == []


@pytest.mark.parametrize("num_speculations", [1, 3, 4, 8])
@pytest.mark.parametrize("right", [0.2, 0.7, 0.97])
def test_many_texts_and_layers_at_once_are_those_of_decoding_each_alone(num_speculations, right):
    generator = torch.Generator().manual_seed(num_speculations)
    lengths = [1, 9, 2, 40, 1, 33, 5]
    agree = torch.rand(4, sum(lengths), generator=generator) < right
    agree[-1] = True
    first = torch.cat([torch.arange(length) == 0 for length in lengths])
    found = round_starts(agree, first, num_speculations)
    for layer, marks in zip(agree, found, strict=True):
        slow, offset = [], 0
        for length in lengths:
            slow += [offset + at for at in simulated(layer[offset : offset + length].tolist(), num_speculations)]
            offset += length
        assert marks.nonzero().flatten().tolist() == slow

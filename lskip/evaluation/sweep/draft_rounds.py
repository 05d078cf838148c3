"""Prediction of the rounds of drafts along a model's own text, without decoding again."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from lskip.evaluation.sweep.own_answers import OwnText
from lskip.inference.drafting.ngram import NgramIndex
from lskip.models.rounds import round_starts


class DraftRound(NamedTuple):
    """A predicted round: tokens that it would draft, and how many of them would be accepted."""

    drafted: int
    accepted: int


def rounds_of_exit(text: OwnText, hits: Sequence[bool], num_speculations: int) -> list[DraftRound]:
    """Return the rounds after the prefill, drafted by an exit.

    Args:
        hits: for each token of the answer, whether it is the exit's argmax.
    """
    first = torch.arange(len(hits)) == 0
    starts = round_starts(torch.tensor(hits, dtype=torch.bool), first, num_speculations).nonzero().flatten().tolist()
    counts = [(done, most_drafted(text, done, num_speculations)) for done in starts[1:]]
    return [_round(text, hits, done, most) for done, most in counts]


def rounds_of_criterion(
    text: OwnText, hits: Sequence[bool], sure: Sequence[bool], num_speculations: int
) -> list[DraftRound]:
    """Return the rounds after the prefill, drafted by an exit until it is unsure (CriterionDraft).

    Accepted tokens are those of decoding. How far a draft goes on behind its first wrong token is a guess: the exit is
    taken to be as sure there as it is along the answer.

    Args:
        hits: for each token of the answer, whether it is the exit's argmax.
        sure: whether the criterion lets the draft go on behind it.
    """

    def right(done: int, most: int) -> DraftRound:
        drafted = min(leading(sure[done : done + most - 1]) + 1, most)  # the unsure token too
        return _round(text, hits, done, drafted)

    return _rounds(text, num_speculations, right)


def rounds_of_ngrams(text: OwnText, num_speculations: int) -> list[DraftRound]:
    """Return the rounds after the prefill, drafted by prompt lookup. A round that finds no n-gram drafts nothing."""
    index = NgramIndex()

    def right(done: int, most: int) -> DraftRound:
        known = text.prompt + text.answer[:done]
        index.push(known[len(index.text) :])
        guess, own = index.guess(most), text.answer[done : done + most]
        return DraftRound(len(guess), leading([a == b for a, b in zip(guess, own, strict=False)]))

    return _rounds(text, num_speculations, right)


def leading(hits: Sequence[bool]) -> int:
    """Return how many are true before the first that is not."""
    return next((place for place, hit in enumerate(hits) if not hit), len(hits))


def _round(text: OwnText, hits: Sequence[bool], done: int, most: int) -> DraftRound:
    """Return the round of up to `most` tokens behind the first `done`: a draft that says the text's end stops there."""
    accepted = leading(hits[done : done + most])
    stops = text.ends_drafts and done + accepted == len(text.answer)
    return DraftRound(accepted if stops else most, accepted)


def _rounds(text: OwnText, num_speculations: int, right: Callable[[int, int], DraftRound]) -> list[DraftRound]:
    done, rounds = 1, []  # the prefill has brought the first token
    while done < len(text.answer):
        rounds.append(right(done, most_drafted(text, done, num_speculations)))
        done += rounds[-1].accepted + 1
    return rounds


def most_drafted(text: OwnText, done: int, num_speculations: int) -> int:
    """Return the tokens that a round may draft, as Batch: what the text may still get, less the model's own token."""
    return min(num_speculations, text.max_new_tokens - done - 1)


def shorter_rounds(accepted_counts: Counter[int], num_speculations: int) -> list[DraftRound]:
    """Return about the rounds that a draft would have with fewer tokens, from rounds measured with more.

    Each measured round makes one. The tokens that a shorter round leaves to the next are taken to fare alike.
    """
    counts = ((min(accepted, num_speculations), rounds) for accepted, rounds in accepted_counts.items())
    return [DraftRound(num_speculations, accepted) for accepted, rounds in counts for _ in range(rounds)]


def tokens_of(rounds: Iterable[DraftRound]) -> int:
    """Return the tokens that rounds bring: in each the accepted ones and the model's own."""
    return sum(each.accepted + 1 for each in rounds)

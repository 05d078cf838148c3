"""Prediction of the rounds of drafts along a model's own text, without decoding again."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from lskip.inference.drafting.ngram import NgramIndex
from lskip.inference.layers.kv_cache import PREFILL_ROWS
from lskip.inference.runners.base import ModelRunner
from lskip.losses import rows_at_once


class DraftRound(NamedTuple):
    """A predicted round: tokens that it would draft, and how many of them would be accepted."""

    drafted: int
    accepted: int


class OwnText(NamedTuple):
    """A prompt and the model's greedy answer.

    Attributes:
        prompt, answer: token ids.
        max_new_tokens: the limit on the answer, near which rounds draft less.
    """

    prompt: list[int]
    answer: list[int]
    max_new_tokens: int


@torch.inference_mode()
def exit_predictions(runner: ModelRunner, text: OwnText, vocab_size: int) -> torch.Tensor:
    """Return the argmax [L, N] of each exit, first to last, for each of the N tokens of the answer.

    One pass suffices: up to its first wrong token, a drafting exit sees the model's own tokens alone, so these are the
    tokens that it would draft.
    """
    ids = torch.tensor([text.prompt + text.answer[:-1]], device=runner.device)
    cache, first = runner.new_cache(1, ids.shape[1]), len(text.prompt) - 1
    columns = []
    for start in range(0, ids.shape[1], PREFILL_ROWS):
        x, layers = runner.embed(ids[:, start : start + PREFILL_ROWS], [start]), []
        for block in range(runner.num_layers):
            x = runner.run(x, cache, [start], block, block + 1)
            if start + x.shape[1] > first:  # else this piece predicts no token of the answer
                layers.append(_decode(runner, x[0, max(first - start, 0) :], rows_at_once(vocab_size, runner.device)))
        columns += [torch.stack(layers)] if layers else []
    return torch.cat(columns, 1)


def _decode(runner: ModelRunner, states: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the argmax [N] of states [N, D]."""
    return torch.cat([runner.decode(part[None])[0].argmax(-1) for part in states.split(rows)])


def rounds_of_exit(text: OwnText, hits: Sequence[bool], num_speculations: int) -> list[DraftRound]:
    """Return the rounds after the prefill, drafted by an exit.

    Args:
        hits: for each token of the answer, whether it is the exit's argmax.
    """

    def right(done: int, most: int) -> DraftRound:
        return DraftRound(most, leading(hits[done : done + most]))

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


def _rounds(text: OwnText, num_speculations: int, right: Callable[[int, int], DraftRound]) -> list[DraftRound]:
    done, rounds = 1, []  # the prefill has brought the first token
    while done < len(text.answer):
        # As Batch: no more than the text may still get, less the model's own token.
        rounds.append(right(done, min(num_speculations, text.max_new_tokens - done - 1)))
        done += rounds[-1].accepted + 1
    return rounds


def shorter_rounds(accepted_counts: Counter[int], num_speculations: int) -> list[DraftRound]:
    """Return about the rounds that a draft would have with fewer tokens, from rounds measured with more.

    Each measured round makes one. The tokens that a shorter round leaves to the next are taken to fare alike.
    """
    counts = ((min(accepted, num_speculations), rounds) for accepted, rounds in accepted_counts.items())
    return [DraftRound(num_speculations, accepted) for accepted, rounds in counts for _ in range(rounds)]


def tokens_of(rounds: Iterable[DraftRound]) -> int:
    """Return the tokens that rounds bring: in each the accepted ones and the model's own."""
    return sum(each.accepted + 1 for each in rounds)

"""Rounds of greedy self-speculation along a text, from which tokens of it an exit predicts rightly."""

import torch
from torch import Tensor


def first_of_texts(positions: Tensor) -> Tensor:
    """Return, bool [N], which of the ascending `positions` [N] begin a text: those that do not follow the one before.

    The last position of a row predicts nothing and is never scored, so rows of a batch part here too, as do the
    answers of a conversation.
    """
    follows = positions.diff() == 1
    return torch.cat([positions.new_ones(min(len(positions), 1), dtype=torch.bool), ~follows])


def round_starts(agree: Tensor, first: Tensor, num_speculations: int) -> Tensor:
    """Return the tokens with which rounds begin, in greedy self-speculation (arXiv 2404.16710, section 4.3).

    The prefill is a round, as in `Generation.rounds`: it brings a text's first token. A later round that begins at
    token t drafts `num_speculations` tokens. With r of them right before the first wrong one it brings r + 1, and the
    next begins behind these; the last one ends with its text. So tokens per round are N over the number of starts.

    Args:
        agree: bool [..., N], whether the drafted token is the right one; those of texts one behind the other.
        first: bool [N], the first token of each text.
        num_speculations: d, tokens that a round drafts.

    Returns:
        bool [..., N].
    """
    length = agree.shape[-1]
    here = torch.arange(length, device=agree.device)
    wrong = _next_true(~agree | first)
    ends = torch.cat([_next_true(first)[1:], here.new_full((min(length, 1),), length)])
    behind = torch.minimum(torch.minimum(wrong, here + num_speculations) + 1, ends)
    return _visited(behind)


def _next_true(flags: Tensor) -> Tensor:
    """Return, for bool [..., N], the index of the first true at or behind each place: [..., N], N where none is."""
    length = flags.shape[-1]
    found = torch.where(flags, torch.arange(length, device=flags.device), length)
    return found.flip(-1).cummin(-1).values.flip(-1)


def _visited(behind: Tensor) -> Tensor:
    """Return, bool [..., N], the places of a walk that begins at 0 and goes from t to behind[..., t] > t, up to N.

    The first 2^k places are known after k turns, each of which doubles the stride.
    """
    length = behind.shape[-1]
    jumps = torch.cat([behind, behind.new_full((*behind.shape[:-1], 1), length)], -1)
    visited = torch.zeros_like(jumps)
    visited[..., 0] = 1
    for _ in range(length.bit_length()):
        visited = visited.scatter_reduce(-1, jumps, visited, "amax")
        jumps = jumps.gather(-1, jumps)
    return visited[..., :-1].bool()

"""Rows of several sources: one after the other for validation, in proportion to their weights for training."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from lskip.data.collation import Border, kept_apart
from lskip.data.packed_rows import TrainingRows
from lskip.data.rows import Row, StoredRows

Finish = Callable[[Row], Row] | None

WINDOW = 1024  # rows in which each source has its share exactly, to the last row


class Endless(Protocol):
    """Rows by their numbers, without end."""

    def row(self, number: int) -> Row: ...


class EndlessRows:
    """Stored rows again and again, each time in another order, a function of the seed."""

    def __init__(self, rows: TrainingRows, seed: int):
        self.rows, self.seed = rows, seed
        self.order: tuple[int, np.ndarray] = -1, np.zeros(0)  # of which epoch

    def row(self, number: int) -> Row:
        if not len(self.rows):
            raise ValueError("source: one of several holds no training row of block_size tokens")
        epoch, place = divmod(number, len(self.rows))
        if self.order[0] != epoch:
            self.order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.rows))
        return self.rows[int(self.order[1][place])]


class MixedRows:
    """Rows of several sources in turn, each as often as its weight says, in an order that is a function of the seed.

    Args:
        sources: of rows.
        finish: of each source, what gives its rows the columns of all; None: they have them.
        weights: the shares of the sources in all rows, up to a factor; each at least one row of WINDOW.
    """

    def __init__(self, sources: Sequence[Endless], finish: Sequence[Finish], weights: Sequence[float], seed: int):
        self.sources, self.finish, self.seed = sources, finish, seed
        self.shares = np.array([0.0, *accumulate(weights)]) / sum(weights)
        self.window: tuple[int, np.ndarray, np.ndarray] = -1, np.zeros(0), np.zeros(0)

    def row(self, number: int) -> Row:
        """Return a row of the mixture."""
        source, before = self._places(number // WINDOW)
        which, place = int(source[number % WINDOW]), number % WINDOW
        row = self.sources[which].row(int(before[which, place]))
        return row if self.finish[which] is None else self.finish[which](row)

    def counts(self, number: int) -> list[int]:
        """Return how many rows of each source come before a row."""
        return self._places(number // WINDOW)[1][:, number % WINDOW].tolist()

    def _places(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each row of a window, and how many rows of each source come before it in all."""
        if self.window[0] != window:
            first, last = (np.diff((self.shares * WINDOW * w).round().astype(np.int64)) for w in (window, window + 1))
            numbers = np.arange(len(self.sources))
            source = np.random.default_rng((self.seed, window)).permutation(np.repeat(numbers, last - first))
            is_of = source == numbers[:, None]
            self.window = window, source, first[:, None] + is_of.cumsum(1) - is_of
        return self.window[1:]


class SeveralRows(StoredRows):
    """The rows of several sources, one source after the other.

    Args:
        finish: of each source, what gives its rows the columns of all; None: they have them.
    """

    def __init__(self, parts: Sequence[StoredRows], finish: Sequence[Finish]):
        self.parts, self.finish = parts, finish
        self.ends, self.block_size = list(accumulate(map(len, parts))), parts[0].block_size
        self.columns = tuple(self[0]) if len(self) else parts[0].columns

    def __len__(self) -> int:
        return self.ends[-1]

    def _row(self, number: int) -> Row:
        part = bisect_right(self.ends, number)
        row = self.parts[part][number - (self.ends[part - 1] if part else 0)]
        return row if self.finish[part] is None else self.finish[part](row)


def with_all_columns(row: Row, border: Border | None) -> Row:
    """Return a row with labels and positions, as those of sources of another kind have them.

    Args:
        border: of a row of text whose documents are kept apart; None: it is one document, or says where they begin.
    """
    ids = row["input_ids"]
    whole = {"labels": ids, "position_ids": np.arange(len(ids)), **row}
    if border is None:
        return whole
    batch = {name: torch.from_numpy(np.array(whole[name], np.int64))[None] for name in ("input_ids", "labels")}
    return {**whole, **{name: part[0].numpy() for name, part in kept_apart(batch, border).items()}}

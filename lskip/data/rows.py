"""Rows of exactly `block_size` tokens, made of documents as they are read, or of stored tokens.

Labels follow transformers: aligned with the inputs, shifted inside the model, -100 where a token is not scored.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lskip.data.encoders import Encoder, Run
from lskip.data.token_store import TokenStore
from lskip.models.scored import NOT_SCORED

Row = dict[str, np.ndarray]
AT_ONCE = 10_000  # documents whose scored tokens are counted together


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def padded(ids: Sequence[int], scored: Sequence[bool], size: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return input_ids [size] and labels [size], cut or padded at the right."""
    input_ids, labels = np.full(size, pad, np.int64), np.full(size, NOT_SCORED, np.int64)
    count = min(len(ids), size)
    input_ids[:count] = ids[:count]
    labels[:count] = np.where(scored[:count], ids[:count], NOT_SCORED)
    return input_ids, labels


class RowMaker:
    """Makes rows of the documents of a stream, one run of tokens after the other.

    Texts are joined and cut into rows; what does not fill one is kept for the next run. Each pair or conversation is a
    row, and left out where nothing in it is scored.
    """

    def __init__(self, encoder: Encoder, block_size: int):
        self.encoder, self.block_size = encoder, block_size
        self.pad = padding_token(encoder.tokenizer)
        self.rest: list[int] = []

    def rows(self, documents: Iterable[dict]) -> Iterator[Row]:
        """Yield the rows of documents."""
        for run in self.encoder.runs_of(documents):
            yield from self._example(run) if self.encoder.marks_scored else self._filled(run)

    def _filled(self, run: Run) -> Iterator[Row]:
        self.rest += run.ids
        size = len(self.rest) // self.block_size * self.block_size
        full, self.rest = self.rest[:size], self.rest[size:]
        for row in np.array(full, np.int64).reshape(-1, self.block_size):
            yield {"input_ids": row}

    def _example(self, run: Run) -> Iterator[Row]:
        ids, labels = padded(run.ids, run.scored, self.block_size, self.pad)
        if (labels[1:] != NOT_SCORED).any():  # the first label has no input before it
            yield {"input_ids": ids, "labels": labels}


class StoredRows(Dataset):
    """Rows of stored tokens: rows[3] is one, rows[3:5] or rows[[1, 7]] are the columns of several.

    Attributes:
        lengths: columns that each row needs, up to its last scored token, int [rows]; None for text, which needs all.
    """

    columns: tuple[str, ...]
    lengths: np.ndarray | None = None

    def __init__(self, store: TokenStore, block_size: int):
        self.store, self.block_size = store, block_size

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, chosen: int | slice | Sequence[int]) -> Row:
        if isinstance(chosen, int | np.integer):
            return self._row(range(len(self))[chosen])
        if isinstance(chosen, str):
            raise TypeError(f"rows are chosen by their numbers; {chosen} of all of them is rows[:][{chosen!r}]")
        numbers = range(len(self))[chosen] if isinstance(chosen, slice) else chosen
        rows = [self._row(int(number)) for number in numbers]
        return {name: np.array([row[name] for row in rows]).reshape(-1, self.block_size) for name in self.columns}

    def in_parts(self, most_rows: int | None = None) -> Iterator[Row]:
        """Yield all rows, or at most so many that are evenly spaced, by columns and a thousand at once."""
        step = 1 if most_rows is None else -(-len(self) // most_rows) or 1
        for start in range(0, len(self), 1000 * step):
            yield self[start : start + 1000 * step : step]


class TextRows(StoredRows):
    """Texts, joined and cut into rows {"input_ids"}; the last tokens, which fill none, are left out.

    Args:
        most: rows at most; None: all.
    """

    columns = ("input_ids",)

    def __init__(self, store: TokenStore, block_size: int, most: int | None = None):
        super().__init__(store, block_size)
        rows = len(store.tokens) // block_size
        self.count = rows if most is None else min(rows, most)

    def __len__(self) -> int:
        return self.count

    def _row(self, number: int) -> Row:
        first = number * self.block_size
        return {"input_ids": self.store.tokens[first : first + self.block_size].astype(np.int64)}


class ExampleRows(StoredRows):
    """Pairs or conversations, one a row {"input_ids", "labels"}, without those in which nothing is scored.

    Args:
        pad: the token behind the last of a row.
        most: rows at most; None: all.

    Attributes:
        left_out: examples in which nothing is scored.
    """

    columns = ("input_ids", "labels")

    def __init__(self, store: TokenStore, block_size: int, pad: int, most: int | None = None):
        super().__init__(store, block_size)
        self.pad = pad
        lengths = scored_lengths(store, block_size)
        self.examples = np.flatnonzero(lengths)
        self.left_out = len(lengths) - len(self.examples)
        self.examples = self.examples[:most]
        self.lengths = lengths[self.examples]

    def __len__(self) -> int:
        return len(self.examples)

    def _row(self, number: int) -> Row:
        start, end = self.store.place(int(self.examples[number]))
        here = slice(start, min(end, start + self.block_size))
        ids, labels = padded(
            self.store.tokens[here].astype(np.int64), self.store.scored[here], self.block_size, self.pad
        )
        return {"input_ids": ids, "labels": labels}


def rows_of(
    store: TokenStore, tokenizer: PreTrainedTokenizerBase, block_size: int, most: int | None = None
) -> TextRows | ExampleRows:
    """Return the rows of stored tokens, at most so many."""
    if store.scored is None:
        return TextRows(store, block_size, most)
    return ExampleRows(store, block_size, padding_token(tokenizer), most)


def warn_of_left_out(rows: StoredRows, split: str) -> None:
    """Warn of pairs and conversations of a split that are no rows."""
    if isinstance(rows, ExampleRows) and rows.left_out:
        rank_zero_warn(
            f"{rows.left_out} of {len(rows.store)} {split} examples left out: nothing scored within "
            f"block_size={rows.block_size} tokens"
        )


def scored_lengths(store: TokenStore, block_size: int) -> np.ndarray:
    """Return how many tokens of each document there are up to the last scored one of its first block_size.

    0 where none but the first is scored, which no token is before. int [documents].
    """
    found = [np.zeros(0, np.int64)]
    for first in range(0, len(store), AT_ONCE):
        ends = store.ends[first : first + AT_ONCE]
        begin = store.place(first)[0]
        starts = np.concatenate([[begin], ends[:-1]]) - begin
        stops = np.minimum(ends - begin, starts + block_size)
        counts = np.concatenate([[0], store.scored[begin : ends[-1]].cumsum()])  # scored before each token
        is_any = counts[stops] > counts[np.minimum(starts + 1, stops)]
        found.append(np.where(is_any, np.searchsorted(counts, counts[stops]) - starts, 0))
    return np.concatenate(found)

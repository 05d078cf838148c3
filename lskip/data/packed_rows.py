"""Pairs and conversations packed into rows, in which each is kept apart from its neighbours."""

from collections import defaultdict

import numpy as np
from torch.utils import data

from lskip.data.rows import ExampleRows, StoredRows
from lskip.models.scored import NOT_SCORED


def fill_rows(lengths: np.ndarray, size: int) -> list[list[int]]:
    """Return which examples lie in each row of `size` tokens, in their order there.

    Best fit decreasing: the longest example first, each into the fullest row that has room for it.

    Args:
        lengths: tokens of each example, from 1 to size.
    """
    rows: list[list[int]] = []
    with_room = defaultdict(list)  # room -> rows that have as much
    rooms = 0  # bit r is set where a row has the room r
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1  # the least
            row = with_room[room].pop()
            if not with_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = size, len(rows)
            rows.append([])
        rows[row].append(example)
        if left := room - length:
            with_room[left].append(row)
            rooms |= 1 << left
    return rows


class PackedRows(data.Dataset):
    """Rows of several examples: {"input_ids", "labels", "position_ids"}, each [size].

    An example ends with its last scored token; positions begin at 0 with each, and its first token is not scored.

    Args:
        examples: one a row.
        pad: the token behind the last example of a row.
    """

    def __init__(self, examples: ExampleRows, pad: int):
        self.examples, self.pad = examples, pad
        self.lengths, self.size = examples.lengths, examples.block_size
        self.rows = fill_rows(self.lengths, self.size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        chosen = self.rows[number]
        found, lengths = self.examples[chosen], self.lengths[chosen]
        ids, labels = np.full(self.size, self.pad, np.int32), np.full(self.size, NOT_SCORED, np.int32)
        places, start = np.arange(self.size), 0
        for one, length in enumerate(lengths.tolist()):
            here = slice(start, start + length)
            ids[here], labels[here] = found["input_ids"][one, :length], found["labels"][one, :length]
            labels[start] = NOT_SCORED
            places[start:] = np.arange(self.size - start)
            start += length
        places[start:] = np.arange(self.size - start)  # padding is a text of its own
        return {"input_ids": ids, "labels": labels, "position_ids": places}


TrainingRows = StoredRows | PackedRows

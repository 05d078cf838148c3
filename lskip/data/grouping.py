"""Rows in groups of bounded size."""

from collections.abc import Iterable, Iterator

MOST_ROWS = 1000
MOST_BYTES = 2**24


def grouped(rows: Iterable[dict], most_rows: int = MOST_ROWS, most_bytes: int = MOST_BYTES) -> Iterator[list[dict]]:
    """Yield the rows in lists of bounded size; a row beyond the bound is a list of its own."""
    batch, size = [], 0
    for row in rows:
        length = sum(len(value) for value in row.values())
        if batch and (size + length > most_bytes or len(batch) == most_rows):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += length
    if batch:
        yield batch

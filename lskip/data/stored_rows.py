"""Rows in an Arrow file: written in batches of bounded size, read memory-mapped."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

MOST_ROWS = 1000  # in a batch of the file
MOST_BYTES = 2**24


def write_rows(path: Path, features: Features, rows: Iterable[dict]) -> None:
    schema = features.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in grouped(rows):
            columns = [column([row[field.name] for row in batch], field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def column(values: list, kind: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, type=kind)
    flat = np.concatenate(values).astype(kind.value_type.to_pandas_dtype(), copy=False)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=kind)


def grouped(rows: Iterable[dict], most_rows: int = MOST_ROWS, most_bytes: int = MOST_BYTES) -> Iterator[list[dict]]:
    """Yield the rows in lists of bounded size; a row beyond the bound is a list of its own."""
    batch, size = [], 0
    for row in rows:
        length = sum(size_of(value) for value in row.values())
        if batch and (size + length > most_bytes or len(batch) == most_rows):
            yield batch
            batch, size = [], 0
        batch.append(row)
        size += length
    if batch:
        yield batch


def size_of(value) -> int:
    return len(value) if isinstance(value, str) else value.nbytes


def open_rows(path: Path) -> Dataset:
    return Dataset.from_file(str(path))


def sort_rows(source: Path, target: Path, features: Features, by: str) -> None:
    """Write the rows of `source` into `target`, in the order of one column."""
    rows = open_rows(source)
    order = pc.sort_indices(rows.data[by]).to_numpy()

    def in_order() -> Iterator[dict]:
        for place in order:
            yield rows[int(place)]

    write_rows(target, features, in_order())

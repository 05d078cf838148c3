"""Rows in an Arrow file: written in batches of bounded size, read memory-mapped."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features

from lskip.data.grouping import grouped

GATHERED = 16  # rows that are read together to be put in order; one may be long


def write_rows(path: Path, features: Features, rows: Iterable[dict]) -> None:
    schema = features.arrow_schema
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
        for batch in grouped(rows):
            columns = [pa.array([row[field.name] for row in batch], type=field.type) for field in schema]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def open_rows(path: Path) -> Dataset:
    return Dataset.from_file(str(path))


def sort_rows(source: Path, target: Path, features: Features, by: str, width: int) -> None:
    """Write the rows of `source` into `target`, in the order of one column, without repetitions.

    Rows are the same where `width` characters of the column are; of those the first is kept. Only the order is in
    memory, 8 bytes for each row.
    """
    rows = open_rows(source)
    key = rows.data[by]
    is_longer = len(rows) and pc.max(pc.binary_length(key)).as_py() > width
    order = pc.sort_indices(pc.utf8_slice_codeunits(key, 0, width) if is_longer else key).to_numpy()  # a stable sort

    def in_order() -> Iterator[dict]:
        last = None
        for start in range(0, len(order), GATHERED):
            columns = rows[order[start : start + GATHERED]]
            for values in zip(*columns.values(), strict=True):
                row = dict(zip(columns, values, strict=True))
                if row[by][:width] != last:
                    last = row[by][:width]
                    yield row

    write_rows(target, features, in_order())

"""Reading of .csv and .tsv files row by row: the first row names the columns, every value is a text."""

import csv
from collections.abc import Iterator
from pathlib import Path

from lskip.data.corpora import PLACE
from lskip.data.files import LONGEST, numbered_lines, suffix_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_csv(paths: list[str], lone: bool = False) -> Iterator[dict]:
    """Yield the rows of each file, in the form of RFC 4180: values in double quotes may hold delimiters and lines.

    Raises:
        ValueError: no names of columns, one of them twice, or a row with other than one value for each, with its line.
    """
    csv.field_size_limit(LONGEST)  # of the whole process; the default is 131,072 characters
    for path in map(Path, paths):
        rows = _rows(path)
        columns = next(rows, (1, []))[1]
        if not all(columns) or len(set(columns)) < len(columns) or not columns:
            raise ValueError(f"source: '{path}': its first row must name the columns, each once; it is {columns!r:.90}")
        for number, values in rows:
            place = f"line {number}" if lone else f"'{path}' line {number}"
            if len(values) != len(columns):
                found = f"{len(values)} value{'s' * (len(values) != 1)}"
                raise ValueError(f"source: {place}: {found} for the {len(columns)} columns {columns!r:.90}")
            yield {**dict(zip(columns, values, strict=True)), PLACE: place}


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of the first line and the values of each row; blank lines are left out."""
    reader = csv.reader((line for _, line in numbered_lines(path)), delimiter=DELIMITERS[suffix_of(path)], strict=True)
    while True:
        number = reader.line_num + 1
        try:
            values = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"source: '{path}' line {number} is not a row of {suffix_of(path)} ({error})") from error
        if values is None:
            return
        if values:
            yield number, values

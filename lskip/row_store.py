"""Rows of numbers on disk that only ever get more: each is computed once, and found again by its digest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

INDEX_FILE = "rows.bin"  # written last: what it does not tell of was left by a kill
INDEX = np.dtype([("digest", "<u8"), ("tokens", "<i8")])


class RowStore:
    """Parts of rows in files, a file for each part with all rows one after another, without padding.

    One process at a time may open it and append; what it has mapped stays readable.

    Attributes:
        widths: part -> its type and how many numbers of it a token has.
    """

    def __init__(self, folder: Path, widths: dict[str, tuple[type, int]]):
        self.folder, self.widths = folder, widths
        self._places: dict[int, slice] = {}
        self._tokens = 0

    def open(self) -> None:
        """Finds what there is, and takes away what a kill left of rows that are not whole."""
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self._index()
        self._places, self._tokens = {}, 0
        for digest, tokens in index.tolist():
            self._take(digest, tokens)
        sizes = {
            f"{name}.bin": self._tokens * width * np.dtype(kind).itemsize for name, (kind, width) in self.widths.items()
        }
        for name, size in {**sizes, INDEX_FILE: len(index) * INDEX.itemsize}.items():
            with (self.folder / name).open("ab") as file:
                file.truncate(size)

    def _index(self) -> np.ndarray:
        path = self.folder / INDEX_FILE
        data = path.read_bytes() if path.exists() else b""
        return np.frombuffer(data[: len(data) - len(data) % INDEX.itemsize], INDEX)

    def _take(self, digest: int, tokens: int) -> None:
        self._places[digest] = slice(self._tokens, self._tokens + tokens)
        self._tokens += tokens

    def __contains__(self, digest: int) -> bool:
        return digest in self._places

    def place(self, digest: int) -> slice:
        """Which tokens of its parts are the row's; KeyError where it is not there."""
        return self._places[digest]

    def append(self, digests: Sequence[int], rows: Sequence[dict[str, np.ndarray]]) -> None:
        """Adds rows, each {part: [tokens, width]} in that part's type; those that it has are left out."""
        new = {digest: row for digest, row in zip(digests, rows, strict=True) if digest not in self}
        for name in self.widths:
            with (self.folder / f"{name}.bin").open("ab") as file:
                for row in new.values():
                    file.write(np.ascontiguousarray(row[name]).tobytes())
        entries = [(digest, len(row[next(iter(self.widths))])) for digest, row in new.items()]
        with (self.folder / INDEX_FILE).open("ab") as file:
            file.write(np.array(entries, INDEX).tobytes())
        for digest, tokens in entries:
            self._take(digest, tokens)

    def mapped(self, name: str) -> np.ndarray:
        """[tokens of all rows, width] of a part, mapped from the disk."""
        kind, width = self.widths[name]
        path, shape = self.folder / f"{name}.bin", (self._tokens, width)
        return np.memmap(path, kind, "r", shape=shape) if self._tokens else np.empty(shape, kind)

"""Rows of numbers on disk that only ever get more: each is computed once, and found again by its digest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

INDEX_FILE = "rows.bin"  # written last: what it does not tell of was left by a kill
INDEX = np.dtype([("digest", "<u8"), ("tokens", "<i8")])


class RowStore:
    """Parts of rows in files, a file for each part with all rows one after another, without padding.

    Only one process may have it open to append; others may read what it held when they opened it.

    Attributes:
        widths: part -> its type and how many numbers of it a token has.
    """

    def __init__(self, folder: Path, widths: dict[str, tuple[type, int]]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.widths = folder, widths
        index = self._index()
        starts = np.cumsum(index["tokens"]) - index["tokens"]
        self._starts = dict(zip(index["digest"].tolist(), starts.tolist(), strict=True))
        self._tokens = int(index["tokens"].sum())

    def _index(self) -> np.ndarray:
        path = self.folder / INDEX_FILE
        data = path.read_bytes() if path.exists() else b""
        return np.frombuffer(data[: len(data) - len(data) % INDEX.itemsize], INDEX)

    def __contains__(self, digest: int) -> bool:
        return digest in self._starts

    def start(self, digest: int) -> int:
        """Where the row begins, in tokens; KeyError where it is not there."""
        return self._starts[digest]

    def cut(self) -> None:
        """Takes away what a kill left of rows that are not whole."""
        sizes = {
            f"{name}.bin": self._tokens * width * np.dtype(kind).itemsize for name, (kind, width) in self.widths.items()
        }
        for name, size in {**sizes, INDEX_FILE: len(self._starts) * INDEX.itemsize}.items():
            with (self.folder / name).open("ab") as file:
                file.truncate(size)

    def append(self, digests: Sequence[int], rows: Sequence[dict[str, np.ndarray]]) -> None:
        """Adds rows, each {part: [tokens, width]} in that part's type; those that it has are left out."""
        new = {digest: row for digest, row in zip(digests, rows, strict=True) if digest not in self}
        for name in self.widths:
            with (self.folder / f"{name}.bin").open("ab") as file:
                for row in new.values():
                    file.write(np.ascontiguousarray(row[name]).tobytes())
        entries = []
        for digest, row in new.items():
            entries.append((digest, len(row[next(iter(self.widths))])))
            self._starts[digest] = self._tokens
            self._tokens += entries[-1][1]
        with (self.folder / INDEX_FILE).open("ab") as file:
            file.write(np.array(entries, INDEX).tobytes())

    def mapped(self, name: str) -> np.ndarray:
        """[tokens of all rows, width] of a part, mapped from the disk."""
        kind, width = self.widths[name]
        path, shape = self.folder / f"{name}.bin", (self._tokens, width)
        return np.memmap(path, kind, "r", shape=shape) if self._tokens else np.empty(shape, kind)

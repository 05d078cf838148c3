"""Rows of numbers on disk that only ever get more: each is computed once, and found again by its digest."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

INDEX_FILE = "rows.bin"  # written last: what it does not tell of was left by a kill
SUMS_FILE = "sums.bin"  # a checksum for each row of the index, over all its parts
INDEX = np.dtype([("digest", "<u8"), ("tokens", "<i8")])
SUM = np.dtype("<u4")


class RowStore:
    """Parts of rows in files, a file for each part with all rows one after another, without padding.

    One process at a time may open it and append; what it has mapped stays readable.

    Attributes:
        widths: part -> its type and how many numbers of it a token has.
    """

    def __init__(self, folder: Path, widths: dict[str, tuple[type, int]]):
        self.folder, self.widths = folder, widths
        self._places: dict[int, slice] = {}
        self._sums: dict[int, int] = {}
        self._tokens = 0

    def open(self) -> None:
        """Finds what there is, and takes away what a kill left of rows that are not whole, or a damaged index."""
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self._whole(self._read(INDEX_FILE, INDEX))
        self._places, self._sums, self._tokens = {}, {}, 0
        for digest, tokens in index.tolist():
            self._take(digest, tokens)
        sizes = {f"{name}.bin": self._tokens * self._bytes(name) for name in self.widths}
        sizes[INDEX_FILE] = len(index) * INDEX.itemsize
        for name, size in sizes.items():
            with (self.folder / name).open("ab") as file:
                file.truncate(size)
        self._read_sums(index["digest"].tolist())

    def _read(self, name: str, kind: np.dtype) -> np.ndarray:
        path = self.folder / name
        data = path.read_bytes() if path.exists() else b""
        return np.frombuffer(data[: len(data) - len(data) % kind.itemsize], kind)

    def _bytes(self, name: str) -> int:
        """Of a token."""
        kind, width = self.widths[name]
        return width * np.dtype(kind).itemsize

    def _whole(self, index: np.ndarray) -> np.ndarray:
        """The rows before the first that a file of a part does not hold."""
        files = {name: self.folder / f"{name}.bin" for name in self.widths}
        room = min(path.stat().st_size // self._bytes(name) if path.exists() else 0 for name, path in files.items())
        lengths = np.clip(index["tokens"], -1, room + 1)  # so that no sum overflows
        bad = (lengths < 1) | (np.cumsum(lengths) > room)
        return index[: int(bad.argmax()) if bad.any() else len(index)]

    def _read_sums(self, digests: list[int]) -> None:
        """Rows without a checksum, of a store that was made before there were any, get that of what is there."""
        sums = self._read(SUMS_FILE, SUM)[: len(digests)].tolist()
        sums += [self._sum_of_mapped(digest) for digest in digests[len(sums) :]]
        self._sums = dict(zip(digests, sums, strict=True))
        (self.folder / SUMS_FILE).write_bytes(np.array(sums, SUM).tobytes())

    def _sum_of_mapped(self, digest: int) -> int:
        return _sum(self.mapped(name)[self._places[digest]] for name in self.widths)

    def forget_damaged(self, digests: Iterable[int]) -> int:
        """How many of the rows are not what was written: they count as missing from here on."""
        damaged = [each for each in set(digests) & set(self._places) if self._sum_of_mapped(each) != self._sums[each]]
        for digest in damaged:
            del self._places[digest]
        return len(damaged)

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
        sums = {digest: _sum(np.ascontiguousarray(row[name]) for name in self.widths) for digest, row in new.items()}
        with (self.folder / SUMS_FILE).open("ab") as file:
            file.write(np.array(list(sums.values()), SUM).tobytes())
        self._sums |= sums
        with (self.folder / INDEX_FILE).open("ab") as file:
            file.write(np.array(entries, INDEX).tobytes())
        for digest, tokens in entries:
            self._take(digest, tokens)

    def mapped(self, name: str) -> np.ndarray:
        """[tokens of all rows, width] of a part, mapped from the disk."""
        kind, width = self.widths[name]
        path, shape = self.folder / f"{name}.bin", (self._tokens, width)
        return np.memmap(path, kind, "r", shape=shape) if self._tokens else np.empty(shape, kind)


def _sum(parts: Iterable[np.ndarray]) -> int:
    total = 0
    for part in parts:
        total = zlib.crc32(np.ascontiguousarray(part), total)
    return total

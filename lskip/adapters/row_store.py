"""An append-only store of rows of numbers on disk, found by their digests."""

import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

INDEX_FILE = "rows.bin"  # written last: rows without an entry are leftovers of a kill
SUMS_FILE = "sums.bin"  # a checksum for each row of the index, over all its parts
INDEX = np.dtype([("digest", "<u8"), ("tokens", "<i8")])
SUM = np.dtype("<u4")


class RowStore:
    """Rows of several parts; each part is a file with all rows one after another, without padding.

    Only one process at a time may open the store and append; mapped arrays stay readable.

    Attributes:
        folder: of the files.
        widths: part -> (type, numbers for each token).
    """

    def __init__(self, folder: Path, widths: dict[str, tuple[type, int]]):
        self.folder, self.widths = folder, widths
        self._places: dict[int, slice] = {}
        self._sums: dict[int, int] = {}
        self._tokens = 0

    def open(self) -> None:
        """Read the index, and truncate what a kill or a damaged index left of incomplete rows."""
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
        """Return the bytes of a token."""
        kind, width = self.widths[name]
        return width * np.dtype(kind).itemsize

    def _whole(self, index: np.ndarray) -> np.ndarray:
        """Return the entries before the first row that some file does not hold completely."""
        files = {name: self.folder / f"{name}.bin" for name in self.widths}
        room = min(path.stat().st_size // self._bytes(name) if path.exists() else 0 for name, path in files.items())
        lengths = np.clip(index["tokens"], -1, room + 1)  # so that no sum overflows
        bad = (lengths < 1) | (np.cumsum(lengths) > room)
        return index[: int(bad.argmax()) if bad.any() else len(index)]

    def _read_sums(self, digests: list[int]) -> None:
        """Read the checksums; rows of a store from before there were any get those of their present content."""
        sums = self._read(SUMS_FILE, SUM)[: len(digests)].tolist()
        sums += [self._sum_of_mapped(digest) for digest in digests[len(sums) :]]
        self._sums = dict(zip(digests, sums, strict=True))
        (self.folder / SUMS_FILE).write_bytes(np.array(sums, SUM).tobytes())

    def _sum_of_mapped(self, digest: int) -> int:
        return _sum(self.mapped(name)[self._places[digest]] for name in self.widths)

    def forget_damaged(self, digests: Iterable[int]) -> int:
        """Drop the rows whose checksum is wrong, and return their number."""
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
        """Return the slice of a row in its parts; KeyError if it is missing."""
        return self._places[digest]

    def append(self, digests: Sequence[int], rows: Sequence[dict[str, np.ndarray]]) -> None:
        """Append rows, each {part: [tokens, width]} in that part's type; rows that exist are left out."""
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
        """Return a part of all rows, [tokens, width], memory-mapped."""
        kind, width = self.widths[name]
        path, shape = self.folder / f"{name}.bin", (self._tokens, width)
        return np.memmap(path, kind, "r", shape=shape) if self._tokens else np.empty(shape, kind)


def _sum(parts: Iterable[np.ndarray]) -> int:
    total = 0
    for part in parts:
        total = zlib.crc32(np.ascontiguousarray(part), total)
    return total

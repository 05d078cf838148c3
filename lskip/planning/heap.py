"""Memory that glibc holds for tensors that come and go on a CPU: what they take, and the gaps between them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

ALIGNED = 64 + 32  # bytes that a gap must have besides, since torch asks for blocks at multiples of 64
PAGE_OF_ITS_OWN, LARGEST_IN_HEAP = 128 * 1024, 32 * 2**20  # bytes: mmap's first threshold, and the most it rises to


class Heap:
    """glibc's malloc in short: blocks in one heap, the tightest gap first; large ones by mmap, returned when freed.

    A block is large from the size of the largest that was freed so far, 32 MiB at most. The heap shrinks at its end
    alone, where more is free than twice that size.

    Attributes:
        held: bytes of the process now.
    """

    def __init__(self) -> None:
        self._threshold = PAGE_OF_ITS_OWN
        self._end = 0
        self._mapped: dict[int, int] = {}  # block -> bytes, by mmap
        self._used: dict[int, tuple[int, int]] = {}  # block -> (start, bytes), in the heap
        self._gaps: list[tuple[int, int]] = []  # (bytes, start), sorted
        self._starts: dict[int, int] = {}  # start of a gap -> bytes
        self._ends: dict[int, int] = {}  # end of a gap -> its start
        self._mapped_bytes = 0

    @property
    def held(self) -> int:
        return self._end + self._mapped_bytes

    def take(self, block: int, size: int) -> None:
        """Allocate a block."""
        if size >= self._threshold:
            self._mapped[block] = size
            self._mapped_bytes += size
            return
        place = bisect_left(self._gaps, (size + ALIGNED, 0))
        if place < len(self._gaps):
            found, start = self._gaps[place]
            self._close(start)
            if found > size:
                self._open(start + size, found - size)
        else:
            start = self._ends.get(self._end, self._end)  # a gap at the end grows
            if start < self._end:
                self._close(start)
            self._end = start + size
        self._used[block] = (start, size)

    def give(self, block: int) -> None:
        """Free a block."""
        if (size := self._mapped.pop(block, None)) is not None:
            self._mapped_bytes -= size
            if size <= LARGEST_IN_HEAP:
                self._threshold = max(self._threshold, size)
            return
        start, size = self._used.pop(block)
        if start + size in self._starts:
            size += self._close(start + size)
        if start in self._ends:
            before = self._ends[start]
            size += self._close(before)
            start = before
        if start + size == self._end and size > 2 * self._threshold:
            self._end = start
        else:
            self._open(start, size)

    def _open(self, start: int, size: int) -> None:
        insort(self._gaps, (size, start))
        self._starts[start] = size
        self._ends[start + size] = start

    def _close(self, start: int) -> int:
        """Remove a gap and return its bytes."""
        size = self._starts.pop(start)
        del self._ends[start + size]
        del self._gaps[bisect_left(self._gaps, (size, start))]
        return size


def most_held(events: Iterable[tuple[int, int, int]]) -> int:
    """Return the most bytes that the process holds during events (block, +1 or -1, bytes)."""
    heap, most = Heap(), 0
    for block, sign, size in events:
        if size <= 0:
            continue
        if sign > 0:
            heap.take(block, size)
            most = max(most, heap.held)
        else:
            heap.give(block)
    return most

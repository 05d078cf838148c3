"""Record of the tensors that come and go while a step runs, on tensors without memory."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Sizes = Callable[[str, int, int], float]  # (part, storage, bytes) -> bytes


class Allocations(TorchDispatchMode):
    """Records each storage that appears while it is active: its bytes, its part, and when it goes.

    Attributes:
        part: of the storages that appear now.
        phase: of what happens now.
        parts: of each storage, by its number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.part, self.phase = "", ""
        self.parts: dict[int, str] = {}
        self._bytes: dict[int, int] = {}
        self._numbers: dict[int, int] = {}  # of storages that are there, by their address
        self._events: list[tuple[int, int, str]] = []  # (number, +1 or -1, phase)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        copies = function.name() == "aten::_to_copy" and self._part_of(args[0]) == "weights"
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor):
                self.see(tensor, "casts" if copies else self.part)
        return found

    def see(self, tensor: Tensor, part: str) -> None:
        """Record a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._numbers:
            return
        number = self._numbers[address] = len(self.parts)
        self.parts[number], self._bytes[number] = part, storage.nbytes()
        self._events.append((number, 1, self.phase))
        weakref.finalize(storage, self._gone, address)

    def _gone(self, address: int) -> None:
        self._events.append((self._numbers.pop(address), -1, self.phase))

    def number(self, tensor: Tensor) -> int | None:
        """Return the number of a tensor's storage; None: it is not recorded."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def _part_of(self, tensor: Tensor) -> str | None:
        return self.parts.get(self.number(tensor))

    def name(self, tensors: Iterable[Tensor], part: str) -> None:
        """Say, once it is known, of which part these tensors are."""
        for tensor in tensors:
            if (number := self.number(tensor)) is not None:
                self.parts[number] = part

    def sizes(self) -> dict[int, int]:
        """Return the bytes of every storage that was there at some time, by its number."""
        return dict(self._bytes)

    def bytes_of(self, part: str) -> int:
        """Return the bytes of a part's storages that are there now."""
        return sum(self._bytes[number] for number in self._numbers.values() if self.parts[number] == part)

    @contextmanager
    def within(self, part: str) -> Iterator[None]:
        """Count what appears inside the context to `part`."""
        before, self.part = self.part, part
        try:
            yield
        finally:
            self.part = before

    def peak(self, extra: Mapping[str, Mapping[str, float]], sizes: Sizes) -> dict[str, float]:
        """Return the bytes of each part at the moment when all together are the most.

        Args:
            extra: phase -> part -> bytes that are there besides during that phase.
            sizes: (part, storage, bytes) -> the bytes that count.
        """
        now: dict[str, float] = defaultdict(float)
        total, most, found = 0.0, -1.0, {}
        beside = {phase: sum(parts.values()) for phase, parts in extra.items()}
        for number, sign, phase in self._events:
            size = sign * sizes(self.parts[number], number, self._bytes[number])
            now[self.parts[number]] += size
            total += size
            if total + beside.get(phase, 0) > most:
                most, found = total + beside.get(phase, 0), (dict(now), phase)
        parts, phase = found
        return {
            name: parts.get(name, 0) + extra.get(phase, {}).get(name, 0) for name in {*parts, *extra.get(phase, {})}
        }

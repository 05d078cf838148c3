"""Keys and values that blocks of sliding attention no longer see give their slots to later ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lskip.inference.layers.attention import Attention, Part, Span, View, hiding, places_of, positions
from lskip.inference.layers.kv_cache import PREFILL_ROWS, KVCache


def ring_size(window: int | None, slots: int) -> int:
    """Slots that a block needs for a text of `slots` positions.

    A window, and the rows of one pass: position p lies in slot p mod size. What a pass writes then takes the place of
    nothing that one of its rows sees; nor does a draft that is refused afterwards.
    """
    return slots if window is None else min(slots, window + PREFILL_ROWS)


def rolls(windows: Iterable[int | None], slots: int) -> bool:
    """Whether a block with one of these windows needs less than all slots."""
    return any(ring_size(window, slots) < slots for window in windows)


class RollingCache(KVCache):
    """As KVCache, but a block with a window has only `ring_size` slots a lane.

    Attributes:
        states: of each block [lanes, 2, KV, its slots, head_dim].
        lengths: per lane, the positions that every block has seen and that the text keeps.
    """

    def __init__(self, states: list[Tensor], lengths: list[int], slots: int):
        """slots: positions that the longest text may have."""
        super().__init__(states, lengths)
        self._slots = slots

    @classmethod
    def of_zeros(
        cls, windows: list[int | None], lanes: int, slots: int, heads: int, head_dim: int, dtype, device
    ) -> RollingCache:
        """An empty cache for blocks with these windows."""
        shapes = [(lanes, 2, heads, ring_size(window, slots), head_dim) for window in windows]
        return cls([torch.zeros(shape, dtype=dtype, device=device) for shape in shapes], [0] * lanes, slots)

    def lane(self, index: int) -> RollingCache:
        """A view of one lane's memory."""
        states = [part[index : index + 1] for part in self.states]
        return RollingCache(states, [self.lengths[index]], self._slots)

    def move(self, source: int, target: int) -> None:
        """Gives lane `target`, whose text has ended, what lane `source` holds."""
        self.lengths[target] = self.lengths[source]
        for part in self.states:
            part[target] = part[source]

    @property
    def slots(self) -> int:
        return self._slots


def held_positions(starts: list[int], rows: int, size: int, device: torch.device) -> Tensor:
    """[A, K]: the position that each slot of a ring holds once `rows` of each lane are written, from starts[a] on.

    A slot that holds nothing yet is told to lie after all rows, where none of them looks.
    """
    last = positions(starts, 1, device) + rows - 1
    slots = torch.arange(min(max(starts) + rows, size), device=device)
    held = last - (last - slots) % size
    return torch.where(held < 0, last + 1, held)


class RollingAttention(Attention):
    """Over a RollingCache: as Attention, but slots are looked up, and a mask tells which of them a row sees."""

    def span(self, starts: list[int], rows: int, slots: int) -> Span:
        views = {window: self._ring_view(starts, rows, ring_size(window, slots), window) for window in self.windows}
        # Where rows go depends on the block: `parts` says it.
        return Span(starts, rows, slots, slice(0), views)

    def _ring_view(self, starts: list[int], rows: int, size: int, window: int | None) -> View:
        held = held_positions(starts, rows, size, self.device)
        distance = positions(starts, rows, self.device)[:, :, None] - held[:, None]
        mask = hiding(distance, window, self.dtype)  # [A, n, K]
        return View(0, mask[:, None].expand(-1, self.heads.group, -1, -1).flatten(1, 2)[:, None])

    def parts(self, states: list[Tensor], span: Span, windows: list[int | None]) -> list[Part]:
        """What each of some blocks sees and writes; `states`, `windows`: theirs."""
        lanes, stop = len(span.starts), max(span.starts) + span.rows
        rows = positions(span.starts, span.rows, self.device)
        written, parts = {}, []
        for part, window in zip(states, windows, strict=True):
            size = part.shape[3]
            if size not in written:
                written[size] = places_of(rows % size, 2 * self.heads.keys, size)
            keys, values = part[:lanes, :, :, : min(stop, size)].unbind(1)
            target, mask = part.view(-1, part.shape[-1]), span.views[window].mask
            parts.append(Part(target, written[size], keys, values, mask))
        return parts

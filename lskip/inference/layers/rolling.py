"""Keys and values that blocks of sliding attention no longer see give their cells to later ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lskip.inference.layers.attention import Attention, Part, Span, View, hiding, places_of, positions
from lskip.inference.layers.kv_cache import PREFILL_ROWS, KVCache


def ring_size(window: int | None, cells: int) -> int:
    """Cells that a block needs for a text of `cells` positions.

    A window, and the rows of one pass: position p lies in cell p mod size. What a pass writes then takes the place of
    nothing that one of its rows sees; nor does a draft that is refused afterwards.
    """
    return cells if window is None else min(cells, window + PREFILL_ROWS)


def rolls(windows: Iterable[int | None], cells: int) -> bool:
    """Whether a block with one of these windows needs less than all cells."""
    return any(ring_size(window, cells) < cells for window in windows)


class RollingCache(KVCache):
    """As KVCache, but a block with a window has only `ring_size` cells a slot.

    Attributes:
        states: of each block [slots, 2, KV, its cells, head_dim].
        lengths: per slot, the positions that every block has seen and that the text keeps.
    """

    def __init__(self, states: list[Tensor], lengths: list[int], cells: int):
        """cells: positions that the longest text may have."""
        super().__init__(states, lengths)
        self._cells = cells

    @classmethod
    def of_zeros(
        cls, windows: list[int | None], slots: int, cells: int, heads: int, head_dim: int, dtype, device
    ) -> RollingCache:
        """An empty cache for blocks with these windows."""
        shapes = [(slots, 2, heads, ring_size(window, cells), head_dim) for window in windows]
        return cls([torch.zeros(shape, dtype=dtype, device=device) for shape in shapes], [0] * slots, cells)

    def slot(self, index: int) -> RollingCache:
        """A view of one slot's memory."""
        states = [part[index : index + 1] for part in self.states]
        return RollingCache(states, [self.lengths[index]], self._cells)

    def move(self, source: int, target: int) -> None:
        """Gives slot `target`, whose text has ended, what slot `source` holds."""
        self.lengths[target] = self.lengths[source]
        for part in self.states:
            part[target] = part[source]

    @property
    def cells(self) -> int:
        return self._cells


def held_positions(starts: list[int], rows: int, size: int, device: torch.device) -> Tensor:
    """[A, K]: the position that each cell of a ring holds once `rows` of each slot are written, from starts[a] on.

    A cell that holds nothing yet is told to lie after all rows, where none of them looks.
    """
    last = positions(starts, 1, device) + rows - 1
    cells = torch.arange(min(max(starts) + rows, size), device=device)
    held = last - (last - cells) % size
    return torch.where(held < 0, last + 1, held)


class RollingAttention(Attention):
    """Over a RollingCache: as Attention, but cells are looked up, and a mask tells which of them a row sees."""

    def span(self, starts: list[int], rows: int, cells: int) -> Span:
        views = {window: self._ring_view(starts, rows, ring_size(window, cells), window) for window in self.windows}
        # Where rows go depends on the block: `parts` says it.
        return Span(starts, rows, cells, slice(0), views)

    def _ring_view(self, starts: list[int], rows: int, size: int, window: int | None) -> View:
        held = held_positions(starts, rows, size, self.device)
        distance = positions(starts, rows, self.device)[:, :, None] - held[:, None]
        mask = hiding(distance, window, self.dtype)  # [A, n, K]
        return View(0, mask[:, None].expand(-1, self.heads.group, -1, -1).flatten(1, 2)[:, None])

    def parts(self, states: list[Tensor], span: Span, windows: list[int | None]) -> list[Part]:
        """What each of some blocks sees and writes; `states`, `windows`: theirs."""
        slots, stop = len(span.starts), max(span.starts) + span.rows
        rows = positions(span.starts, span.rows, self.device)
        written, parts = {}, []
        for part, window in zip(states, windows, strict=True):
            size = part.shape[3]
            if size not in written:
                written[size] = places_of(rows % size, 2 * self.heads.keys, size)
            keys, values = part[:slots, :, :, : min(stop, size)].unbind(1)
            target, mask = part.view(-1, part.shape[-1]), span.views[window].mask
            parts.append(Part(target, written[size], keys, values, mask))
        return parts

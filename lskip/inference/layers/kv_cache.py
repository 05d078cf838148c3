"""The preallocated memory of a batch: keys and values of every block, by position or in a ring of cells."""

from __future__ import annotations

import torch
from torch import Tensor

from lskip.utils.devices import to_device

PREFILL_ROWS = 256  # a pass's mask and activations grow with its rows: a long prompt goes in pieces


class KVCache:
    """Keys and values of every block for the slots of a batch, a text each; cell k of a slot holds position k.

    What lies at a slot's length and beyond is a draft (or zeros): the next pass writes over it, so rolling back
    is leaving the length where it is, and nothing is copied or cleared.

    Attributes:
        kv: [L, slots, 2, KV, cells, head_dim]; index 0 of the third dimension holds keys, 1 values. What a head
            attends to lies in one piece.
        lengths: per slot, the positions that every block has seen and that the text keeps.
    """

    def __init__(self, kv: Tensor, lengths: list[int]):
        self.kv, self.lengths = kv, lengths

    def slot(self, index: int) -> KVCache:
        """Return a view of one slot's memory."""
        return KVCache(self.kv[:, index : index + 1], [self.lengths[index]])

    def move(self, source: int, target: int) -> None:
        """Give slot `target`, whose text has ended, what slot `source` holds."""
        length = self.lengths[target] = self.lengths[source]
        self.kv[:, target, :, :, :length] = self.kv[:, source, :, :, :length]

    def exchange(self, one: int, other: int) -> None:
        """Give each of two slots what the other holds."""
        lengths = self.lengths
        length = max(lengths[one], lengths[other])
        kept = self.kv[:, one, :, :, :length].clone()
        self.kv[:, one, :, :, :length] = self.kv[:, other, :, :, :length]
        self.kv[:, other, :, :, :length] = kept
        lengths[one], lengths[other] = lengths[other], lengths[one]

    @property
    def keeps_all(self) -> bool:
        """Whether every position of a text stays, so that another text can go on from any of them."""
        return True

    @property
    def cells(self) -> int:
        return self.kv.shape[4]

    @property
    def nbytes(self) -> int:
        return self.kv.nbytes


def positions(starts: list[int], rows: int, device: torch.device) -> Tensor:
    """Return [A, n]: `rows` positions in each slot, those of slot a from starts[a] on."""
    if len(starts) == 1:
        return torch.arange(starts[0], starts[0] + rows, device=device)[None]
    return to_device(torch.tensor(starts), device)[:, None] + torch.arange(rows, device=device)


def ring_size(window: int | None, cells: int) -> int:
    """Return the cells that a block needs for a text of `cells` positions.

    A window, and the rows of one pass: position p lies in cell p mod size. What a pass writes then takes the place of
    nothing that one of its rows sees; nor does a draft that is refused afterwards.
    """
    return cells if window is None else min(cells, window + PREFILL_ROWS)


class RollingCache(KVCache):
    """A KVCache in which a block with a window has only `ring_size` cells a slot, used again and again.

    Attributes:
        kv: of each block [slots, 2, KV, its cells, head_dim].
        lengths: per slot, the positions that every block has seen and that the text keeps.
    """

    def __init__(self, kv: list[Tensor], lengths: list[int], cells: int):
        """Take the blocks' memory; cells: positions that the longest text may have."""
        super().__init__(kv, lengths)
        self._cells = cells

    def slot(self, index: int) -> RollingCache:
        """Return a view of one slot's memory."""
        kv = [part[index : index + 1] for part in self.kv]
        return RollingCache(kv, [self.lengths[index]], self._cells)

    def move(self, source: int, target: int) -> None:
        """Give slot `target`, whose text has ended, what slot `source` holds."""
        self.lengths[target] = self.lengths[source]
        for part in self.kv:
            part[target] = part[source]

    @property
    def keeps_all(self) -> bool:
        return False

    @property
    def cells(self) -> int:
        return self._cells

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.kv)


def new_cache(
    windows: list[int | None], slots: int, cells: int, heads: int, head_dim: int, dtype: torch.dtype, device
) -> KVCache:
    """Return an empty cache for blocks with these windows, a RollingCache where one needs less than all `cells`.

    Zeros, not garbage: a cell behind a mask must still be finite.
    """
    sizes = [ring_size(window, cells) for window in windows]
    if min(sizes) == cells:
        kv = torch.zeros(len(sizes), slots, 2, heads, cells, head_dim, dtype=dtype, device=device)
        return KVCache(kv, [0] * slots)
    rings = [torch.zeros(slots, 2, heads, size, head_dim, dtype=dtype, device=device) for size in sizes]
    return RollingCache(rings, [0] * slots, cells)


def cell_positions(starts: list[int], rows: int, size: int, device: torch.device) -> Tensor:
    """Return [A, K], the position in each cell of a ring once `rows` of each slot are written, from starts[a] on.

    A cell that holds nothing yet is told to lie after all rows, where none of them looks.
    """
    last = positions(starts, 1, device) + rows - 1
    cells = torch.arange(min(max(starts) + rows, size), device=device)
    newest = last - (last - cells) % size
    return torch.where(newest < 0, last + 1, newest)

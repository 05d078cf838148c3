"""Attention over the cache for a few rows in each slot: as fast as it goes, or with bits that nothing else moves."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.utils.devices import to_device


class Heads(NamedTuple):
    """How a block's attention is cut: H query heads share KV key heads, H / KV each."""

    queries: int
    keys: int
    size: int
    scale: float

    @property
    def group(self) -> int:
        return self.queries // self.keys


class View(NamedTuple):
    """Which cells the rows of a pass see in a block: `low` … stop-1, less what `mask` [A, 1, G n, K] hides."""

    low: int
    mask: Tensor | None


class Span(NamedTuple):
    """What every block needs to know about the rows of one pass: n positions in each of A slots.

    Attributes:
        starts: of each slot (zeros where shapes are static: there only their number counts).
        rows: n.
        stop: the cells that the farthest slot sees.
        written: where keys and values go: of a lone slot's cells, or [A n, 2 KV] of all slots' (`places_of`).
        views: by window.
    """

    starts: list[int]
    rows: int
    stop: int
    written: slice | Tensor
    views: dict[int | None, View]


class Part(NamedTuple):
    """One block's part of the cache, as the rows of a pass meet it; views, nothing is copied.

    Attributes:
        target: where keys and values go: a lone slot's [n, 2 KV, head_dim], or all places of all slots [.., head_dim].
        written: [A n, 2 KV], which of all places; None: all that `target` has.
        keys, values: [A, KV, K, head_dim].
        mask: what of them it hides: [A, 1, G n, K], added to the scores; None: nothing.
    """

    target: Tensor
    written: Tensor | None
    keys: Tensor
    values: Tensor
    mask: Tensor | None


def write(qkv: Tensor, target: Tensor, written: Tensor | None) -> None:
    """Keys and values of the rows qkv [A n, H + 2 KV, head_dim] into their cells."""
    if written is None:
        target.copy_(qkv[:, -target.size(1) :])
    else:
        target.index_copy_(0, written.flatten(), qkv[:, -written.size(1) :].reshape(-1, target.size(1)))


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, slots: int, rows: int, scale: float
) -> Tensor:
    """queries [A n, H, head_dim] of n rows in each of A slots -> [A n, H head_dim]."""
    kv_heads, size = keys.size(1), queries.size(2)
    group = queries.size(1) // kv_heads
    if rows > 1:  # for a lone row of each slot it changes nothing but takes time, here and below
        queries = queries.reshape(slots, rows, kv_heads, group, size).permute(0, 2, 3, 1, 4)
    queries = queries.reshape(slots, kv_heads, group * rows, size)
    z = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)
    if rows > 1:
        z = z.view(slots, kv_heads, group, rows, size).permute(0, 3, 1, 2, 4)
    return z.reshape(slots * rows, -1)


class Attention:
    """All slots in one call; each is given the cells of the farthest, behind a mask.

    Query heads that share a key head are rows of one product, so that keys are never repeated. A single row of a
    single slot needs no mask.
    """

    def __init__(
        self, heads: Heads, windows: set[int | None], dtype: torch.dtype, device: torch.device, width: int = 1
    ):
        """width: rows of a group, where attention goes by groups."""
        self.heads, self.windows, self.dtype, self.device, self.width = heads, windows, dtype, device, width

    def span(self, starts: list[int], rows: int, cells: int) -> Span:
        """For `rows` positions in each slot, those of slot a from starts[a] on, in a cache of `cells` a slot."""
        stop = max(starts) + rows
        written = slice(starts[0], stop) if len(starts) == 1 else self._places(starts, rows, cells)
        views = {window: self._view(starts, rows, stop, window) for window in self.windows}
        return Span(starts, rows, stop, written, views)

    def _view(self, starts: list[int], rows: int, stop: int, window: int | None) -> View:
        low = 0 if window is None else max(0, min(starts) + 1 - window)
        if rows == 1 and len(starts) == 1:
            return View(low, None)
        return self._masked(starts, rows, low, stop, window)

    def _masked(self, starts: list[int], rows: int, low: int, stop: int, window: int | None) -> View:
        """Cells `low` … stop-1 behind a mask, repeated for the rows of a key head's query heads."""
        distance = positions(starts, rows, self.device)[:, :, None] - torch.arange(low, stop, device=self.device)
        mask = hiding(distance, window, self.dtype)  # [A, n, K]
        return View(low, mask[:, None].expand(-1, self.heads.group, -1, -1).flatten(1, 2)[:, None])

    def _places(self, starts: list[int], rows: int, cells: int) -> Tensor:
        return places_of(positions(starts, rows, self.device), 2 * self.heads.keys, cells)

    def parts(self, states: Tensor, span: Span, windows: list[int | None]) -> list[Part]:
        """What each of some blocks sees and writes: taken for all of them at once, since each view costs time.

        Args:
            states: their part of the cache, [blocks, slots, 2, KV, cells, head_dim].
            windows: of each block.
        """
        blocks, _, _, heads, cells, size = states.shape
        if isinstance(span.written, slice):
            slot = states[:, 0].view(blocks, 2 * heads, cells, size)
            targets, written = slot[:, :, span.written].transpose(1, 2).unbind(), None
        else:
            targets, written = states.view(blocks, -1, size).unbind(), span.written
        seen = {}
        for window in set(windows):
            low, slots = span.views[window].low, len(span.starts)
            both = states[:, :slots, :, :, low : span.stop]
            seen[window] = both[:, :, 0].unbind(), both[:, :, 1].unbind(), span.views[window].mask
        parts = []
        for block, (target, window) in enumerate(zip(targets, windows, strict=True)):
            keys, values, mask = seen[window]
            parts.append(Part(target, written, keys[block], values[block], mask))
        return parts


class StaticAttention(Attention):
    """Shapes do not tell how far the texts have come: every pass sees all cells, behind a mask. For torch.compile."""

    def span(self, starts: list[int], rows: int, cells: int) -> Span:
        views = {window: self._masked(starts, rows, 0, cells, window) for window in self.windows}
        return Span([0] * len(starts), rows, cells, self._places(starts, rows, cells), views)


class AlignedAttention(Attention):
    """A row's bits depend on its own slot and position alone.

    Kernels choose their order of summation by the number of queries and of keys. So token p always sits in cell
    p mod W of a group of W query rows over (p // W + 1) W keys, whatever else is in flight; unused rows of a group
    are zeros. One call a group: slower where many slots or rows are under way. A cache needs its cells in multiples
    of W.
    """

    def span(self, starts: list[int], rows: int, cells: int) -> Span:
        span = super().span(starts, rows, cells)
        return span._replace(stop=-(-span.stop // self.width) * self.width)

    def _view(self, starts: list[int], rows: int, stop: int, window: int | None) -> View:
        """The mask of the last group [1, 1, G W, K]; a group before it sees the end of it."""
        keys = -(-stop // self.width) * self.width
        cells = torch.arange(self.width, device=self.device)
        distance = (keys - self.width + cells)[:, None] - torch.arange(keys, device=self.device)
        mask = hiding(distance, window, self.dtype)
        return View(0, mask.expand(self.heads.group, -1, -1).flatten(0, 1)[None, None])

    def attend(self, queries: Tensor, part: Part, span: Span) -> Tensor:
        """queries [A n, H, head_dim] -> [A n, H head_dim], over what `part` already holds of the rows."""
        output = queries.new_empty(len(queries), queries[0].numel())
        for slot, start in enumerate(span.starts):
            for group in range(start // self.width, (start + span.rows - 1) // self.width + 1):
                begin, end = max(start, group * self.width), min(start + span.rows, (group + 1) * self.width)
                here = slice(slot * span.rows + begin - start, slot * span.rows + end - start)
                padded = queries.new_zeros(self.width, *queries.shape[1:])
                within = slice(begin - group * self.width, end - group * self.width)
                padded[within] = queries[here]
                stop = (group + 1) * self.width
                keys, values = part.keys[slot : slot + 1, :, :stop], part.values[slot : slot + 1, :, :stop]
                mask = part.mask[..., -stop:]
                output[here] = attend(padded, keys, values, mask, 1, self.width, self.heads.scale)[within]
        return output


def positions(starts: list[int], rows: int, device: torch.device) -> Tensor:
    """[A, n]: `rows` positions in each slot, those of slot a from starts[a] on."""
    if len(starts) == 1:
        return torch.arange(starts[0], starts[0] + rows, device=device)[None]
    return to_device(torch.tensor(starts), device)[:, None] + torch.arange(rows, device=device)


def places_of(cells: Tensor, heads: int, per_head: int) -> Tensor:
    """[A, n] cells of each slot -> [A n, heads]: where these are among all slots' heads of `per_head` cells each."""
    slots = torch.arange(len(cells), device=cells.device)[:, None]
    first = (slots * heads + torch.arange(heads, device=cells.device)) * per_head  # [A, heads]
    return (cells[:, :, None] + first[:, None]).flatten(0, 1)


def hiding(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask: -inf for keys that lie ahead of their query (distance < 0) or `window` or more behind it."""
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(hidden, float("-inf"))


class Rotary:
    """Rotary embedding as one complex product: heads come with each pair of dimensions side by side."""

    def __init__(self, inv_freq: Tensor, scale: float):
        """inv_freq [head_dim / 2]; scale multiplies the turned vectors (YaRN's)."""
        self.inv_freq, self.scale = inv_freq.float(), scale
        self.table = self._turns(0)

    def _turns(self, stop: int) -> Tensor:
        angle = torch.outer(torch.arange(stop, device=self.inv_freq.device).float(), self.inv_freq)
        return torch.polar(torch.full_like(angle, self.scale), angle)[:, None]

    def turns(self, starts: list[int], rows: int) -> Tensor:
        """[A n, 1, head_dim / 2] complex, for n rows in each slot from starts[a] on."""
        stop = max(starts) + rows
        if len(self.table) < stop:
            self.table = self._turns(max(stop, 2 * len(self.table)))
        if len(starts) == 1:
            return self.table[starts[0] : stop]
        return self.table[positions(starts, rows, self.table.device).flatten()]


def turn(heads: Tensor, turns: Tensor) -> None:
    """Rotary embedding of heads [A n, heads, head_dim], in place.

    turns: complex, or [..., 2] real, which torch.compile can fuse.
    """
    exact = heads.float()
    if turns.is_complex():
        torch.view_as_complex(exact.unflatten(-1, [-1, 2])).mul_(turns)
    else:
        x, y = exact.unflatten(-1, [-1, 2]).unbind(-1)
        cos, sin = turns.unbind(-1)
        exact = torch.stack([x * cos - y * sin, x * sin + y * cos], -1).flatten(-2)
    if exact is not heads:
        heads.copy_(exact)

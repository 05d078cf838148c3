"""Attention over the cache for a few rows in each slot: the fastest, one for rings of cells, one of constant bits."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lskip.inference.layers.kv_cache import cell_positions, positions, ring_size


class Heads(NamedTuple):
    """The shape of a block's attention: H query heads share KV key heads, H / KV each."""

    queries: int
    keys: int
    size: int
    scale: float

    @property
    def group(self) -> int:
        return self.queries // self.keys


class View(NamedTuple):
    """The cells that the rows of a pass see in a block: `low` … stop-1, less what `mask` [A, 1, G n, K] hides."""

    low: int
    mask: Tensor | None


class Span(NamedTuple):
    """The rows of one pass, for every block: n positions in each of A slots.

    Attributes:
        starts: of each slot.
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
    """Write keys and values of the rows qkv [A n, H + 2 KV, head_dim] into their cells."""
    if written is None:
        target.copy_(qkv[:, -target.size(1) :])
    else:
        target.index_copy_(0, written.flatten(), qkv[:, -written.size(1) :].reshape(-1, target.size(1)))


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, slots: int, rows: int, scale: float
) -> Tensor:
    """Return [A n, H head_dim], what the queries [A n, H, head_dim] of n rows in each of A slots attend to."""
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
        """Take the type of scores, and as `width` the rows of a group, where attention goes by groups."""
        self.heads, self.windows, self.dtype, self.device, self.width = heads, windows, dtype, device, width

    def span(self, starts: list[int], rows: int, cells: int) -> Span:
        """Return the Span of `rows` positions in each slot, slot a's from starts[a] on; `cells`: of a slot's cache."""
        stop = max(starts) + rows
        written = slice(starts[0], stop)
        if len(starts) > 1:
            written = places_of(positions(starts, rows, self.device), 2 * self.heads.keys, cells)
        views = {window: self._view(starts, rows, stop, window) for window in self.windows}
        return Span(starts, rows, stop, written, views)

    def _view(self, starts: list[int], rows: int, stop: int, window: int | None) -> View:
        low = 0 if window is None else max(0, min(starts) + 1 - window)
        if rows == 1 and len(starts) == 1:
            return View(low, None)
        return View(low, self._mask(starts, rows, torch.arange(low, stop, device=self.device)[None], window))

    def _mask(self, starts: list[int], rows: int, seen: Tensor, window: int | None) -> Tensor:
        """Return what hides cells of positions `seen` [A or 1, K], for all query heads of a key head."""
        distance = positions(starts, rows, self.device)[:, :, None] - seen[:, None]
        mask = hiding(distance, window, self.dtype)  # [A, n, K]
        return mask[:, None].expand(-1, self.heads.group, -1, -1).flatten(1, 2)[:, None]

    def parts(self, kv: Tensor, span: Span, windows: list[int | None]) -> list[Part]:
        """Return what each of some blocks sees and writes: for all of them at once, since each view costs time.

        Args:
            kv: their part of the cache, [blocks, slots, 2, KV, cells, head_dim].
            windows: of each block.
        """
        blocks, _, _, heads, cells, size = kv.shape
        if isinstance(span.written, slice):
            slot = kv[:, 0].view(blocks, 2 * heads, cells, size)
            targets, written = slot[:, :, span.written].transpose(1, 2).unbind(), None
        else:
            targets, written = kv.view(blocks, -1, size).unbind(), span.written
        seen = {}
        for window in set(windows):
            low, slots = span.views[window].low, len(span.starts)
            both = kv[:, :slots, :, :, low : span.stop]
            seen[window] = both[:, :, 0].unbind(), both[:, :, 1].unbind(), span.views[window].mask
        parts = []
        for block, (target, window) in enumerate(zip(targets, windows, strict=True)):
            keys, values, mask = seen[window]
            parts.append(Part(target, written, keys[block], values[block], mask))
        return parts


class RollingAttention(Attention):
    """Over a RollingCache: as Attention, but cells are looked up, and a mask tells which of them a row sees."""

    def span(self, starts: list[int], rows: int, cells: int) -> Span:
        views = {window: self._ring_view(starts, rows, ring_size(window, cells), window) for window in self.windows}
        # Where rows go depends on the block: `parts` says it.
        return Span(starts, rows, cells, slice(0), views)

    def _ring_view(self, starts: list[int], rows: int, size: int, window: int | None) -> View:
        return View(0, self._mask(starts, rows, cell_positions(starts, rows, size, self.device), window))

    def parts(self, kv: list[Tensor], span: Span, windows: list[int | None]) -> list[Part]:
        """Return what each of some blocks sees and writes; `kv`, `windows`: theirs."""
        slots, stop = len(span.starts), max(span.starts) + span.rows
        rows = positions(span.starts, span.rows, self.device)
        written, parts = {}, []
        for part, window in zip(kv, windows, strict=True):
            size = part.shape[3]
            if size not in written:
                written[size] = places_of(rows % size, 2 * self.heads.keys, size)
            keys, values = part[:slots, :, :, : min(stop, size)].unbind(1)
            target, mask = part.view(-1, part.shape[-1]), span.views[window].mask
            parts.append(Part(target, written[size], keys, values, mask))
        return parts


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
        """Return the mask of the last group [1, 1, G W, K]; a group before it sees the end of it."""
        keys = -(-stop // self.width) * self.width
        cells = torch.arange(self.width, device=self.device)
        distance = (keys - self.width + cells)[:, None] - torch.arange(keys, device=self.device)
        mask = hiding(distance, window, self.dtype)
        return View(0, mask.expand(self.heads.group, -1, -1).flatten(0, 1)[None, None])

    def attend(self, queries: Tensor, part: Part, span: Span) -> Tensor:
        """Return [A n, H head_dim] of queries [A n, H, head_dim], over what `part` already holds of the rows."""
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


def places_of(cells: Tensor, heads: int, per_head: int) -> Tensor:
    """Return [A n, heads]: where [A, n] cells of each slot are among all slots' heads of `per_head` cells each."""
    slots = torch.arange(len(cells), device=cells.device)[:, None]
    first = (slots * heads + torch.arange(heads, device=cells.device)) * per_head  # [A, heads]
    return (cells[:, :, None] + first[:, None]).flatten(0, 1)


def hiding(distance: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Return an additive mask: -inf for keys ahead of their query (distance < 0) or `window` or more behind it."""
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(distance.shape, dtype=dtype, device=distance.device).masked_fill_(hidden, float("-inf"))


class Rotary:
    """Rotary embedding as one complex product: heads come with each pair of dimensions side by side."""

    def __init__(self, inv_freq: Tensor, scale: float):
        """Take inv_freq [head_dim / 2]; scale multiplies the rotated vectors (YaRN's)."""
        self.inv_freq, self.scale = inv_freq.float(), scale
        self.table = self._table(0)

    def _table(self, stop: int) -> Tensor:
        angle = torch.outer(torch.arange(stop, device=self.inv_freq.device).float(), self.inv_freq)
        return torch.polar(torch.full_like(angle, self.scale), angle)[:, None]

    def factors(self, starts: list[int], rows: int) -> Tensor:
        """Return [A n, 1, head_dim / 2] complex factors, for n rows in each slot from starts[a] on."""
        stop = max(starts) + rows
        if len(self.table) < stop:
            self.table = self._table(max(stop, 2 * len(self.table)))
        if len(starts) == 1:
            return self.table[starts[0] : stop]
        return self.table[positions(starts, rows, self.table.device).flatten()]


def apply_rope(heads: Tensor, factors: Tensor) -> None:
    """Multiply heads [A n, heads, head_dim] by their positions' complex factors, in place."""
    exact = heads.float()
    torch.view_as_complex(exact.unflatten(-1, [-1, 2])).mul_(factors)
    if exact is not heads:
        heads.copy_(exact)

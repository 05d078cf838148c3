"""The general path: any family that `Decoder` knows, through its own transformers blocks."""

import torch
from torch import Tensor

from lskip.inference.layers.kv_cache import KVCache, cell_positions, new_cache, positions
from lskip.inference.layers.lm_head import Ban
from lskip.models.decoder import Decoder
from lskip.models.families import field_of, head_dim_of


class CacheView:
    """The cache that a transformers block is given: it writes into a KVCache at the positions of this pass."""

    def __init__(self, cache: KVCache, starts: list[int], places: Tensor):
        """Take the positions of this pass, places [A, n]."""
        self.cache, self.stop, self.places, self.updates = cache, max(starts) + places.shape[1], places, 0
        self.slots = torch.arange(len(starts), device=places.device)[:, None]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Write the rows' keys and values [A, KV, n, head_dim]; return those of all cells, [A, KV, K, head_dim]."""
        kv = self.cache.kv[layer_idx]
        cells = kv.shape[3]
        # Only in a RollingCache may a block have fewer cells than a text has positions.
        kv[self.slots, :, :, self.places % cells] = torch.stack([keys, values], 1).permute(0, 3, 1, 2, 4)
        self.updates += 1
        return kv[: len(self.slots), :, :, : min(self.stop, cells)].unbind(1)


class ModuleRunner:
    """The same interface as FusedRunner, for what that does not cover: the model's own modules do the work."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.num_layers = decoder.num_layers
        self.dtype, self.device = decoder.dtype, decoder.device
        config = decoder.config
        self.kv_heads = field_of(config, "num_key_value_heads") or config.num_attention_heads
        self.head_dim = head_dim_of(config)

    def new_cache(self, slots: int, cells: int) -> KVCache:
        """Return a cache for texts of up to `cells` positions."""
        windows = [self.decoder.window(index) for index in range(self.num_layers)]
        return new_cache(windows, slots, cells, self.kv_heads, self.head_dim, self.dtype, self.device)

    def memory(self) -> dict[str, int]:
        """Return bytes by part; a tied head is the embedding."""
        embedding, head = self.decoder.embedding.weight, self.decoder.head_weight
        blocks = [*self.decoder.blocks.parameters(), *self.decoder.blocks.buffers()]
        return {
            "blocks": sum(part.nbytes for part in blocks),
            "head": 0 if head is embedding else head.nbytes,
            "embedding": embedding.nbytes,
        }

    def embed(self, ids: Tensor, starts: list[int] | None = None) -> Tensor:
        """Return [A, n, D] of [A, n] token ids; those of slot a stand from starts[a] on, from 0 on where it is None."""
        places = None if starts is None else positions(starts, ids.shape[1], ids.device)
        return self.decoder.embed(ids, places)

    def norm(self, x: Tensor) -> Tensor:
        """Return the final norm of states [..., D]."""
        return self.decoder.norm(x)

    def decode(self, x: Tensor) -> Tensor:
        """Return logits [..., V] of exit states [..., D]: final norm and head."""
        return self.decoder.decode(x)

    def argmax(self, x: Tensor, ban: Ban | None = None) -> None:
        """Return None: nothing here is faster than `decode`."""

    def run(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> Tensor:
        """Run blocks `first` … `last`-1 on states x [A, n, D] of the cache's first A slots, as FusedRunner.run."""
        rows = x.shape[1]
        places = positions(starts, rows, x.device)
        view = CacheView(cache, starts, places)
        inputs = self.decoder.block_inputs(x, places, view, self._cell_positions(cache, starts, rows))
        for index in range(first, last):
            x = self.decoder.block(index, x, inputs)
        # Blocks take **kwargs: a cache under another name would be ignored without a word.
        assert view.updates == last - first, "the blocks did not use the cache"
        return x

    def _cell_positions(self, cache: KVCache, starts: list[int], rows: int) -> dict[int | None, Tensor]:
        """Return, by window, the position in each cell."""
        cells = {self.decoder.window(index): cache.kv[index].shape[3] for index in range(self.num_layers)}
        return {window: cell_positions(starts, rows, size, self.device) for window, size in cells.items()}

    def fill(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> None:
        """Write the keys and values that blocks `first` … `last`-1 make of x [A, n, D], as FusedRunner.fill."""
        for index in range(first, last):  # each from the exit's state, so one at a time
            self.run(x, cache, starts, index, index + 1)

"""The general path: any family that `Decoder` knows, through its own transformers blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from lskip.decoder import Decoder
from lskip.inference.cache import KVCache


class CacheView:
    """What a transformers block takes for its cache: writes into a KVCache at the positions of this pass."""

    def __init__(self, cache: KVCache, start: int):
        self.cache, self.start, self.updates = cache, start, 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values [1, KV, N, head_dim] of the rows -> those of all slots up to them, [1, KV, K, head_dim]."""
        stop = self.start + keys.shape[2]
        states = self.cache.states[layer_idx]
        states[self.start : stop, 0] = keys[0].transpose(0, 1)
        states[self.start : stop, 1] = values[0].transpose(0, 1)
        self.updates += 1
        seen = states[:stop].permute(1, 2, 0, 3)[:, None]
        return seen[0], seen[1]


class ModuleStep:
    """The same interface as LeanStep, for what that does not cover: the model's own modules do the work."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.num_layers = decoder.num_layers
        self.dtype, self.device = decoder.dtype, decoder.device
        config = decoder.config
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def new_cache(self, slots: int) -> KVCache:
        """A cache for a request of `slots` positions."""
        return KVCache(self.num_layers, slots, self.kv_heads, self.head_dim, self.dtype, self.device)

    def embed(self, ids: Tensor) -> Tensor:
        """[N] token ids -> [N, D]."""
        return self.decoder.embed(ids[None])[0]

    def decode(self, x: Tensor) -> Tensor:
        """Exit states [N, D] -> logits [N, V]: final norm and head."""
        return self.decoder.decode(x[None])[0]

    def run(self, x: Tensor, cache: KVCache, start: int, first: int, last: int) -> Tensor:
        """Blocks `first` … `last`-1 on rows x [N, D] at positions start … start+N-1, as LeanStep.run."""
        x, stop = x[None], start + x.shape[0]
        view = CacheView(cache, start)
        positions = torch.arange(start, stop, device=x.device)[None]
        inputs = self.decoder.block_inputs(x, positions, cache=view, num_keys=stop)
        for index in range(first, last):
            x = self.decoder.block(index, x, inputs)
        # Blocks take **kwargs: a cache under another name would be ignored without a word.
        assert view.updates == last - first, "the blocks did not use the cache"
        return x[0]

"""The general path: any family that `Decoder` knows, through its own transformers blocks."""

from __future__ import annotations

from torch import Tensor

from lskip.decoder import Decoder
from lskip.inference.attention import positions
from lskip.inference.cache import KVCache


class CacheView:
    """What a transformers block takes for its cache: writes into a KVCache at the positions of this pass."""

    def __init__(self, cache: KVCache, starts: list[int]):
        self.cache, self.starts, self.updates = cache, starts, 0

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values [A, KV, n, head_dim] of the rows -> those of all slots, [A, KV, K, head_dim]."""
        states, rows = self.cache.states[layer_idx], keys.shape[2]
        for lane, start in enumerate(self.starts):
            states[lane, start : start + rows, 0] = keys[lane].transpose(0, 1)
            states[lane, start : start + rows, 1] = values[lane].transpose(0, 1)
        self.updates += 1
        seen = states[: len(self.starts), : max(self.starts) + rows].permute(2, 0, 3, 1, 4)
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

    def new_cache(self, lanes: int, slots: int) -> KVCache:
        """A cache for texts of up to `slots` positions."""
        shape = self.num_layers, lanes, slots, self.kv_heads, self.head_dim
        return KVCache.of_zeros(*shape, self.dtype, self.device)

    def memory(self) -> dict[str, int]:
        """Bytes by part; a tied head is the embedding."""
        embedding, head = self.decoder.model.get_input_embeddings().weight, self.decoder.head_weight
        blocks = [*self.decoder.model.model.layers.parameters(), *self.decoder.model.model.layers.buffers()]
        return {
            "blocks": sum(part.nbytes for part in blocks),
            "head": 0 if head is embedding else head.nbytes,
            "embedding": embedding.nbytes,
        }

    def embed(self, ids: Tensor) -> Tensor:
        """[A, n] token ids -> [A, n, D]."""
        return self.decoder.embed(ids)

    def norm(self, x: Tensor) -> Tensor:
        """The final norm of states [..., D]."""
        return self.decoder.norm(x)

    def decode(self, x: Tensor) -> Tensor:
        """Exit states [..., D] -> logits [..., V]: final norm and head."""
        return self.decoder.decode(x)

    def run(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> Tensor:
        """Blocks `first` … `last`-1 on states x [A, n, D] of the cache's first A lanes, as LeanStep.run."""
        rows = x.shape[1]
        view = CacheView(cache, starts)
        places = positions(starts, rows, x.device)
        inputs = self.decoder.block_inputs(x, places, cache=view, num_keys=max(starts) + rows)
        for index in range(first, last):
            x = self.decoder.block(index, x, inputs)
        # Blocks take **kwargs: a cache under another name would be ignored without a word.
        assert view.updates == last - first, "the blocks did not use the cache"
        return x

    def fill(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> None:
        """Writes the keys and values that blocks `first` … `last`-1 make of x [A, n, D], as LeanStep.fill."""
        for index in range(first, last):  # each from the exit's state, so one at a time
            self.run(x, cache, starts, index, index + 1)

"""The one view of a transformers causal LM: the only file that knows how such a model is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

# model_type of families whose blocks, norm and head sit where Llama's do. A family that differs gets a
# subclass of Decoder; one that is not listed is refused by name rather than run wrongly.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class BlockInputs:
    """What every block of one pass receives besides its states.

    Attributes:
        position_ids: [1 or B, Q], the position of each query token.
        rotary: (cos, sin), each [1 or B, Q, head_dim].
        masks: window (None: full attention) -> additive mask [1 or B, 1, Q, K], or None for plain causal attention.
        cache: a transformers-compatible cache, or None.
    """

    position_ids: Tensor
    rotary: tuple[Tensor, Tensor]
    masks: dict[int | None, Tensor | None]
    cache: Any = None

    def rows(self, kept: Tensor, batch_size: int) -> BlockInputs:
        """The same for the rows `kept` of a batch of `batch_size`; what broadcasts over the batch stays whole."""

        def cut(part: Tensor | None) -> Tensor | None:
            batch_shaped = part is not None and batch_size > 1 and part.shape[0] == batch_size
            return part.index_select(0, kept) if batch_shaped else part

        return replace(
            self,
            position_ids=cut(self.position_ids),
            rotary=tuple(cut(part) for part in self.rotary),
            masks={window: cut(mask) for window, mask in self.masks.items()},
        )


class Decoder:
    """Embed, blocks, norm and head of a causal LM, under one set of names for every family.

    It holds no weights: modules are looked up in `model` at each call, so that wrapping (FSDP), moving or
    casting the model is seen here too.

    Raises:
        ValueError: the model's family is not covered, or attention that takes other masks.
    """

    def __init__(self, model: PreTrainedModel):
        family = model.config.model_type
        if family not in LLAMA_LIKE:
            raise ValueError(f"model: the family {family!r} is not supported; allowed: {', '.join(LLAMA_LIKE)}")
        attention = model.config._attn_implementation
        if attention not in ("sdpa", "eager"):
            raise ValueError(f"attn_implementation: {attention!r} is not supported; allowed: sdpa, eager")
        self.model = model
        self.config = model.config

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def context_length(self) -> int:
        """Tokens that the model's positions are made for."""
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the one head that decodes every exit."""
        return self.model.lm_head.weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.model.lm_head.bias

    def block_index(self, exit_layer: int) -> int:
        """The 0-based index of the last block that runs when `exit_layer` blocks do.

        Raises:
            ValueError: not a whole number from 1 to the number of layers.
        """
        whole = isinstance(exit_layer, int) and not isinstance(exit_layer, bool)
        if not whole or not 1 <= exit_layer <= self.num_layers:
            raise ValueError(
                f"exit_layer: {exit_layer!r} is not a whole number from 1 to {self.num_layers}, the model's layers"
            )
        return exit_layer - 1

    def window(self, block: int) -> int | None:
        """Keys that a query of this block sees, itself included; None when it sees all before it."""
        kinds = getattr(self.config, "layer_types", None)
        if kinds is not None and kinds[block] != "sliding_attention":
            return None
        return getattr(self.config, "sliding_window", None)

    def embed(self, input_ids: Tensor) -> Tensor:
        """[B, S] token ids -> [B, S, D], the input of block 0."""
        return self.model.model.embed_tokens(input_ids)

    def block_inputs(
        self, x: Tensor, positions: Tensor | None = None, cache: Any = None, num_keys: int | None = None
    ) -> BlockInputs:
        """Positions and masks for one pass over x [B, Q, D].

        Args:
            x: states, for their shape, device and dtype.
            positions: [1 or B, Q]; 0 … Q-1 when not given.
            cache: where the blocks read and write keys and values: slot k holds position k.
            num_keys: slots that the blocks see, needed with a cache. A query then always gets an explicit mask:
                without one, scaled_dot_product_attention would cut a longer cache to the first Q keys.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        windows = {self.window(block) for block in range(self.num_layers)}
        masks = {window: self._mask(positions, window, cache, num_keys, x.dtype) for window in windows}
        return BlockInputs(positions, self.model.model.rotary_emb(x, positions), masks, cache)

    def _mask(self, positions: Tensor, window: int | None, cache: Any, num_keys: int | None, dtype: torch.dtype):
        queries = positions.shape[1]
        kernels_mask = cache is None and self.config._attn_implementation == "sdpa"
        if kernels_mask and (window is None or window >= queries):
            return None  # plain causal attention: the kernels do it without a mask
        keys = positions if cache is None else torch.arange(num_keys, device=positions.device)[None]
        distance = positions[:, None, :, None] - keys[:, None, None, :]  # [B, 1, Q, K]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        # Additive, since eager attention takes no boolean mask.
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
            ~visible, torch.finfo(dtype).min
        )

    def block(self, index: int, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Block `index` (0-based) on states [B, Q, D]: x + f(x), the residual included."""
        return self.model.model.layers[index](
            x,
            attention_mask=inputs.masks[self.window(index)],
            position_ids=inputs.position_ids,
            position_embeddings=inputs.rotary,
            cache=inputs.cache,
            use_cache=inputs.cache is not None,
        )

    def norm(self, x: Tensor) -> Tensor:
        """The final norm, which stands before the head at every exit."""
        return self.model.model.norm(x)

    def decode(self, x: Tensor) -> Tensor:
        """g of the paper (section 4.2): an exit state [..., D] -> logits [..., V]."""
        return self.model.lm_head(self.norm(x))

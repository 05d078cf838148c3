"""A uniform view of transformers causal LMs; only this file and families.py know how such a model is built."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lskip.models.block_inputs import BlockInputs, block_mask, dense_mask
from lskip.models.families import family_of, field_of

if TYPE_CHECKING:  # its import takes seconds, for which checks of bad input shall not wait
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

FLEX = "flex_attention"
ATTENTIONS = ("sdpa", "eager", FLEX)


class Decoder:
    """Embedding, blocks, norm and head of a causal LM, under one set of names for every family.

    Modules are looked up in `model` at each call, so that wrapping (FSDP), moving or casting the model is seen here.

    Raises:
        ValueError: the model's family is not supported, or its attention implementation takes other masks.
    """

    def __init__(self, model: PreTrainedModel):
        self.family = family_of(model.config)
        attention = model.config._attn_implementation
        if attention not in ATTENTIONS:
            raise ValueError(f"attn_implementation: {attention!r} is not supported; allowed: {', '.join(ATTENTIONS)}")
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
        """Tokens that the model's positions are made for.

        Phi-3's longrope changes the angles of all positions once a text is longer than its original context, so that
        the keys in a cache would be wrong: here that context is the limit.
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return rope["original_max_position_embeddings"]
        return self.config.max_position_embeddings

    @property
    def device(self) -> torch.device:
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head_weight.dtype

    @property
    def embedding(self) -> nn.Module:
        """Token ids -> [..., D] (OPT: the width of its project_in)."""
        return self.model.get_input_embeddings()

    @property
    def blocks(self) -> nn.ModuleList:
        return self._part(self.family.blocks)

    @property
    def final_norm(self) -> nn.Module:
        """The norm before the head; the identity where the model has none."""
        return self._part(self.family.norm) or nn.Identity()

    @property
    def rotary(self) -> nn.Module | None:
        """The module that returns cosines and sines of positions; None where they are not rotary."""
        return self._part(self.family.rotary)

    @property
    def head(self) -> nn.Module:
        """The LM head, which decodes every exit."""
        return self.model.get_output_embeddings()

    @property
    def head_weight(self) -> Tensor:
        """[V, D] (OPT: the width of its project_out)."""
        return self.head.weight

    @property
    def head_bias(self) -> Tensor | None:
        return self.head.bias

    @property
    def logit_softcap(self) -> float | None:
        """c, where logits become c tanh(logits / c) (Gemma, arXiv 2408.00118 section 2); None: no cap."""
        return field_of(self.config, "final_logit_softcapping")

    @property
    def project_in(self) -> nn.Module | None:
        """The linear after the token embedding (OPT); None: there is none."""
        return self._part(self.family.project_in)

    @property
    def project_out(self) -> nn.Module | None:
        """The linear after the final norm (OPT); None: there is none."""
        return self._part(self.family.project_out)

    def _part(self, path: str | None) -> nn.Module | None:
        return None if path is None else attrgetter(path)(self.model.base_model)

    def block_index(self, exit_layer: int) -> int:
        """Return the 0-based index of the last block that an exit layer (1-based) runs.

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
        """Return how many keys a query of this block sees, itself included; None: all before it."""
        if self._kind(block) not in (None, "sliding_attention"):
            return None
        return field_of(self.config, "sliding_window")

    def _kind(self, block: int) -> str | None:
        """Return the block's kind of attention, where the config has several."""
        kinds = field_of(self.config, "layer_types")
        return None if kinds is None else kinds[block]

    def rotary_kind(self, block: int) -> str | None:
        """Return the kind of attention by whose angles this block rotates; None: all blocks rotate by the same."""
        return self._kind(block) if self.family.rotary_by_kind else None

    def embed(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the input of block 0, [B, S, D], for token ids [B, S].

        Args:
            positions: [1 or B, S], for families with learned positions; None: 0 … S-1.
        """
        family, x = self.family, self.embedding(input_ids)
        if (project := self.project_in) is not None:
            x = project(x)
        if (learned := self._part(family.positions)) is not None:
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)[None]
            x = x + F.embedding(self._within(positions) + family.first_position, learned.weight)
        dropout = self._part(family.embedding_dropout)
        return x if dropout is None else dropout(x)

    def enter(self, input_ids: Tensor, position_ids: Tensor | None = None) -> tuple[Tensor, BlockInputs]:
        """Return the input of block 0 [B, S, D] and what all blocks share, for a pass over whole rows.

        Args:
            input_ids: [B, S].
            position_ids: [1 or B, S], each token's position in its document: attention stays inside one, and another
                begins where a position is 0. None: each row is one document, for which attention needs no mask.
        """
        x = self.embed(input_ids, position_ids)
        if position_ids is None:
            return x, self.block_inputs(x)
        documents = (position_ids == 0).cumsum(1).expand(len(x), -1)
        return x, self.block_inputs(x, position_ids, documents=documents)

    def block_inputs(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        cache: Any = None,
        key_positions: dict[int | None, Tensor] | None = None,
        documents: Tensor | None = None,
    ) -> BlockInputs:
        """Return positions and masks for one pass over x [B, Q, D].

        Args:
            x: states, for their shape, device and dtype.
            positions: [1 or B, Q]; 0 … Q-1 when not given.
            cache: where the blocks read and write keys and values.
            key_positions: window of a block -> [1 or B, K], the positions of the keys in its cache; needed with a
                cache. Masks are then always explicit: without one, scaled_dot_product_attention would cut a longer
                cache to the first Q keys.
            documents: [B, Q], the number of each token's document, inside which attention stays; None: one a row.
        """
        if positions is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
        windows = {self.window(block) for block in range(self.num_layers)}
        if cache is None:
            key_positions = dict.fromkeys(windows)
        masks = {window: self._mask(x, positions, window, key_positions[window], documents) for window in windows}
        return BlockInputs(positions, self._cos_sin(x, positions), masks, cache, documents)

    def _within(self, positions: Tensor) -> Tensor:
        """Return positions within the context. A batch's text at its end drafts fillers beyond, which are never kept.

        Learned positions end there, and some rotary angles, of all texts, change with the largest position.
        """
        return positions.clamp(max=self.context_length - 1)

    def _cos_sin(self, x: Tensor, positions: Tensor) -> dict[str | None, tuple[Tensor, Tensor]]:
        if self.rotary is None:
            return {}
        positions = self._within(positions)
        if not self.family.rotary_by_kind:
            return {None: self.rotary(x, positions)}
        return {kind: self.rotary(x, positions, kind) for kind in set(self.config.layer_types)}

    def _mask(
        self, x: Tensor, positions: Tensor, window: int | None, keys: Tensor | None, documents: Tensor | None
    ) -> Tensor | BlockMask | None:
        queries, attention, whole_rows = x.shape[1], self.config._attn_implementation, keys is None
        if attention == FLEX and whole_rows:
            return block_mask(queries, window, documents, x.device)
        sees_all_before = documents is None and (window is None or window >= queries)
        if attention == "sdpa" and whole_rows and sees_all_before:
            return None  # plain causal attention, which the kernels do without a mask
        return dense_mask(positions, positions if whole_rows else keys, window, documents, x.dtype)

    def block(self, index: int, x: Tensor, inputs: BlockInputs) -> Tensor:
        """Return the output of block `index` (0-based) for states [B, Q, D]: x + f(x), the residual included."""
        arguments = {self.family.cache_argument: inputs.cache}
        if inputs.rotary:
            arguments["position_embeddings"] = inputs.rotary[self.rotary_kind(index)]
        return self.blocks[index](
            x,
            attention_mask=inputs.masks[self.window(index)],
            position_ids=inputs.position_ids,
            use_cache=inputs.cache is not None,
            **arguments,
        )

    def norm(self, x: Tensor) -> Tensor:
        """Return states as the head takes them: after the final norm, and a projection where the family has one."""
        x, project = self.final_norm(x), self.project_out
        return x if project is None else project(x)

    def decode(self, x: Tensor) -> Tensor:
        """Return the logits [..., V] of exit states [..., D]: g of the paper (section 4.2)."""
        return capped(self.head(self.norm(x)), self.logit_softcap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """Return logits as `Decoder.logit_softcap` has them."""
    return logits if cap is None else (logits / cap).tanh() * cap

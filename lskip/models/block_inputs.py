"""What all blocks of one pass share besides the states: positions, their angles, and the masks of attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class BlockInputs:
    """The inputs that all blocks of one forward pass share, besides the states.

    Attributes:
        position_ids: [1 or B, Q], the position of each query token.
        rotary: kind of attention (None: one for all blocks) -> (cos, sin), each [1 or B, Q, head_dim]; empty where
            positions are not rotary.
        masks: window (None: full attention) -> additive mask [1 or B, 1, Q, K], the BlockMask of flex attention, or
            None for plain causal attention.
        cache: a transformers-compatible cache, or None.
        documents: [B, Q], the number of each token's document, of which a BlockMask tells; None: each row is one.
    """

    position_ids: Tensor
    rotary: dict[str | None, tuple[Tensor, Tensor]]
    masks: dict[int | None, Tensor | BlockMask | None]
    cache: Any = None
    documents: Tensor | None = None

    def rows(self, kept: Tensor, batch_size: int) -> BlockInputs:
        """Return the inputs of the rows `kept` of a batch; parts that broadcast over the batch stay whole."""

        def cut(part: Tensor | None) -> Tensor | None:
            batch_shaped = part is not None and batch_size > 1 and part.shape[0] == batch_size
            return part.index_select(0, kept) if batch_shaped else part

        documents = cut(self.documents)

        def cut_mask(mask: Tensor | BlockMask | None, window: int | None) -> Tensor | BlockMask | None:
            if mask is None or isinstance(mask, Tensor):
                return cut(mask)
            return mask if documents is self.documents else _rows_of_blocks(mask, kept, documents, window)

        return replace(
            self,
            position_ids=cut(self.position_ids),
            rotary={kind: tuple(cut(part) for part in parts) for kind, parts in self.rotary.items()},
            masks={window: cut_mask(mask, window) for window, mask in self.masks.items()},
            documents=documents,
        )


def dense_mask(
    positions: Tensor, keys: Tensor, window: int | None, documents: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Return the mask that is added to attention's scores, [1 or B, 1, Q, K].

    Args:
        positions: [1 or B, Q], of the queries.
        keys: [1 or B, K], positions of the keys.
        window: how many keys a query sees, itself included; None: all before it.
        documents: [B, Q], the number of each token's document, queries and keys being the same; None: one a row.
        dtype: of the scores.
    """
    distance = positions[:, None, :, None] - keys[:, None, None, :]
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    if documents is not None:
        visible &= documents[:, None, :, None] == documents[:, None, None, :]
    # Additive, since eager attention takes no boolean mask.
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def block_mask(length: int, window: int | None, documents: Tensor | None, device: torch.device) -> BlockMask:
    """Return the mask of flex attention: which blocks of tokens of whole rows see each other, and how to tell inside.

    What no document sees is neither stored nor computed: cost goes with the lengths of documents, not of the row.

    Args:
        length: tokens of a row, the queries and the keys.
        window, documents: as in `dense_mask`.
        device: of the states.
    """
    from torch.nn.attention.flex_attention import create_block_mask  # imports the compiler

    rows = None if documents is None else len(documents)
    return create_block_mask(_sees(window, documents), rows, None, length, length, device)


def _rows_of_blocks(mask: BlockMask, kept: Tensor, documents: Tensor, window: int | None) -> BlockMask:
    """Return the mask of the rows `kept` of a batch, whose documents are [kept, Q]."""
    picked = mask[kept]
    picked.mask_mod = _sees(window, documents)  # torch does not know how to renumber rows inside of a function
    return picked


def _sees(window: int | None, documents: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return whether a query sees a key, both by their places in a row, as flex attention asks.

    Distances in a row are those in a document, as both are in the same one.
    """

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= key
        if window is not None:
            seen = seen & (query - key < window)
        return seen if documents is None else seen & (documents[row, query] == documents[row, key])

    return sees

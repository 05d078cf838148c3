"""The preallocated memory of a batch: keys and values of every block, written by position."""

from __future__ import annotations

import torch

PREFILL_ROWS = 256  # a pass's mask and activations grow with its rows: a long prompt goes in pieces


class KVCache:
    """Keys and values of every block for the slots of a batch, a text each; cell k of a slot holds position k.

    What lies at a slot's length and beyond is a draft (or zeros): the next pass writes over it, so rolling back
    is leaving the length where it is, and nothing is copied or cleared.

    Attributes:
        states: [L, slots, 2, KV, cells, head_dim]; index 0 of the third dimension holds keys, 1 values. What a head
            attends to lies in one piece.
        lengths: per slot, the positions that every block has seen and that the text keeps.
    """

    def __init__(self, states: torch.Tensor, lengths: list[int]):
        self.states, self.lengths = states, lengths

    @classmethod
    def of_zeros(cls, num_layers: int, slots: int, cells: int, heads: int, head_dim: int, dtype, device) -> KVCache:
        """An empty cache. Zeros, not garbage: a cell behind a mask must still be finite."""
        shape = num_layers, slots, 2, heads, cells, head_dim
        return cls(torch.zeros(shape, dtype=dtype, device=device), [0] * slots)

    def slot(self, index: int) -> KVCache:
        """A view of one slot's memory."""
        return KVCache(self.states[:, index : index + 1], [self.lengths[index]])

    def move(self, source: int, target: int) -> None:
        """Gives slot `target`, whose text has ended, what slot `source` holds."""
        length = self.lengths[target] = self.lengths[source]
        self.states[:, target, :, :, :length] = self.states[:, source, :, :, :length]

    @property
    def cells(self) -> int:
        return self.states.shape[4]

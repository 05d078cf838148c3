"""The preallocated memory of one sequence: keys and values of every block, written by position."""

from __future__ import annotations

import torch


class KVCache:
    """Keys and values of every block for one request; slot k holds position k.

    What lies at `length` and beyond is a draft (or zeros): the next pass writes over it, so rolling back is
    leaving `length` where it is, and nothing is ever copied or cleared.

    Attributes:
        states: [L, slots, 2, KV, head_dim]; index 0 of the third dimension holds keys, 1 values.
        length: positions that every block has seen and that the text keeps.
    """

    def __init__(self, num_layers: int, slots: int, heads: int, head_dim: int, dtype, device):
        # Zeros, not garbage: a slot behind a mask must still be finite.
        self.states = torch.zeros(num_layers, slots, 2, heads, head_dim, dtype=dtype, device=device)
        self.length = 0

    @property
    def slots(self) -> int:
        return self.states.shape[1]

    @property
    def nbytes(self) -> int:
        return self.states.nbytes

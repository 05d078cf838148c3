"""What every runner of a model's blocks can do: the seam between decoding and how blocks are run."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lskip.inference.layers.kv_cache import KVCache
from lskip.inference.layers.lm_head import Bar, Likeliest


class Step(Protocol):
    """How blocks are run: LeanStep or ModuleStep.

    States are [A, n, D]: n consecutive positions in each of the cache's first A lanes, those of lane a from
    starts[a] on.
    """

    num_layers: int
    dtype: torch.dtype
    device: torch.device

    def new_cache(self, lanes: int, slots: int) -> KVCache: ...
    def embed(self, ids: Tensor, starts: list[int]) -> Tensor: ...
    def run(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> Tensor: ...
    def fill(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> None: ...
    def norm(self, x: Tensor) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...
    def likeliest(self, x: Tensor, bar: Bar | None = None) -> Likeliest | None: ...  # None: no faster than by logits

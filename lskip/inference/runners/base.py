"""The interface between decoding and how blocks are run."""

from typing import Protocol

import torch
from torch import Tensor

from lskip.inference.layers.kv_cache import KVCache
from lskip.inference.layers.lm_head import Ban


class ModelRunner(Protocol):
    """A runner of a model's blocks: FusedRunner or ModuleRunner, or ExitHeadRunner around one of them.

    States are [A, n, D]: n consecutive positions in each of the cache's first A slots, those of slot a from
    starts[a] on.
    """

    num_layers: int
    dtype: torch.dtype
    device: torch.device

    def new_cache(self, slots: int, cells: int) -> KVCache: ...
    def memory(self) -> dict[str, int]: ...
    def embed(self, ids: Tensor, starts: list[int]) -> Tensor: ...
    def run(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> Tensor: ...
    def fill(self, x: Tensor, cache: KVCache, starts: list[int], first: int, last: int) -> None: ...
    def norm(self, x: Tensor) -> Tensor: ...
    def decode(self, x: Tensor) -> Tensor: ...
    def argmax(self, x: Tensor, ban: Ban | None = None) -> Tensor | None: ...  # None: no faster than by logits

"""A runner that leaves the model at an exit, through the exit adapter behind it (Balcony, arXiv 2503.05005)."""

from __future__ import annotations

from torch import Tensor

from lskip.inference.layers.kv_cache import KVCache
from lskip.inference.layers.lm_head import Ban
from lskip.inference.runners.adapter_runner import AdapterRunner
from lskip.inference.runners.base import ModelRunner


class PairedCache:
    """Two caches of the same texts: of the model's blocks, and of the adapter's. As KVCache to those who hold slots."""

    def __init__(self, lower: KVCache, upper: KVCache):
        self.lower, self.upper, self.lengths = lower, upper, lower.lengths
        upper.lengths = lower.lengths

    def slot(self, index: int) -> PairedCache:
        """Return a view of one slot's memory."""
        return PairedCache(self.lower.slot(index), self.upper.slot(index))

    def move(self, source: int, target: int) -> None:
        """Give slot `target`, whose text has ended, what slot `source` holds."""
        self.lower.move(source, target)
        self.upper.move(source, target)

    @property
    def keeps_all(self) -> bool:
        """Whether another text can go on from any position of one that has ended: nothing here exchanges slots."""
        return False

    @property
    def cells(self) -> int:
        return min(self.lower.cells, self.upper.cells)


class AdapterExitRunner:
    """The first E blocks of another runner and the exit adapter's own, as one model of E + A blocks.

    For adapters that do not join the last layer's state of the token before, which nothing computes here.
    """

    def __init__(self, runner: ModelRunner, adapter: AdapterRunner):
        self.runner, self.adapter = runner, adapter
        self.num_layers = adapter.shape.exit_layer + adapter.shape.num_blocks

    def __getattr__(self, name: str):
        return getattr(self.runner, name)

    def new_cache(self, slots: int, cells: int) -> PairedCache:
        """Return a cache for texts of up to `cells` positions."""
        return PairedCache(self.runner.new_cache(slots, cells), self.adapter.runner.new_cache(slots, cells))

    def run(self, x: Tensor, cache: PairedCache, starts: list[int], first: int, last: int) -> Tensor:
        """Run all blocks on embedded tokens x [A, n, D], as ModelRunner.run; they cannot be run apart."""
        assert (first, last) == (0, self.num_layers), "nothing drafts here"
        shape = self.adapter.shape
        states = self.runner.run(x, cache.lower, starts, 0, shape.exit_layer)
        return self.adapter.runner.run(self.adapter.joined(states, None), cache.upper, starts, 0, shape.num_blocks)

    def decode(self, x: Tensor) -> Tensor:
        """Return logits [A, n, V] of states of the last block [A, n, D]: -inf for tokens that the adapter lacks."""
        return self.adapter.decode(x)

    def argmax(self, x: Tensor, ban: Ban | None = None) -> None:
        """Return None: nothing here is faster than `decode`."""

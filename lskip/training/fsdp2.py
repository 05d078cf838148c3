"""Fully sharded data parallelism (FSDP2): each rank holds a share of every block, gathered while the block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

NAME = "fsdp2"


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all devices in one data-parallel group and checkpoints in one file.

    `--trainer.strategy fsdp2`. The module shards itself in `configure_model` (see `shard`).

    Attributes:
        syncs: whether backward averages the gradients over the ranks: in the last micro-batch of a step.
    """

    def __init__(self, **settings):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)
        self.syncs = True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of nodes
        super().setup_environment()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Leave gradients as they are on each rank, unsharded, in micro-batches before a step's last."""
        self.model.set_requires_gradient_sync(False)
        self.syncs = False
        try:
            yield
        finally:
            self.model.set_requires_gradient_sync(True)
            self.syncs = True


StrategyRegistry.register(NAME, FSDP2, "Fully sharded data parallelism by torch's FSDP2, over all devices.")


def shard(module: nn.Module, blocks: nn.ModuleList, mesh: DeviceMesh) -> None:
    """Shard a module in place: each block by itself, and all else (embedding, norm, head, exits) together.

    What belongs to no block is whole while the module's own call runs, and only then: so every read of the head must
    happen inside it. The last block stays whole after its forward pass, since backward begins with it.
    """
    for number, block in enumerate(blocks, start=1):
        fully_shard(block, mesh=mesh, reshard_after_forward=number < len(blocks))
    fully_shard(module, mesh=mesh)

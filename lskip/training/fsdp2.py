"""Fully sharded data parallelism (FSDP2): each rank holds a share of every block, gathered while the block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all devices in one data-parallel group and checkpoints in one file.

    `--trainer.strategy fsdp2`. The module shards itself in `configure_model` (see `shard`).

    In `bf16-mixed` blocks run in bfloat16 and the residual stream with them, not under autocast; what a rank holds, and
    the sum of gradients over ranks, is in float32.

    Attributes:
        syncs: whether backward averages the gradients over the ranks: in the last micro-batch of a step.
        dtypes: of the gathered weights and of the sum of gradients; those of the weights where they are None.
    """

    def __init__(self, **settings):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)
        self.syncs = True
        self.dtypes = MixedPrecisionPolicy()

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes  # Lightning's "auto" is the number of nodes
        super().setup_environment()
        if isinstance(self.precision_plugin, MixedPrecision):
            self.dtypes = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.precision_plugin = Precision()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """False: the module is sharded in configure_model already, and takes a checkpoint as under other strategies."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """True: by `load_optimizer_state_dict`, after ResumedSettings has renewed what a checkpoint holds."""
        return True

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        options = StateDictOptions(full_state_dict=True, strict=strict)
        set_model_state_dict(self.lightning_module, checkpoint["state_dict"], options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return, on rank 0, the state as torch's `optimizer.state_dict()` has it on one device; {} elsewhere."""
        optimizer = getattr(optimizer, "optimizer", optimizer)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(self.model, optimizer, options=options)
        if not self.is_global_zero:
            return {}
        return _renamed(state, {name: number for number, name in enumerate(self._names(optimizer))})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        options = StateDictOptions(full_state_dict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if state["state"]:
                named = _renamed(state, dict(enumerate(self._names(optimizer))))
                set_optimizer_state_dict(self.model, optimizer, named, options=options)
            else:  # such as SGD's without momentum: there is nothing to share out
                optimizer.load_state_dict(state)

    def _names(self, optimizer: Optimizer) -> list[str]:
        """Return the name of each of the optimizer's parameters, in its order."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]

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


def _renamed(state: Mapping[str, Any], names: Mapping) -> dict[str, Any]:
    """Return an optimizer's state under other names of its parameters."""
    groups = [{**group, "params": [names[each] for each in group["params"]]} for group in state["param_groups"]]
    return {"state": {names[each]: part for each, part in state["state"].items()}, "param_groups": groups}


StrategyRegistry.register("fsdp2", FSDP2, "Fully sharded data parallelism by torch's FSDP2, over all devices.")


def shard(module: nn.Module, blocks: nn.ModuleList, strategy: FSDP2) -> None:
    """Shard a module in place: each block by itself, and all else (embedding, norm, head, exits) together.

    What belongs to no block is whole while the module's own call runs, and only then: so every read of the head must
    happen inside it. The last block stays whole after its forward pass, since backward begins with it.
    """
    settings = {"mesh": strategy.device_mesh["data_parallel"], "mp_policy": strategy.dtypes}
    for number, block in enumerate(blocks, start=1):
        fully_shard(block, reshard_after_forward=number < len(blocks), **settings)
    fully_shard(module, **settings)

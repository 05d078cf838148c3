"""Fully sharded data parallelism (FSDP2): each rank holds a share of every block, gathered while the block runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lskip.models.reading.shards import SavedTensor
from lskip.training.checkpoint_file import WholeFiles
from lskip.training.sharded_checkpoint import save_sharded, share_of

NOT_SHARDED = "checkpoint.sharded: true is for trainer.strategy fsdp2, where devices hold shards; leave it out"


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, with all devices in one data-parallel group, and lskip's checkpoints.

    `--trainer.strategy fsdp2`. The module shards itself in `configure_model` (see `shard`).

    In `bf16-mixed` blocks run in bfloat16 and the residual stream with them, not under autocast; what a rank holds, and
    the sum of gradients over ranks, is in float32.

    Attributes:
        saves_shards: whether each rank saves what it holds, or rank 0 all in one file.
        syncs: whether backward averages the gradients over the ranks: in the last micro-batch of a step.
        dtypes: of the gathered weights and of the sum of gradients; those of the weights where they are None.
    """

    def __init__(self, **settings):
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **settings)
        self.saves_shards = False
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
        """Return a checkpoint; of one that is sharded, tensors are read when it is known which rows are wanted."""
        files = self.checkpoint_io
        load = files.load_parts if isinstance(files, WholeFiles) else files.load_checkpoint
        return load(checkpoint_path, weights_only=weights_only)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        if self.saves_shards:
            save_sharded(checkpoint, Path(self.broadcast(filepath)))
        else:
            super().save_checkpoint(checkpoint, filepath, storage_options)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the weights: what this rank holds where shards are saved, else on rank 0 all of them."""
        return get_model_state_dict(self.model, options=self._saved_form())

    def _saved_form(self) -> StateDictOptions:
        gathers = not self.saves_shards
        return StateDictOptions(full_state_dict=gathers, cpu_offload=gathers)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        saved = checkpoint["state_dict"]
        if sharded := _holds_saved_tensors(saved):
            own = self.lightning_module.state_dict()
            saved = {name: _shared_out(value, own.get(name)) for name, value in saved.items()}
        options = StateDictOptions(full_state_dict=not sharded, strict=strict)
        set_model_state_dict(self.lightning_module, saved, options=options)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return the state: by name, of what this rank holds, where shards are saved.

        Else on rank 0 as torch's `optimizer.state_dict()` has it on one device, and {} elsewhere.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)
        state = get_optimizer_state_dict(self.model, optimizer, options=self._saved_form())
        if self.saves_shards:
            return state
        if not self.is_global_zero:
            return {}
        return _renamed(state, {name: number for number, name in enumerate(self._names(optimizer))})

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        options = StateDictOptions(full_state_dict=True)
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            if any(map(_holds_saved_tensors, state["state"].values())):
                optimizer.load_state_dict(_shared_out_state(state, optimizer))
            elif state["state"]:
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


def _holds_saved_tensors(values: Mapping[str, Any]) -> bool:
    return any(isinstance(value, SavedTensor) for value in values.values())


def _shared_out(value: Any, like: Tensor | None) -> Any:
    """Return this rank's rows of a saved tensor, where `like` is sharded; else the whole."""
    if isinstance(like, DTensor) and isinstance(value, Tensor | SavedTensor) and len(value.shape):
        return share_of(value, like)
    return value.read() if isinstance(value, SavedTensor) else value


def _shared_out_state(state: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return an optimizer's state, its parameters numbered, with this rank's rows of each tensor."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    own = {
        number: {key: _shared_out(value, parameters[number]) for key, value in part.items()}
        for number, part in state["state"].items()
    }
    return {**state, "state": own}


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

"""What FSDP2 gathers: a block that layer dropout skips costs nothing; and in which dtypes it works."""

import json
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scale.cases import CASES
from benchmarks.scale.equality import loader_of
from benchmarks.scale.ranks import QUIET, run_ranks
from lskip.module import LayerSkipModule


class Gathers(TorchDispatchMode):
    """Counts the operations that gather shards (torch's CommDebugMode fails where a part of a module is called)."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation.namespace == "c10d" and "allgather" in str(operation)
        return operation(*args, **(kwargs or {}))


class Watch(Callback):
    """Counts what is gathered in each step, and notes the dtypes in which the first block and the optimizer work."""

    def __init__(self):
        self.gathered: list[int] = []
        self.dtypes: set[str] = set()

    def on_train_start(self, trainer, pl_module):
        projection = pl_module.decoder.blocks[0].self_attn.q_proj
        projection.register_forward_pre_hook(lambda module, inputs: self.dtypes.add(f"block {inputs[0].dtype}"))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.mode = Gathers().__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.mode.__exit__(None, None, None)
        self.gathered.append(self.mode.count)
        held = (each for state in trainer.optimizers[0].state.values() for each in state.values() if each.dim())
        self.dtypes |= {f"held {each.dtype}" for each in (*pl_module.parameters(), *held)}


def watched(name: str, out: Path) -> None:
    case, watch = CASES[name], Watch()
    trainer = Trainer(
        **QUIET,
        **{"strategy": "fsdp2", "devices": 2, "max_steps": 2, "enable_checkpointing": False},
        **{"use_distributed_sampler": False, "default_root_dir": out.parent},
        callbacks=[*case.callbacks(), watch],
        **case.trainer,
    )
    module = LayerSkipModule(case.new_model(), optimizer=case.optimizer, lr_scheduler=None)
    trainer.fit(module, loader_of(case, 1, 2, trainer.global_rank))
    if trainer.is_global_zero:
        out.write_text(json.dumps({"gathered": watch.gathered, "dtypes": sorted(watch.dtypes)}))


def seen(name: str, out: Path) -> dict:
    run_ranks(2, watched, name, out)
    return json.loads(out.read_text())


def test_a_skipped_block_is_not_gathered(tmp_path):
    """Of four blocks two run: each is gathered for its forward and, but for the last, for its backward pass."""
    whole = seen("all exits", tmp_path / "whole.json")["gathered"]
    half = seen("half of the blocks never run", tmp_path / "half.json")["gathered"]
    assert whole[-1] == 1 + 4 + 3
    assert half[-1] == 1 + 2 + 2


def test_mixed_precision_rounds_what_is_gathered_and_nothing_that_is_held(tmp_path):
    """Red where weights or momentum are kept in bfloat16, and where the blocks run in float32."""
    assert seen("bf16-mixed", tmp_path / "mixed.json")["dtypes"] == [f"block {torch.bfloat16}", f"held {torch.float32}"]

"""Training by several processes against one process with all rows: the same weights after five steps.

    python -m benchmarks.scale.equality --out result [--world_sizes 2,4] [--strategies ddp] [--cases "LoRA;clipping"]

Float32, gloo on the CPU. Of each training the table shows the largest difference of a weight, as a share of its
tensor's largest weight, and whether all processes hold the same bits. Drop rates are 0 and 1 alone, since another
number of processes draws other sequences; where half of the rows are dropped, DDP by as many processes is the measure.
Writes result.json into --out; ends with 1 where a training differs by more than 1e-5 (bf16-mixed, which FSDP2 does
without autocast: 3e-3).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.scale.cases import CASES, ROWS, STEPS, Batch, Case
from benchmarks.scale.ranks import QUIET, add_ways, run_ranks
from lskip.module import LayerSkipModule
from lskip.utils.output_files import write_json

console = Console(width=120)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    names = list(CASES) if options.cases is None else options.cases
    asked = [(size, strategy) for strategy in options.strategies for size in options.world_sizes]
    measures = [(1, "auto"), *((size, "ddp") for size in options.world_sizes if (size, "ddp") not in asked)]
    for size, strategy in [*measures, *asked]:
        which = [name for name in names if (size, strategy) in asked or CASES[name].same_size == (size > 1)]
        console.print(f"{len(which)} trainings by {size} process(es), {strategy}")
        run_ranks(size, train_all, which, size, strategy, options.out)
    found = [compared(name, size, strategy, options.out) for size, strategy in asked for name in names]
    write_json(options.out / "result.json", {"environment": environment(torch.device("cpu")), "trainings": found})
    print_result(found)
    if any(each["difference"] > CASES[each["case"]].most or not each["same_bits"] for each in found):
        raise SystemExit(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.scale.equality", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for weights and result.json")
    add_ways(parser)
    parser.add_argument("--cases", type=lambda text: text.split(";"), help="names of trainings; default: all")
    options = parser.parse_args(arguments)
    for name in options.cases or ():
        if name not in CASES:
            parser.error(f"cases: {name!r} is not one of {', '.join(CASES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def train_all(names: list[str], world_size: int, strategy: str, out: Path) -> None:
    """Train each case in this process, beside the others, and write what weights it ends with."""
    for name in names:
        weights, rank = train(CASES[name], world_size, strategy, out)
        torch.save(weights, weights_file(out, name, world_size, strategy, rank))


def train(case: Case, world_size: int, strategy: str, folder: Path) -> tuple[dict[str, Tensor], int]:
    """Return the weights of one training, and the rank of this process."""
    accumulate = 1 if world_size == 1 else min(case.accumulate, ROWS // world_size)
    trainer = Trainer(
        **QUIET,
        **{"strategy": strategy, "devices": world_size, "max_steps": STEPS, "enable_checkpointing": False},
        **{"accumulate_grad_batches": accumulate, "default_root_dir": folder, "use_distributed_sampler": False},
        callbacks=list(case.callbacks()),
        **case.trainer,
    )
    module = LayerSkipModule(case.new_model(), optimizer=case.optimizer, lr_scheduler=None, **case.settings)
    trainer.fit(module, loader_of(case, accumulate, world_size, trainer.global_rank))
    return whole_weights(module), trainer.global_rank


def whole_weights(module: LayerSkipModule) -> dict[str, Tensor]:
    """Return copies of the weights by name, gathered from the processes where they are sharded."""
    parts = module.state_dict().items()
    return {name: (part.full_tensor() if isinstance(part, DTensor) else part).detach().clone() for name, part in parts}


def largest_difference(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest difference of a weight, as a share of the largest one that is expected in its tensor."""
    return max(float((weights[name] - part).abs().max() / part.abs().max()) for name, part in expected.items())


def loader_of(case: Case, accumulate: int, world_size: int, rank: int) -> DataLoader:
    """Return the rows of this process: its part of each micro-batch of each step."""
    rows, batches = ROWS // accumulate // world_size, []
    for step in range(STEPS):
        rows_of_all: Batch = case.batch(step)
        for part in range(accumulate):
            first = (part * world_size + rank) * rows
            batches.append({name: values[first : first + rows] for name, values in rows_of_all.items()})
    return DataLoader(batches, batch_size=None)


def weights_file(out: Path, name: str, world_size: int, strategy: str, rank: int) -> Path:
    return out / f"{name.replace(' ', '_')}-{strategy}-{world_size}-{rank}.pt"


def compared(name: str, world_size: int, strategy: str, out: Path) -> dict:
    """Return the largest difference from one process, and whether all processes hold the same bits."""
    first, *others = (
        torch.load(weights_file(out, name, world_size, strategy, rank), weights_only=True) for rank in range(world_size)
    )
    measure = (world_size, "ddp") if CASES[name].same_size else (1, "auto")
    one = torch.load(weights_file(out, name, *measure, 0), weights_only=True)
    return {
        "case": name,
        "strategy": strategy,
        "world_size": world_size,
        "difference": largest_difference(first, one),
        "same_bits": all(torch.equal(first[key], other[key]) for other in others for key in first),
    }


def print_result(found: list[dict]) -> None:
    table = Table("training", "strategy", "processes", "largest difference", "same bits")
    for each in found:
        row = each["case"], each["strategy"], str(each["world_size"]), f"{each['difference']:.1e}"
        table.add_row(*row, "yes" if each["same_bits"] else "NO")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])

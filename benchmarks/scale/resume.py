"""Checkpoints that move: saved by some processes, resumed by others, against one process that was not interrupted.

    python -m benchmarks.scale.resume --out result [--sharded] [--quick]

Three steps are trained and saved, and three more by another number of processes or another strategy, with as many rows
in all: the same rows follow, and the weights are those of six steps by one process. Who goes on with shards that as
many processes have saved ends with the bits of six steps by them. Float32, gloo on the CPU. Writes result.json into
--out; ends with 1 where weights differ by more than 1e-5 of their tensor's largest, or bits where they may not.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.scale.cases import MOST, ROWS, Case, dropping, half_dropped
from benchmarks.scale.equality import largest_difference, whole_weights
from benchmarks.scale.ranks import QUIET, run_ranks
from lskip.callbacks import RunCheckpoint
from lskip.data import TextData
from lskip.module import LayerSkipModule
from lskip.utils.output_files import write_json

HALF, STEPS = 3, 6
# What is dropped -> a training.
BLOCKS, ROWS_AT_RANDOM = "whole blocks", "at random"
CASES = {
    BLOCKS: Case(callbacks=dropping, model={"vocab_size": 300}),
    ROWS_AT_RANDOM: Case(callbacks=half_dropped(), model={"vocab_size": 300, "attention_dropout": 0.2}),
}
ONE, SHARDED = (1, "auto"), "fsdp2, sharded"
SAVERS = (ONE, (2, "ddp"), (2, "fsdp2"), (4, "fsdp2"), (2, SHARDED), (4, SHARDED))
RESUMERS = (ONE, (2, "ddp"), (2, "fsdp2"), (4, "ddp"), (4, "fsdp2"))
console = Console(width=120)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    write_corpus(options.out / "texts.jsonl")
    last = options.out / "saved" / "last.ckpt"
    run_ranks(1, train, BLOCKS, options.out, *ONE, "whole", STEPS, None)
    found = []
    for saver in options.savers:
        run_ranks(saver[0], train, BLOCKS, options.out, *saver, "saved", HALF, None)
        alike = (saver[0], "fsdp2") if saver[1] == SHARDED else None
        if alike in options.resumers:
            run_ranks(saver[0], train, BLOCKS, options.out, *saver, "uninterrupted", STEPS, None)
        for resumer in options.resumers:
            run_ranks(resumer[0], train, BLOCKS, options.out, *resumer, "resumed", STEPS, last)
            row = {"saved_by": saver, "resumed_by": resumer, "drops": BLOCKS}
            row["difference"] = difference(options.out, "whole")
            row["same_bits"] = difference(options.out, "uninterrupted") == 0 if resumer == alike else None
            console.print(row)
            found.append(row)
    for saver in (saver for saver in options.savers if saver[0] == 2):
        for name, steps, checkpoint in (
            ("uninterrupted", STEPS, None),
            ("saved", HALF, None),
            ("resumed", STEPS, last),
        ):
            run_ranks(2, train, ROWS_AT_RANDOM, options.out, *saver, name, steps, checkpoint)
        off = difference(options.out, "uninterrupted")
        by = {"saved_by": saver, "resumed_by": saver, "drops": ROWS_AT_RANDOM}
        found.append({**by, "difference": off, "same_bits": off == 0})
        console.print(found[-1])
    write_json(options.out / "result.json", {"environment": environment(torch.device("cpu")), "resumed": found})
    print_result(found)
    if any(each["difference"] > MOST or each["same_bits"] is False for each in found):
        raise SystemExit(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.scale.resume", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for checkpoints and result.json")
    parser.add_argument("--quick", action="store_true", help="two of the ways alone")
    parser.add_argument("--sharded", action="store_true", help="savers of shards alone")
    options = parser.parse_args(arguments)
    options.savers = SAVERS[4:] if options.sharded else SAVERS[4:5] if options.quick else SAVERS
    options.resumers = (ONE, (2, "fsdp2")) if options.quick else RESUMERS
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def write_corpus(path: Path) -> None:
    draw = random.Random(0)
    texts = (" ".join(draw.choices(["on", "off", "the", "lamp", "2", "3", "of", "den"], k=40)) for _ in range(60))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def train(
    drops: str, out: Path, world_size: int, strategy: str, name: str, steps: int, checkpoint: Path | None
) -> None:
    """Train in this process, beside the others, up to so many steps; save at the end, and write the weights."""
    case, folder = CASES[drops], out / name
    if checkpoint is None:
        shutil.rmtree(folder, ignore_errors=True)
    data = TextData(
        str(out / "texts.jsonl"), vocab_size=300, block_size=12, batch_size=ROWS // world_size, cache_dir=str(out)
    )
    trainer = Trainer(
        **QUIET,
        **{"strategy": strategy.partition(",")[0], "devices": world_size, "max_steps": steps, "limit_val_batches": 0},
        callbacks=[*case.callbacks(), RunCheckpoint(folder, sharded=strategy == SHARDED)],
        default_root_dir=out,
    )
    module = LayerSkipModule(case.new_model(), optimizer=case.optimizer, lr_scheduler=None)
    trainer.fit(module, data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    weights = whole_weights(module)
    if trainer.is_global_zero:
        torch.save(weights, out / f"{name}.pt")


def difference(out: Path, measure: str) -> float:
    """Return the largest difference of the resumed run's weights, as a share of their tensor's largest."""
    one, other = (torch.load(out / f"{name}.pt", weights_only=True) for name in (measure, "resumed"))
    return largest_difference(other, one)


def print_result(found: list[dict]) -> None:
    table = Table("saved by", "resumed by", "drops", "largest difference", "bits of as many, uninterrupted")
    for each in found:
        table.add_row(
            *(f"{size} {strategy}" for size, strategy in (each["saved_by"], each["resumed_by"])),
            each["drops"],
            f"{each['difference']:.1e}",
            {None: "", True: "the same", False: "OTHERS"}[each["same_bits"]],
        )
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Validation by several processes against one: each row is read once, each scored token counts once.

    python -m benchmarks.scale.validation --out result [--world_sizes 2,4] [--strategies ddp,fsdp2]

37 rows, which divide over no number of processes, of text and of pairs with an odd number of scored tokens. The table
shows the last layer's loss and the largest relative difference of a perplexity of any layer. Float32, gloo on the CPU.
Writes result.json into --out; ends with 1 where one differs by more than 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.scale.cases import MOST, VOCABULARY, Case
from benchmarks.scale.ranks import QUIET, add_ways, run_ranks
from lskip.callbacks import LayerMetrics
from lskip.data.loading import held_out_loader
from lskip.module import LayerSkipModule
from lskip.utils.output_files import write_json

ROWS, LENGTH, BATCH = 37, 12, 3
KINDS = ("text", "pairs")
ONE = (1, "auto")
console = Console(width=120)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    ways = [ONE, *((size, strategy) for strategy in options.strategies for size in options.world_sizes)]
    for way in ways:
        run_ranks(way[0], validate_all, *way, options.out)
    read = {(kind, way): json.loads(file_of(options.out, kind, *way).read_text()) for kind in KINDS for way in ways}
    found = [compared(kind, way, read[kind, way], read[kind, ONE]) for kind in KINDS for way in ways]
    write_json(options.out / "result.json", {"environment": environment(torch.device("cpu")), "validations": found})
    print_result(found)
    if any(each["difference"] > MOST for each in found):
        raise SystemExit(1)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.scale.validation", __doc__)
    parser.add_argument("--out", required=True, type=Path, help="folder for result.json")
    add_ways(parser)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def rows_of(kind: str) -> list[dict[str, np.ndarray]]:
    """Return rows of which all tokens are scored, or 1 to LENGTH - 1 of them."""
    random = np.random.default_rng(0)
    rows = [{"input_ids": random.integers(0, VOCABULARY, LENGTH)} for _ in range(ROWS)]
    if kind == "pairs":
        for row in rows:
            first = random.integers(1, LENGTH)
            row["labels"] = np.where(np.arange(LENGTH) < first, -100, row["input_ids"])
    return rows


def validate_all(world_size: int, strategy: str, out: Path) -> None:
    """Validate each kind of rows in this process, beside the others; rank 0 writes what it found."""
    for kind in KINDS:
        metrics = LayerMetrics()
        trainer = Trainer(**QUIET, strategy=strategy, devices=world_size, default_root_dir=out, callbacks=[metrics])
        module = LayerSkipModule(Case().new_model())
        loader = held_out_loader(rows_of(kind), world_size, rank_of(trainer), batch_size=BATCH)
        trainer.validate(module, loader, verbose=False)
        if trainer.is_global_zero:
            loss = float(trainer.callback_metrics["val/loss"])
            found = {"loss": loss, "perplexity": list(metrics.report.perplexity)}
            file_of(out, kind, world_size, strategy).write_text(json.dumps(found))


def rank_of(trainer: Trainer) -> int:
    return trainer.strategy.cluster_environment.global_rank() if trainer.num_devices > 1 else 0


def file_of(out: Path, kind: str, world_size: int, strategy: str) -> Path:
    return out / f"{kind}-{strategy}-{world_size}.json"


def compared(kind: str, way: tuple[int, str], found: dict, one: dict) -> dict:
    pairs = zip([found["loss"], *found["perplexity"]], [one["loss"], *one["perplexity"]], strict=True)
    difference = max(abs(value / expected - 1) for value, expected in pairs)
    return {"rows": kind, "world_size": way[0], "strategy": way[1], "loss": found["loss"], "difference": difference}


def print_result(found: list[dict]) -> None:
    table = Table("rows", "processes", "strategy", "val/loss", "largest difference")
    for each in found:
        way = each["rows"], str(each["world_size"]), each["strategy"]
        table.add_row(*way, f"{each['loss']:.6f}", f"{each['difference']:.1e}")
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])

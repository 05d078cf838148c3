"""What padding costs: training steps on the quickstart's pairs as they come, of like length together, and packed.

    python -m benchmarks.training.padding [--rounds 40] [--output result.json] [--quick]

Each kind of step takes its own batches of --data.batch_size pairs (packed: of as many pairs in rows of block_size), in
turns in one process. Counted are the positions that are computed for each token (scored or context), and the seconds
that a thousand tokens take, forward and backward, every block and exit on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.command_line import command_parser
from benchmarks.environment import environment
from benchmarks.training.documents import step
from benchmarks.training.train_step import time_rounds
from lskip.data import TextData
from lskip.module import LayerSkipModule
from lskip.training.training_log import count_tokens
from lskip.utils.output_files import write_json

WAYS = {"as they come": {}, "group_by_length": {"group_by_length": True}, "pack": {"pack": True}}
PAIRS, SIZE = 16, 60  # of the quickstart
console = Console(width=120)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    module, device = new_module(options).train(), torch.device("cpu")
    batches = {way: batches_of(way, options) for way in WAYS}
    works = {way: partial(one, module, some) for way, some in batches.items()}
    seconds = time_rounds(works, options.rounds, device)
    found = []
    for way, some in batches.items():
        tokens = sum(int(count_tokens(batch)) for batch in some)
        computed = sum(batch["input_ids"].numel() for batch in some)
        row = {"way": way, "batches": len(some), "positions_per_token": computed / tokens}
        found.append({**row, "seconds_per_1000_tokens": 1000 * sum(seconds[way]) / tokens})
    if options.output is not None:
        write_json(options.output, {"environment": environment(device), "ways": found})
    print_result(found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.training.padding", __doc__)
    parser.add_argument("--rounds", type=int, default=40, help="steps of each kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache_dir", default=None, help="of TextData; default ~/.cache/lskip")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs; its times say nothing")
    options = parser.parse_args(arguments)
    options.rounds, options.layers = (2, 2) if options.quick else (options.rounds, 12)
    return options


def new_module(options: argparse.Namespace) -> LayerSkipModule:
    """Return the quickstart's model, all of whose exits are on."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 704, "num_attention_heads": 6, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=options.layers, tie_word_embeddings=True, **sizes)
    module = LayerSkipModule(LlamaForCausalLM(config), lr_scheduler=None)
    module.exit_weights.write(None, [1 / options.layers] * options.layers)
    return module


def batches_of(way: str, options: argparse.Namespace) -> list[dict[str, Tensor]]:
    """Return as many batches as rounds; packed rows are as many as hold PAIRS pairs on average."""
    split = {"val_within_groups": True, "test_fraction": 0.1, "split_digits": True, "cache_dir": options.cache_dir}
    split |= {"source": "home_assistant", "vocab_size": 1024, "block_size": SIZE}
    rows = PAIRS if way != "pack" else max(1, round(PAIRS * packed_share(split)))
    return list(islice(endless(TextData(**split, batch_size=rows, **WAYS[way])), options.rounds))


def packed_share(split: dict) -> float:
    """Return how many packed rows there are for each pair."""
    rows = {way: len(TextData(**split, **WAYS[way]).train_dataloader().dataset) for way in ("as they come", "pack")}
    return rows["pack"] / rows["as they come"]


def endless(data: TextData) -> Iterator[dict[str, Tensor]]:
    while True:
        yield from data.train_dataloader()


def one(module: LayerSkipModule, batches: list[dict[str, Tensor]], number: int) -> None:
    step(module, batches[number], number)


def print_result(found: list[dict]) -> None:
    table = Table("pairs", "positions a token", "s / 1,000 tokens", "of as they come")
    for row in found:
        share = row["seconds_per_1000_tokens"] / found[0]["seconds_per_1000_tokens"]
        cells = f"{row['positions_per_token']:.2f}", f"{row['seconds_per_1000_tokens']:.3f}", f"{share:.2f}"
        table.add_row(row["way"], *cells)
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])

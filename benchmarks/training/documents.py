"""What it costs to keep the documents of a packed row apart: a training step with their mask against one without.

    python -m benchmarks.training.documents [--lengths 256,1024,4096] [--rounds 20] [--output result.json] [--quick]

The same tokens, of documents of 200 tokens on average, in rows of each length; the kinds of step take turns in one
process, on a GPU also the one by flex attention. The table shows the median over the rounds of the ratio of the same
round.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.command_line import command_parser
from benchmarks.decoding.options import numbers
from benchmarks.environment import environment
from benchmarks.training.train_step import paired_ratio, time_rounds
from lskip.data.collation import Border, collate
from lskip.module import LayerSkipModule
from lskip.training.flex_attention import use_flex_attention
from lskip.utils.output_files import write_json

VOCABULARY, END, MEAN_LENGTH = 8192, 0, 200
APART, JOINED, FLEX = "separate", "joined", "separate, flex attention"
console = Console(width=120)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    rows = [measure(length, options, device) for length in options.lengths]
    if options.output is not None:
        write_json(options.output, {"environment": environment(device), "steps": rows})
    print_result(rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.training.documents", __doc__)
    parser.add_argument("--lengths", type=numbers, default=(256, 1024, 4096), help="tokens of a row, such as 256,1024")
    parser.add_argument("--tokens", type=int, default=4096, help="of a step, at least one row")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each kind")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs; its times say nothing")
    options = parser.parse_args(arguments)
    if options.quick:
        options.lengths, options.tokens, options.rounds, options.layers, options.hidden = (256, 512), 512, 2, 2, 64
    return options


def measure(length: int, options: argparse.Namespace, device: torch.device) -> dict:
    """Return the seconds of each kind of step, and the medians of their ratios to a step on joined documents."""
    rows = packed_rows(max(1, options.tokens // length), length)
    batches = {JOINED: collate(rows), APART: collate(rows, Border(END))}
    batches = {name: {key: part.to(device) for key, part in batch.items()} for name, batch in batches.items()}
    module = new_module(options.layers, options.hidden, length).to(device).train()
    works = {name: partial(step, module, batch) for name, batch in batches.items()}
    if device.type != "cpu":
        flexible = new_module(options.layers, options.hidden, length).to(device).train()
        use_flex_attention([flexible.model], device)
        works[FLEX] = partial(step, flexible, batches[APART])
    seconds = time_rounds(works, options.rounds, device)
    documents = int((batches[APART]["position_ids"] == 0).sum())
    return {
        **{"length": length, "rows": len(rows), "documents": documents},
        "seconds": {name: float(np.median(taken)) for name, taken in seconds.items()},
        "time_ratio": {name: paired_ratio(seconds, name, JOINED) for name in works if name != JOINED},
    }


def new_module(layers: int, hidden: int, length: int) -> LayerSkipModule:
    """Return a model whose last layer alone is read, so that attention is as much of a step as it can be."""
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=length, **sizes, **heads)
    return LayerSkipModule(LlamaForCausalLM(config), lr_scheduler=None)


def packed_rows(count: int, length: int) -> list[dict[str, np.ndarray]]:
    """Return rows of random tokens, of which one in MEAN_LENGTH ends a document."""
    random = np.random.default_rng(0)
    ids = random.integers(1, VOCABULARY, (count, length))
    ids[random.random(ids.shape) < 1 / MEAN_LENGTH] = END
    ids[:, length // 2] = END  # at least one in each row
    return [{"input_ids": row} for row in ids]


def step(module: LayerSkipModule, batch: dict[str, Tensor], micro_batch: int) -> None:
    module.zero_grad()
    module.early_exit_loss(batch, micro_batch)[0].backward()


def print_result(rows: list[dict]) -> None:
    others = list(rows[0]["time_ratio"])
    table = Table("tokens a row", "rows", "documents", f"{JOINED}, s", *(f"{name} / {JOINED}" for name in others))
    for row in rows:
        ratios = (f"{row['time_ratio'][name]:.3f}" for name in others)
        sizes = (str(row[name]) for name in ("length", "rows", "documents"))
        table.add_row(*sizes, f"{row['seconds'][JOINED]:.3f}", *ratios)
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])

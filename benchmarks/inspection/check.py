"""Check of `lskip inspect` against an independent program: every number of a table, to within 1 %.

    python -m benchmarks.training.layer_table > layer_table.txt
    python -m benchmarks.inspection.check --table layer_table.txt

The table is the output of layer_table: stock SmolLM2-135M-Instruct through transformers' hidden states, on the first
8 x 512 tokens of the language topics in `pydoc_data` of the same Python. Both use the tokenizer as transformers reads
it from the GGUF file: lskip's own splits numbers into digits (as llama.cpp does), which shifts the blocks by a few
tokens. Without a table, lskip's numbers are printed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.command_line import command_parser
from lskip.evaluation.layers.divergence import DivergenceReport, report_divergence
from lskip.models.decoder import Decoder
from lskip.models.pretrained import find_source, load_model

TOLERANCE = 0.01
LAYER = re.compile(r"layer +(\d+) perplexity +(\S+) agreement (\S+)")
DEPTHS = re.compile(r"no longer changes (\S+), at which it is first the last layer's (\S+)")


def blocks(model: str, num_blocks: int, block_size: int) -> Tensor:
    """[num_blocks, block_size], the first tokens of the topics."""
    tokenizer = AutoTokenizer.from_pretrained(**find_source(model).transformers_arguments(), trust_remote_code=False)
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: num_blocks * block_size]
    return torch.tensor(ids).view(num_blocks, block_size)


def measured(report: DivergenceReport) -> dict[str, float]:
    """What the table holds, by the same names."""
    numbers = {f"perplexity of layer {row['layer']}": row["perplexity"] for row in report.layers()}
    numbers |= {f"agreement of layer {row['layer']}": row["agreement"] for row in report.layers()}
    return {**numbers, "settled": report.layers_needed, "first agreeing": report.first_agreeing_depth}


def expected(table: str) -> dict[str, tuple[float, float]]:
    """name -> (number, half a unit of its last printed digit)."""
    numbers = {}
    for layer, perplexity, agreement in LAYER.findall(table):
        numbers[f"perplexity of layer {layer}"] = _printed(perplexity)
        numbers[f"agreement of layer {layer}"] = _printed(agreement)
    settled, first = DEPTHS.search(table).groups()
    return {**numbers, "settled": _printed(settled), "first agreeing": _printed(first)}


def _printed(text: str) -> tuple[float, float]:
    mantissa, _, exponent = text.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return float(text), 0.5 * 10.0 ** (int(exponent or 0) - decimals)


def differences(found: dict[str, float], table: str) -> list[str]:
    """The numbers that differ by more than 1 % and what the table's rounding explains; one line each."""
    wrong = []
    for name, (number, rounding) in expected(table).items():
        if not abs(found[name] - number) <= TOLERANCE * number + rounding:
            wrong.append(f"{name}: {found[name]:.5g}, in the table {number:.5g}")
    return wrong


def main(arguments: list[str] | None = None) -> int:
    parser = command_parser("benchmarks.inspection.check", __doc__)
    parser.add_argument("--table", type=Path, help="output of benchmarks.training.layer_table")
    parser.add_argument("--model", default="smollm2", help="a GGUF file or folder of a model")
    parser.add_argument("--num_blocks", type=int, default=8)
    parser.add_argument("--block_size", type=int, default=512)
    options = parser.parse_args(arguments)
    table = options.table.read_text() if options.table else None
    rows = blocks(options.model, options.num_blocks, options.block_size)
    decoder = Decoder(load_model(options.model)[0])
    found = measured(report_divergence(decoder, [{"input_ids": row[None], "labels": row[None]} for row in rows]))
    for name, number in found.items():
        print(f"{name}: {number:.6g}")
    if table is None:
        return 0
    wrong = differences(found, table)
    print(f"{len(expected(table))} numbers compared, {len(wrong)} differ by more than 1 %", *wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

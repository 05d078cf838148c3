"""Tokens per round computed along the model's own answers, against what decoding then makes.

    python -m benchmarks.decoding.tokens_per_round_check --model runs/quickstart --task HomeAssistant --out runs/check

The model answers held-out prompts greedily; one pass over each answer says where every exit is right, from which
tokens per round follow (lskip/evaluation/sweep/own_answers.py). Then the same prompts are decoded anew with each exit
and number of drafted tokens. Prints both for each; the target is a difference of at most 5 %. With --draft_weights
the exits are those of a rounded copy, which reads keys and values of its own here, and the model's in decoding.

Writes result.json into --out.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import command_parser
from benchmarks.decoding.options import numbers
from benchmarks.environment import environment
from lskip.evaluation.sweep.own_answers import own_texts, own_tokens_per_round, read_answer
from lskip.evaluation.tasks.embedded import DocstringToCode, HomeAssistant, PythonTopics, StdlibCode
from lskip.evaluation.tasks.local import LocalTask
from lskip.evaluation.tasks.prompts import Prompt, prompts_of
from lskip.evaluation.tasks.task import Task
from lskip.inference import TextGenerator
from lskip.inference.layers.quantized import DRAFT_WEIGHTS
from lskip.inference.options import LoadingOptions
from lskip.utils.console import plain_console, plain_table
from lskip.utils.output_files import write_json

TASKS = {kind.__name__: kind for kind in (StdlibCode, DocstringToCode, PythonTopics, HomeAssistant)}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        generator = LoadingOptions(model=options.model, device="cpu", draft_weights=options.draft_weights).load()
        prompts = prompts_of(task_of(options), generator, options.prompts)
        cells = check(generator, prompts, options.exit_layers, options.num_speculations, options.batch_size)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.decoding.tokens_per_round_check: {error}") from error
    result = {"options": vars(options), "environment": environment(torch.device("cpu")), "answers": len(prompts)}
    write_json(options.out / "result.json", {**result, "cells": cells})
    show(cells, len(prompts))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.decoding.tokens_per_round_check", __doc__)
    add = parser.add_argument
    add("--model", default="smollm2", help="as for lskip")
    add("--out", required=True, type=Path, help="folder for result.json")
    add("--draft_weights", choices=DRAFT_WEIGHTS, help="exits draft in rounded weights; default: in the model's own")
    add("--task", choices=TASKS, default="PythonTopics")
    add("--prompts_file", help="prompts as of LocalTask, in place of the task's")
    add("--max_new_tokens", type=int, default=48)
    add("--prompts", type=int, default=40)
    add("--exit_layers", type=numbers, default=(2, 4))
    add("--num_speculations", type=numbers, default=(2, 4, 8))
    add("--batch_size", type=int, default=8)
    add("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def task_of(options: argparse.Namespace) -> Task:
    if options.prompts_file is not None:
        return LocalTask(options.prompts_file, max_new_tokens=options.max_new_tokens)
    return TASKS[options.task](max_new_tokens=options.max_new_tokens)


def check(
    generator: TextGenerator,
    prompts: list[Prompt],
    exit_layers: tuple[int, ...],
    num_speculations: tuple[int, ...],
    batch_size: int,
) -> list[dict[str, Any]]:
    """Return, for each exit and number of drafted tokens, tokens per round computed and decoded."""
    texts = own_texts(generator, prompts, batch_size)
    runner, kind = generator.draft_runner or generator.runner, "weights" if generator.draft_runner else "layers"
    reading = generator.runners.reading_drafts
    readings = [read_answer(runner, reading, text, generator.vocab_size) for text in texts]
    cells = []
    for count in num_speculations:
        computed = own_tokens_per_round(readings, count)
        for exit_layer in exit_layers:
            draft = {"exit_layer": exit_layer, "num_speculations": count, "draft": kind}
            decoded = decode(generator, prompts, batch_size, draft)
            value = computed[exit_layer - 1]
            cells.append({**draft, "computed": value, "decoded": decoded, "difference": value / decoded - 1})
    return cells


def decode(generator: TextGenerator, prompts: list[Prompt], batch_size: int, draft: dict[str, Any]) -> float:
    """Return tokens over rounds of all answers."""
    ids, settings = [prompt.ids for prompt in prompts], {**prompts[0].settings, **draft}
    ended = [generation for _, generation in generator.generate_batch(ids, batch_size, **settings)]
    return sum(len(each.token_ids) for each in ended) / sum(each.rounds for each in ended)


def show(cells: list[dict[str, Any]], answers: int) -> None:
    names = ("exit_layer", "num_speculations", "computed", "decoded", "difference")
    table = plain_table(*names, title=f"Tokens per round, {answers} answers")
    for cell in cells:
        numbers_ = (f"{cell['computed']:.3f}", f"{cell['decoded']:.3f}", f"{cell['difference']:+.2%}")
        table.add_row(str(cell["exit_layer"]), str(cell["num_speculations"]), *numbers_)
    console = plain_console()
    console.print(table)
    console.print(f"largest difference: {max(abs(cell['difference']) for cell in cells):.2%}")


if __name__ == "__main__":
    main(sys.argv[1:])

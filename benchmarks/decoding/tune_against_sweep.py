"""Comparison of `lskip tune` with a full sweep: speed-up of the chosen cell, and time.

    python -m benchmarks.decoding.tune_against_sweep --model runs/small --out runs/tune_against_sweep

For each task: a sweep of the grid (lskip/evaluation/sweep/), then tune on the same grid, both timed with loading. The
result is the sweep's speed-up of the cell that tune chose over the best speed-up of the sweep; the target is 0.95 in a
fifth of the time. "do not draft" counts as a speed-up of 1.

Writes result.json and a folder of the sweep's files for each task into --out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.command_line import command_parser
from benchmarks.decoding.options import fill_in, number, numbers
from benchmarks.environment import environment
from lskip.evaluation.sweep.advice import best_cell
from lskip.evaluation.sweep.cells import Generators
from lskip.evaluation.sweep.forecast import Answers
from lskip.evaluation.sweep.grid import Cell, cell_of, draft_names, grid
from lskip.evaluation.sweep.search import best_records
from lskip.evaluation.sweep.sweep import sweep
from lskip.evaluation.tasks.embedded import DocstringToCode, HumanEval, PythonTopics, StdlibCode
from lskip.evaluation.tasks.prompts import prompts_of
from lskip.evaluation.tasks.task import Continuation, Task
from lskip.inference.options import LoadingOptions
from lskip.models.pretrained import load_config
from lskip.utils.output_files import write_json

TASKS = {kind.__name__: kind for kind in (StdlibCode, DocstringToCode, PythonTopics, HumanEval)}
# --quick sets what was not named: it shows that everything runs; its times say nothing.
DEFAULTS = {"num_prompts": 8, "rounds": 2, "max_new_tokens": 96, "num_speculations": (1, 2, 4, 6, 8)}
QUICK = {"num_prompts": 1, "rounds": 1, "max_new_tokens": 8, "num_speculations": (1, 2)}
BATCH_SIZE = 4  # of tune
TUNE = {"rounds": 1, "decoded_cells": 3}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"options": vars(options), "environment": environment(torch.device("cpu")), "tasks": {}}
    try:
        for name in options.tasks:
            result["tasks"][name] = compare(make_task(name, options), options)
            write_json(options.out / "result.json", result)
            print(sentence(name, result["tasks"][name]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.decoding.tune_against_sweep: {error}") from error


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.decoding.tune_against_sweep", __doc__)
    add = parser.add_argument
    add("--model", default="smollm2", help="as for lskip; one that was trained to exit")
    add("--out", required=True, type=Path, help="folder for the results; what it holds is replaced")
    add("--tasks", nargs="+", choices=TASKS, default=["StdlibCode", "DocstringToCode"])
    add("--drafts", nargs="+", choices=[draft for draft in draft_names() if draft != "adapter"], default=["layers"])
    add("--exit_layers", type=numbers, help="default: a sixth, a quarter, a third and half of the model")
    add("--num_speculations", type=numbers, help="default: 1,2,4,6,8")
    add("--num_prompts", type=number, help="of the sweep and of tune. Default: 8")
    add("--rounds", type=number, help="of the sweep; tune takes 1. Default: 2")
    add("--max_new_tokens", type=number, help="default: 96")
    add("--prompt_characters", type=number, default=640, help="of tasks that continue a text")
    add("--threads", type=number, default=2)
    add("--quick", action="store_true", help="as little as shows that it runs; its times say nothing")
    options = parser.parse_args(arguments)
    fill_in(options, QUICK if options.quick else DEFAULTS)
    return options


def make_task(name: str, options: argparse.Namespace) -> Task:
    kind = TASKS[name]
    more = {"prompt_characters": options.prompt_characters} if issubclass(kind, Continuation) else {}
    return kind(max_new_tokens=options.max_new_tokens, **more)


def compare(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Both on one task.

    Returns:
        "sweep", "tune": seconds and cell (None: do not draft) of each, "speedup" by the sweep's figures;
        "share_of_best", "share_of_time": tune's over the sweep's.
    """
    loading, folder = LoadingOptions(model=options.model), options.out / task.name
    exits, counts = options.exit_layers and list(options.exit_layers), list(options.num_speculations)
    drafts, prompts = options.drafts, options.num_prompts
    swept, _ = timed(
        lambda: sweep(
            task,
            str(folder),
            loading,
            drafts,
            exits,
            counts,
            num_prompts=prompts,
            rounds=options.rounds,
            overwrite=True,
        )
    )
    cells = grid(drafts, exits, counts, ["FixedDraft"], load_config(options.model).num_hidden_layers)
    tuned, records = timed(lambda: search(task, loading, cells, prompts))
    measured = json.loads((folder / "sweep.json").read_text())["cells"]
    speedups = {cell_of(record): record["times"]["speedup"] for record in measured}
    best, chosen = max(speedups, key=speedups.get), best_cell(records)
    cell = None if chosen is None else cell_of(chosen)
    # Nobody drafts where the best cell is slower than not drafting.
    most, reached = max(1.0, speedups[best]), 1.0 if cell is None else speedups[cell]
    return {
        "sweep": {"seconds": swept, "cell": str(best), "speedup": speedups[best], "cells": len(speedups)},
        "tune": {"seconds": tuned, "cell": cell and str(cell), "speedup": reached},
        "share_of_best": reached / most,
        "share_of_time": tuned / swept,
    }


def search(task: Task, loading: LoadingOptions, cells: list[Cell], num_prompts: int) -> list[dict[str, Any]]:
    """What tune decodes."""
    generators = Generators(loading)
    answers = Answers(generators, prompts_of(task, generators.plain, num_prompts), BATCH_SIZE)
    return best_records(answers, cells, **TUNE)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    outcome = work()
    return time.perf_counter() - begin, outcome


def sentence(name: str, found: dict[str, Any]) -> str:
    swept, tuned = found["sweep"], found["tune"]
    return (
        f"{name}: sweep {swept['cell']} {swept['speedup']:.2f}x of {swept['cells']} cells in {swept['seconds']:.0f} s;"
        f" tune {tuned['cell'] or 'does not draft'} {tuned['speedup']:.2f}x in {tuned['seconds']:.0f} s:"
        f" {found['share_of_best']:.3f} of the best in {found['share_of_time']:.3f} of the time"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

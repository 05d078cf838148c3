"""`make demo`: LayerSkip for a task from scratch on this machine, and a real model beside transformers' `generate`.

    python -m benchmarks.demo.run [--output DIR]

1. Trains configs/quickstart.yaml (what is said to a smart home -> intent and slots) and a plain model of a few blocks,
   shows exact match of every exit on held-out sentences and templates, and decodes held-out requests by lskip, with
   and without drafts, and by transformers, in turns.
2. Shows every layer of stock SmolLM2-135M-Instruct on held-out text, and answers chat prompts by lskip and by
   transformers' `generate`, in turns.

Ends with a summary, also in <output>/summary.json.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from benchmarks.command_line import command_parser
from benchmarks.demo.report import print_summary
from benchmarks.demo.sizes import Sizes
from benchmarks.demo.smollm2 import run_smollm2
from benchmarks.demo.task import run_task
from benchmarks.environment import environment
from lskip.utils.output_files import write_json


def run(output: Path, sizes: Sizes) -> dict:
    """Run both parts; write summary.json and a figure under `output`, and return the summary."""
    began = time.perf_counter()
    output.mkdir(parents=True, exist_ok=True)
    summary = {
        "environment": environment(torch.device("cpu")),
        "task": run_task(output, sizes),
        "smollm2": run_smollm2(output, sizes),
    }
    summary["seconds"] = time.perf_counter() - began
    write_json(output / "summary.json", summary)
    print_summary(summary, output)
    return summary


if __name__ == "__main__":
    parser = command_parser("benchmarks.demo.run", __doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for the runs and the summary")
    run(parser.parse_args().output, Sizes())

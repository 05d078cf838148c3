"""Overhead of the cost-aware policy where drafts do not pay, to half a percent, from texts decoded round by round.

    python -m benchmarks.decoding.policy_overhead --model smollm2 --prompts lskip/prompts/chat.jsonl --out result
    python -m benchmarks.decoding.policy_overhead --model runs/small --prompts FILE --drafts layers --out out

benchmarks.decoding.run times whole texts, whose ratios scatter by a tenth on a busy machine. Here the setting with the
fewest tokens so far runs the next round, so that all see the same conditions. Autoregressive decoding runs twice
(`control`). While a draft is in use its weights fill the caches, which overstates its gain by some percent. Passes over
prompts are left out. Writes overhead.json, a record for each setting and batch, and environment.json into --out.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.decoding.batches import batch_groups
from benchmarks.decoding.contestant_builder import load
from benchmarks.decoding.lskip_methods import Generators, Lskip, run_of
from benchmarks.decoding.measuring import Run
from benchmarks.decoding.options import number, numbers, words
from benchmarks.decoding.settings import DRAFTS, Grid
from benchmarks.environment import environment
from lskip.inference.decoding.batch import Batch
from lskip.inference.prompt_file import read_prompts
from lskip.inference.text import encode_prompt
from lskip.utils.output_files import write_json

METHODS = ("autoregressive", "control", "self_speculative")
KINDS = tuple(draft for draft in DRAFTS if draft != "adapter")
SETTING = ("method", "draft", "exit_layer", "batch")
console = Console(width=160)


class UnderWay:
    """A setting on a group of prompts, advanced round by round; the first round, over the prompts, is not timed."""

    def __init__(self, contestant: Lskip, prompts: list[list[int]], max_new_tokens: int):
        generator, arguments = contestant.generator, contestant.arguments
        lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": max_new_tokens}
        settings = generator.settings(**arguments, **lengths)
        self.requests = [generator.prepare(prompt, settings) for prompt in prompts]
        cells = max(map(len, prompts)) + max_new_tokens - 1
        self.batch = Batch(generator.runners, settings, len(prompts), cells, lambda: generator.costs)
        for request in self.requests:
            self.batch.add(request)
        self.batch.round()
        self.seconds = 0.0

    @property
    def tokens(self) -> int:
        return sum(len(request.generation.token_ids) for request in self.requests)

    def round(self) -> None:
        begin = time.perf_counter()
        self.batch.round()
        self.seconds += time.perf_counter() - begin

    def outcome(self) -> Run:
        return run_of([request.generation for request in self.requests], self.seconds)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        contents = [prompt.content for prompt in read_prompts(options.prompts)[: options.limit_prompts]]
        model, tokenizer = load(options.model, "float32", "cpu")
        prompts = [encode_prompt(content, tokenizer, None, model.config.vocab_size) for content in contents]
        generators = Generators(model)
        by_batch = [(size, contestants_of(options, generators, size)) for size in options.batch_sizes]
        options.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.decoding.policy_overhead: {error}") from error
    write_json(options.out / "environment.json", environment(torch.device("cpu")) | {"options": vars(options)})
    found = []
    for size, contestants in by_batch:
        found += compare(contestants, prompts, size, options)
        write_json(options.out / "overhead.json", found)
    print_records(found)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.decoding.policy_overhead", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="smollm2, a run, a folder, a .gguf file")
    add("--prompts", required=True, type=Path, help=".jsonl or .txt, as `lskip predict` takes it")
    add("--out", required=True, type=Path, help="folder for the results")
    add("--drafts", type=words, default=("int4",), help=f"default: int4; of {', '.join(KINDS)}")
    add("--exit_layers", type=numbers, default=(), help="of drafts by layers")
    add("--num_speculations", type=number, default=10, help="default: 10; tokens that a round drafts at most")
    add("--batch_sizes", type=numbers, default=(1,), help="default: 1")
    add("--max_new_tokens", type=number, default=100, help="default: 100; every text has exactly as many")
    add("--limit_prompts", type=number, default=8, help="default: 8")
    add("--repeats", type=number, default=4, help="default: 4")
    add("--threads", type=number, default=2)
    return parser.parse_args(arguments)


def contestants_of(options: argparse.Namespace, generators: Generators, size: int) -> list[Lskip]:
    """Autoregressive decoding, its control, and the policy with each draft, all in batches of `size`.

    Raises:
        ValueError: a draft that there is not, or that does not work here.
    """
    for draft in options.drafts:
        if draft not in KINDS:
            raise ValueError(f"drafts: {draft!r} is not one of {', '.join(KINDS)}")
        if draft.startswith("layers") and not options.exit_layers:
            raise ValueError(f"exit_layers: {draft!r} needs one at least")
    most = (options.num_speculations,)
    settings = Grid("float32", METHODS, options.drafts, ("cost_aware",), options.exit_layers, most).settings()
    return [Lskip(generators, replace(each, batch=size)) for each in settings if each.method in METHODS]


def compare(contestants: list[Lskip], prompts: list[list[int]], size: int, options: argparse.Namespace) -> list[dict]:
    """A record for each contestant, over as many groups of `size` prompts as the prompts fill, `repeats` times."""
    (filled,) = batch_groups(prompts, [size], 1)
    groups = [filled[first : first + size] for first in range(0, len(filled), size)] * options.repeats
    runs, rng = {contestant.setting: [] for contestant in contestants}, random.Random(0)
    for contestant in contestants:  # costs are measured, and all has run once
        contestant.run(groups[0], min(options.max_new_tokens, 8))
    for group in groups:
        under_way = {each.setting: UnderWay(each, group, options.max_new_tokens) for each in contestants}
        while left := [each for each in under_way.values() if each.batch.busy]:
            fewest = min(each.tokens for each in left)
            rng.choice([each for each in left if each.tokens == fewest]).round()
        for setting, run in under_way.items():
            runs[setting].append(run.outcome())
    base = next(each for setting, each in runs.items() if setting.method == "autoregressive")
    return [{name: getattr(setting, name) for name in SETTING} | gain(base, each) for setting, each in runs.items()]


def gain(base: list[Run], runs: list[Run]) -> dict:
    """How many times as fast as `base`: the geometric mean over groups, and its standard error."""
    gains = [math.log(before.seconds / run.seconds) for before, run in zip(base, runs, strict=True)]
    return {
        "over_autoregressive": math.exp(statistics.mean(gains)),
        "standard_error": statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None,
        "rounds": sum(run.rounds for run in runs),
        "drafted": sum(run.drafted for run in runs),
        "tokens": sum(run.tokens for run in runs),
        "mismatches": sum(run.texts != own.texts for own, run in zip(base, runs, strict=True)),
    }


def print_records(found: list[dict]) -> None:
    table = Table(*found[0])
    for record in found:
        shown = (f"{value:.3f}" if isinstance(value, float) else value for value in record.values())
        table.add_row(*("" if value is None else str(value) for value in shown))
    console.print(table)


if __name__ == "__main__":
    main(sys.argv[1:])

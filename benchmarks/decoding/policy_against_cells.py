"""The policy of `--draft auto` against every fixed draft, and against not drafting.

    python -m benchmarks.decoding.policy_against_cells --model runs/home_assistant --task HomeAssistant --out result
    python -m benchmarks.decoding.policy_against_cells --model smollm2 --prompts lskip/prompts/chat.jsonl --never_worse
        --batch_sizes 1,4,8 --out result

The best cell of the grid (what drafts, exit, number of tokens; not drafting among them) is chosen on the first half of
the prompts. On the other half it, the policy and not drafting decode every prompt in turns, in an order that changes,
until the policy has made `--tokens` tokens. The policy begins there with nothing learnt but the costs of passes. The
ratio is of all seconds, with a 95 % interval by bootstrap over prompts. `--never_worse` leaves the cells out. Not
drafting is a model without a rounded copy, in the layout that suits it best. Writes result.json into --out.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import count, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import command_parser
from benchmarks.decoding.options import number, numbers
from benchmarks.decoding.speed_ratio import in_words, speed_ratio
from benchmarks.environment import environment
from lskip.evaluation.tasks import embedded
from lskip.evaluation.tasks.prompts import prompts_of
from lskip.inference import CostAwareDraft, TextGenerator, load_generator
from lskip.inference.prompt_file import read_prompts
from lskip.utils.output_files import write_json

TASKS = ("HomeAssistant", "StdlibCode", "DocstringToCode", "PythonTopics", "HumanEval")
console = Console(width=160)


class Contestant(NamedTuple):
    """A name, a generator and the settings of its drafts."""

    name: str
    generator: TextGenerator
    settings: dict[str, Any]


class Group(NamedTuple):
    """Prompts that are decoded together, and the settings of their answers."""

    prompts: list
    settings: dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"options": vars(options), "environment": environment(torch.device("cpu")), "batches": []}
    try:
        for size in options.batch_sizes:
            result["batches"].append(compare_batch(options, size))
            options.out.mkdir(parents=True, exist_ok=True)
            write_json(options.out / "result.json", result)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.decoding.policy_against_cells: {error}") from error
    print_result(result["batches"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.decoding.policy_against_cells", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="smollm2, a run, a folder, a .gguf file")
    add("--prompts", type=Path, help=".jsonl or .txt, as `lskip predict` takes it")
    add("--task", choices=TASKS, help="in place of --prompts: its held-out examples")
    add("--out", required=True, type=Path, help="folder for result.json")
    add("--draft_weights", default="auto", help="auto (default), int8, int4 or none")
    add("--exit_layers", type=numbers, default=(1, 2, 3, 4, 6, 8), help="of the cells")
    add("--num_speculations", type=numbers, default=(1, 2, 3, 4, 5, 6, 8), help="of the cells")
    add("--batch_sizes", type=numbers, default=(1,))
    add("--max_new_tokens", type=number, default=60)
    add("--limit_prompts", type=number, default=40)
    add("--tokens", type=number, default=2000, help="that the policy makes at least")
    add("--never_worse", action="store_true", help="against not drafting alone")
    add("--threads", type=number, default=2)
    options = parser.parse_args(arguments)
    if (options.prompts is None) == (options.task is None):
        parser.error("name --prompts or --task")
    return options


def compare_batch(options: argparse.Namespace, size: int) -> dict[str, Any]:
    """Return the outcome at one batch size: the cells, and the policy's ratios to the best of them and to none."""
    weights = None if options.draft_weights == "none" else options.draft_weights
    shared = {"device": "cpu", "costs_file": None, "batch_size": size}  # nothing learnt by an earlier process
    plain, ours = (load_generator(options.model, draft_weights=name, **shared) for name in (None, weights))
    groups = groups_of(options, plain, size)
    chosen_on, compared_on = groups[: len(groups) // 2], groups[len(groups) // 2 :]
    none = Contestant("none", plain, {})
    cells = [none] if options.never_worse else [none, *cells_of(options, ours)]
    times = {each.name: sum(decode(each, group)[0] for group in chosen_on[:1]) for each in cells}  # all has run once
    if not options.never_worse:
        taken = [{each.name: decode(each, group)[0] for each in cells} for group in chosen_on]
        times = {each.name: sum(row[each.name] for row in taken) for each in cells}
    best = min(cells, key=lambda each: times[each.name])
    policy = CostAwareDraft()
    auto = Contestant("policy", ours, {"draft": "auto", "draft_policy": policy})
    _ = ours.costs
    rivals = [auto, none] if best == none else [auto, none, best]
    found = in_turns(rivals, compared_on, options.tokens)
    return {
        "batch": size,
        "draft_weights": ours.draft_weights,
        "cells": {name: times["none"] / seconds for name, seconds in times.items()},
        "best": best.name,
        "tokens": found["tokens"],
        "mismatches": found["mismatches"],
        "over_best": ratio(found["seconds"], best.name),
        "over_none": ratio(found["seconds"], "none"),
        "learnt": policy.summary(),
    }


def groups_of(options: argparse.Namespace, generator: TextGenerator, size: int) -> list[Group]:
    lengths = {"max_new_tokens": options.max_new_tokens}
    if options.task is None:
        prompts = [prompt.content for prompt in read_prompts(options.prompts)[: options.limit_prompts]]
        each = [Group([prompt], lengths) for prompt in prompts]
    else:
        task = getattr(embedded, options.task)(**lengths)
        found = prompts_of(task, generator, options.limit_prompts)
        each = [Group([prompt.ids], prompt.settings) for prompt in found]
    groups = [
        Group([prompt for one in each[first : first + size] for prompt in one.prompts], each[first].settings)
        for first in range(0, len(each) - size + 1, size)
    ]
    if len(groups) < 2:
        raise ValueError(f"limit_prompts: {len(each)} prompts do not make two batches of {size}")
    return groups


def cells_of(options: argparse.Namespace, generator: TextGenerator) -> list[Contestant]:
    """Return the grid: own exits, and where there is a rounded copy, its exits and its whole stack."""
    exits = [layer for layer in options.exit_layers if layer < generator.num_layers]
    drafts: list[dict[str, Any]] = [{"draft": "layers", "exit_layer": layer} for layer in exits]
    if generator.draft_weights:
        drafts += [{"draft": "weights", "exit_layer": layer} for layer in exits] + [{"draft": "weights"}]
    return [
        Contestant(
            f"{draft['draft']} {draft.get('exit_layer', generator.num_layers)} d={most}",
            generator,
            {**draft, "num_speculations": most},
        )
        for draft, most in product(drafts, options.num_speculations)
    ]


def decode(contestant: Contestant, group: Group) -> tuple[float, list[list[int]]]:
    """Return the seconds and the texts of a group."""
    settings = {**group.settings, **contestant.settings}
    begin = time.perf_counter()
    if len(group.prompts) == 1:
        texts = [contestant.generator.generate(group.prompts[0], **settings).token_ids]
    else:
        ended = contestant.generator.generate_batch(group.prompts, batch_size=len(group.prompts), **settings)
        texts = [generation.token_ids for _, generation in sorted(ended, key=lambda pair: pair[0])]
    return time.perf_counter() - begin, texts


def in_turns(rivals: list[Contestant], groups: list[Group], tokens: int) -> dict[str, Any]:
    """Decode the groups, again and again, until the first rival has made so many tokens.

    Returns:
        "seconds": by rival, of each group; "tokens"; "mismatches": texts that are not the second rival's.
    """
    seconds: dict[str, list[float]] = {each.name: [] for each in rivals}
    made = mismatches = 0
    for turn in count():
        for index, group in enumerate(groups):
            shift = (turn + index) % len(rivals)
            texts = {}
            for each in rivals[shift:] + rivals[:shift]:
                taken, texts[each.name] = decode(each, group)
                seconds[each.name].append(taken)
            made += sum(map(len, texts[rivals[0].name]))
            pairs = zip(texts[rivals[0].name], texts[rivals[1].name], strict=True)
            mismatches += sum(ours != plain for ours, plain in pairs)
        if made >= tokens:
            return {"seconds": seconds, "tokens": made, "mismatches": mismatches}


def ratio(seconds: dict[str, list[float]], rival: str) -> dict[str, float]:
    """Return how many times as fast as the rival the policy was, with a 95 % interval by bootstrap over groups."""
    return speed_ratio(seconds[rival], seconds["policy"])


def print_result(batches: list[dict[str, Any]]) -> None:
    table = Table(
        "batch", "copy", "best cell", "over none (first half)", "policy over best", "policy over none", "tokens"
    )
    for found in batches:
        over = map(in_words, ratios_of(found))
        best = found["best"]
        table.add_row(
            str(found["batch"]),
            found["draft_weights"] or "none",
            best,
            f"{found['cells'][best]:.2f}",
            *over,
            f"{found['tokens']}, {found['mismatches']} mismatches",
        )
    console.print(table)


def ratios_of(found: dict[str, Any]) -> list[dict[str, float]]:
    return [found["over_best"], found["over_none"]]


if __name__ == "__main__":
    main(sys.argv[1:])

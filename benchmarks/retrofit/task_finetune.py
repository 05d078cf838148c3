"""A LayerSkip fine-tune on a task beside the plain one, on held-out pairs of prompt and completion.

    python -m benchmarks.retrofit.task_finetune --layerskip runs/mine --plain runs/mine_plain --out result

Of each model: exact match of its greedy answers (last layer, autoregressive) on the test split that its config names;
draft_agreement of every exit along those answers; speed-up of self-speculation over its own autoregressive decoding,
interleaved item by item, answers as long as the model makes them; drafts choose among the tokens that `lskip fit` kept
with the run. The plain model's exits are not trained, so of it only drafts that leave it as it is are timed: the whole
stack rounded, n-grams, an exit adapter if it has one.

Writes into --out: task.json, environment.json, and answers_layerskip.jsonl and answers_plain.jsonl line by line.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from benchmarks.command_line import command_parser
from benchmarks.decoding.contestant_builder import load
from benchmarks.decoding.lskip_methods import Generators, Lskip, run_of
from benchmarks.decoding.measuring import Contestant, Measured, Run, measure, records
from benchmarks.decoding.options import fill_in, number, numbers, words
from benchmarks.decoding.report import print_records
from benchmarks.decoding.settings import Setting
from benchmarks.environment import environment
from benchmarks.retrofit.task_scores import compare, draft_agreement
from lskip.data import TextData
from lskip.inference import TextGenerator
from lskip.inference.layers.quantized import DRAFT_WEIGHTS
from lskip.inference.text import decode_text
from lskip.models.decoder import Decoder
from lskip.models.draft_tokens import find_draft_tokens
from lskip.models.encoding import open_ended
from lskip.models.exit_adapter import find_adapter, load_adapter
from lskip.utils.checks import check_choice
from lskip.utils.output_files import write_json

console = Console(width=190)
SPLIT = ("source", "text_column", "val_fraction", "test_fraction")  # what decides which pairs are held out
ADAPTIVE = ("any", *(f"{weights}+any" for weights in DRAFT_WEIGHTS))
TIMED = ("layers", *DRAFT_WEIGHTS, "ngram", "adapter", *ADAPTIVE)
SHARES = (1 / 6, 1 / 4, 1 / 3, 1 / 2)  # of the layers: where drafts exit when nothing is said
# --quick sets what was not named: it shows that everything runs; its times say nothing.
DEFAULTS = {
    "items": None,
    "agreement_items": 200,
    "timed_items": 40,
    "max_new_tokens": 64,
    "num_speculations": (3, 5, 8),
}
QUICK = {"items": 6, "agreement_items": 6, "timed_items": 1, "max_new_tokens": 8, "num_speculations": (2,)}


class Items(NamedTuple):
    """Held-out pairs, in the order of the hash of their content; those of one group are alike."""

    prompts: list[str]
    completions: list[str]
    groups: list[str]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        for draft in options.drafts:
            check_choice("drafts", draft, TIMED)
        items = held_out(options)
        options.out.mkdir(parents=True, exist_ok=True)
        result = run(options, items)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.retrofit.task_finetune: {error}") from error
    print_result(result)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.retrofit.task_finetune", __doc__)
    add = parser.add_argument
    add("--layerskip", required=True, type=Path, help="run folder of the fine-tune with LayerSkip")
    add("--plain", required=True, type=Path, help="run folder of the fine-tune without")
    add("--plain_adapter", help="folder of an exit adapter for the plain run, made by lskip adapt")
    add("--out", required=True, type=Path, help="folder for the results")
    add("--items", type=number, help="take this many of the test split; default: all")
    add("--agreement_items", type=number, help="read this many at every layer; default: 200")
    add("--timed_items", type=number, help="decode this many with every setting; default: 40")
    add("--exit_layers", type=numbers, help="default: a sixth, a quarter, a third and half of the model")
    add("--num_speculations", type=numbers, help="default: 3,5,8; CostAwareDraft gets the largest as its bound")
    add("--drafts", type=words, default=TIMED, help=f"what is timed, of {', '.join(TIMED)}; default: all that work")
    add("--max_new_tokens", type=number, help="default: 64; an answer that is longer is wrong")
    add("--batch_size", type=number, default=8, help="of the answers that are not timed")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--threads", type=number, default=2)
    add("--cache_dir", help="of the data; default: ~/.cache/lskip")
    add("--quick", action="store_true", help="as little as shows that it runs; its times say nothing")
    options = parser.parse_args(arguments)
    fill_in(options, QUICK if options.quick else DEFAULTS)
    return options


def held_out(options: argparse.Namespace) -> Items:
    """The test split of both runs.

    Raises:
        FileNotFoundError: a folder is no run.
        ValueError: the runs were trained on different splits, or nothing is held out.
    """
    split, other = split_settings(options.layerskip), split_settings(options.plain)
    if split != other:
        raise ValueError(f"plain: its data are {other}, those of the LayerSkip run {split}; they must be the same")
    pairs = TextData(**split, cache_dir=options.cache_dir).documents("test")[: options.items]
    if not pairs.get("completion"):
        raise ValueError(f"layerskip: the data of the run ({split}) hold out no pairs of prompt and completion")
    templates = {}
    if split["source"] == "home_assistant":
        from lskip.data.home_assistant import read_pairs  # needs packages that only this source needs

        templates = {pair["prompt"]: pair["group"] for pair in read_pairs()}
    groups = [templates.get(prompt, prompt) for prompt in pairs["prompt"]]
    return Items(pairs["prompt"], pairs["completion"], groups)


def split_settings(folder: Path) -> dict:
    config = folder / "config.yaml"
    if not config.is_file():
        raise FileNotFoundError(f"{folder}: is no run of lskip fit (it has no config.yaml)")
    arguments = yaml.safe_load(config.read_text())["data"]["init_args"]
    return {name: arguments[name] for name in SPLIT if name in arguments}


def run(options: argparse.Namespace, items: Items) -> dict:
    """Run everything; task.json is rewritten after each step."""
    folder = find_adapter(options.plain_adapter, "plain_adapter") if options.plain_adapter else None
    loaded = {name: load(str(getattr(options, name)), options.dtype, "cpu") for name in ("layerskip", "plain")}
    adapters = {"plain": load_adapter(folder, loaded["plain"][0])} if folder else {}
    result = {"items": len(items.prompts), "groups": len(set(items.groups)), "exact_match": {}}
    result |= {"draft_agreement": {}, "decoding": []}
    write_json(options.out / "environment.json", environment(torch.device("cpu")) | {"options": vars(options)})
    right = {}
    for name, (model, tokenizer) in loaded.items():
        adapter, prompts = adapters.get(name), open_ended(tokenizer, items.prompts)
        listed = find_draft_tokens(None, str(getattr(options, name)))
        tokens = None if listed is None else listed.ids(model.config.vocab_size, tokenizer)
        generators = Generators(model, exit_adapter=adapter, draft_tokens=tokens)
        settings = settings_of(options, model.config.num_hidden_layers, name == "layerskip", adapter is not None)
        autoregressive = generators.drafting_with(None)
        with (options.out / f"answers_{name}.jsonl").open("w") as file:
            texts, right[name] = answer(autoregressive, tokenizer, prompts, items, options, file)
        result["exact_match"][name] = sum(right[name]) / len(right[name])
        read = slice(options.agreement_items)
        result["draft_agreement"][name] = draft_agreement(
            Decoder(model), prompts[read], texts[read], options.batch_size
        )
        if len(right) == 2:
            result["difference"] = compare(right["layerskip"], right["plain"], items.groups)
        write_json(options.out / "task.json", result)
        groups = [[prompt] for prompt in prompts[: options.timed_items]]
        time_settings(generators, settings, groups, name, options, result)
    return result


def answer(
    generator: TextGenerator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    items: Items,
    options: argparse.Namespace,
    file,
) -> tuple[list[list[int]], list[bool]]:
    """(greedy answer of each prompt, whether it is its completion to the letter and ended); a line each to `file`."""
    texts, right = [[] for _ in prompts], [False] * len(prompts)
    arguments = {"temperature": 0.0, "max_new_tokens": options.max_new_tokens}
    ended = generator.generate_batch(prompts, batch_size=options.batch_size, **arguments)
    for index, generation in tqdm(ended, total=len(prompts), desc="Answers"):
        text = decode_text(tokenizer, generation.token_ids)
        texts[index] = generation.token_ids
        right[index] = generation.finish_reason == "eos" and text == items.completions[index]
        row = {name: getattr(items, f"{name}s")[index] for name in ("prompt", "completion", "group")}
        print(json.dumps(row | {"answer": text, "right": right[index]}), file=file, flush=True)
    return texts, right


class Answering(Lskip):
    """Texts end where the model ends them; the cost model's prediction is left out."""

    def run(self, prompts: list[list[int]], max_new_tokens: int) -> Run:
        begin = time.perf_counter()
        arguments = {**self.arguments, "max_new_tokens": max_new_tokens}
        generations = [self.generator.generate(prompt, **arguments) for prompt in prompts]
        return run_of(generations, time.perf_counter() - begin)


def settings_of(options: argparse.Namespace, num_layers: int, exits: bool, adapter: bool) -> list[Setting]:
    """Autoregressive decoding first; ValueError for an exit layer that is not below the last.

    Args:
        exits: whether the model's own exits draft too. adapter: whether it has one.
    """
    exit_layers = options.exit_layers or sorted({max(1, round(share * num_layers)) for share in SHARES})
    if max(exit_layers) >= num_layers:
        raise ValueError(f"exit_layers: {max(exit_layers)} is not from 1 to {num_layers - 1}, below the last layer")
    own = ("layers", *DRAFT_WEIGHTS) if exits else ()
    drafts = [(None, draft) for draft in (*DRAFT_WEIGHTS, "ngram", *ADAPTIVE)]
    drafts += [(exit_layer, draft) for exit_layer in exit_layers for draft in own]
    drafts += [(None, "adapter")] if adapter else []
    settings = [Setting("autoregressive", options.dtype)]
    for exit_layer, draft in drafts:
        chooses = draft in ADAPTIVE
        policy = "cost_aware" if chooses else "fixed"
        counts = options.num_speculations[-1:] if chooses else options.num_speculations
        if draft in options.drafts:
            settings += [
                Setting("self_speculative", options.dtype, exit_layer, draft, policy, count) for count in counts
            ]
    return settings


def time_settings(
    generators: Generators,
    settings: list[Setting],
    groups: list[list[list[int]]],
    name: str,
    options: argparse.Namespace,
    result: dict,
) -> None:
    """Add a record for each setting to `result`; `mismatches` are texts that are not the autoregressive ones."""
    contestants: list[Contestant] = []
    for setting in settings:
        try:
            contestants.append(Answering(generators, setting))
        except (ValueError, RuntimeError) as error:
            console.print(f"{setting} is left out: {error}")
    earlier, progress = result["decoding"], tqdm(total=len(groups), desc="Timed")

    def keep(measured: Measured) -> None:
        plain = measured.base("autoregressive", 1)
        reference = {tuple(group[0]): run.texts[0] for group, run in zip(measured.groups, plain, strict=False)}
        result["decoding"] = [*earlier, *records(measured, name, reference, options.dtype)]
        write_json(options.out / "task.json", result)
        progress.update()

    measure(contestants, groups, options.max_new_tokens, keep)
    progress.close()


def print_result(result: dict) -> None:
    names = list(result["exact_match"])
    table = Table(title=f"{result['items']} items of {result['groups']} groups", title_justify="left")
    for column in ("", *names):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("exact match", *(f"{result['exact_match'][name]:.3f}" for name in names))
    for layer, agreements in enumerate(zip(*result["draft_agreement"].values(), strict=True), start=1):
        table.add_row(f"draft_agreement, layer {layer}", *(f"{agreement:.3f}" for agreement in agreements))
    console.print(table)
    found = result["difference"]
    low, high = found["interval"]
    console.print(
        f"exact match, layerskip less plain: {found['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f} over"
        f" groups; right in one alone: {found['only_layerskip']} and {found['only_plain']},"
        f" McNemar p {found['mcnemar_p']:.3f}"
    )
    for name in names:
        print_records([record for record in result["decoding"] if record["model"] == name], console)


if __name__ == "__main__":
    main(sys.argv[1:])

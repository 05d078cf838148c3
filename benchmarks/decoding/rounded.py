"""A model held in 8 bits (`weights: int8`): its speed, its drafts, its memory, and what the rounding does to it.

    python -m benchmarks.decoding.rounded --model smollm2 --out result --llama_cpp_python peers/bin/python

Chat prompts, and prompts whose answers repeat them (edit, extract), decoded in turns in an order that changes, prompts
included: by the model in float32 and in 8 bits without drafts, in 8 bits with n-grams and with `--draft auto`, by
transformers' `generate`, and by llama.cpp on the same weights as Q8_0 where an interpreter has it. Ratios are of all
seconds, with a 95 % interval by bootstrap over prompts; texts with drafts are compared with those without. Perplexity
is that of the standard library's manual, in windows of 512 tokens. Writes result.json into --out.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.command_line import command_parser
from benchmarks.decoding.llama_cpp_peer import LlamaCppProcess, find_python, write_files
from benchmarks.decoding.options import number
from benchmarks.decoding.speed_ratio import in_words, speed_ratio
from benchmarks.environment import environment
from lskip.inference import TextGenerator
from lskip.inference.prompt_file import read_prompts
from lskip.inference.runners.rounded_model import round_to_int8
from lskip.inference.text import encode_prompt
from lskip.models.decoder import Decoder
from lskip.models.pretrained import load_model
from lskip.utils.output_files import write_json

CHAT = Path(__file__).parents[2] / "lskip" / "prompts" / "chat.jsonl"
ASKS = (
    "Rewrite this Python function with the name {new} in place of {old}, and change nothing else:\n\n{code}",
    "Copy the first three lines of this function:\n\n{code}",
    "Repeat this function and add a comment at its end:\n\n{code}",
)
CODE = '''def {name}(values, {key}):
    """Return the {key} of all values, or None where there are none."""
    total = 0
    for value in values:
        if value.{key} is not None:
            total += value.{key}
    return total if total else None'''
NAMES = ("sum_of_sizes", "find_total", "count_weights", "add_prices", "measure_lengths")
KEYS = ("size", "price", "weight", "length")
WINDOW = 512
console = Console(width=140)

Decode = Callable[[list[int]], list[int]]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    try:
        model, tokenizer = load_model(options.model)
        python = find_python(options.llama_cpp_python)
    except (ValueError, OSError) as error:
        raise SystemExit(f"benchmarks.decoding.rounded: {error}") from error
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = {"chat": chat_prompts(), "copying": copying_prompts()}
    ids = {
        kind: [encode_prompt(text, tokenizer, None, model.config.vocab_size) for text in texts[: options.limit_prompts]]
        for kind, texts in prompts.items()
    }
    result: dict[str, Any] = {"options": vars(options), "environment": environment(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as files:
        llama_cpp = None if python is None else LlamaCppProcess(python, options.out / "llama_cpp.log")
        if llama_cpp is not None:
            write_files(llama_cpp, options.model, model, Path(files))
        result["perplexity"] = perplexities(model, tokenizer, Path(files), options.tokens_scored)
        ways, result["bytes"] = ways_of(model, llama_cpp, Path(files), options.max_new_tokens)
        for kind, rows in ids.items():
            result[kind] = in_turns(ways, rows)
        if llama_cpp is not None:
            llama_cpp.close()
    write_json(options.out / "result.json", result)
    print_result(result, list(ids))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.decoding.rounded", __doc__)
    add = parser.add_argument
    add("--model", default="smollm2", help="a model with a chat template that weights int8 is for")
    add("--out", required=True, type=Path, help="folder for result.json")
    add("--llama_cpp_python", help="an interpreter that has llama_cpp")
    add("--max_new_tokens", type=number, default=60)
    add("--limit_prompts", type=number, default=40, help="of each kind")
    add("--tokens_scored", type=number, default=20000, help="for perplexity")
    add("--threads", type=number, default=2)
    return parser.parse_args(arguments)


def chat_prompts() -> list[str]:
    return [prompt.content for prompt in read_prompts(CHAT)]


def copying_prompts() -> list[str]:
    found = []
    for name in NAMES:
        for key in KEYS:
            code = CODE.format(name=name, key=key)
            found += [ask.format(code=code, old=name, new="collect") for ask in ASKS]
    random.Random(0).shuffle(found)
    return found


def ways_of(
    model: PreTrainedModel, llama_cpp: LlamaCppProcess | None, files: Path, tokens: int
) -> tuple[dict[str, Decode], dict[str, int]]:
    """Return functions from a prompt to an answer of so many tokens, and the bytes of lskip's weights."""
    whole = TextGenerator(model)
    lone, rounded = TextGenerator(model, weights="int8"), TextGenerator(model, weights="int8", draft_weights="auto")
    lengths = {"max_new_tokens": tokens, "min_new_tokens": tokens, "temperature": 0.0}

    def ours(generator: TextGenerator, **drafting) -> Decode:
        return lambda ids: generator.generate(ids, **lengths, **drafting).token_ids

    def theirs(ids: list[int]) -> list[int]:
        given = {"do_sample": False, "max_new_tokens": tokens, "min_new_tokens": tokens}
        with torch.inference_mode():
            return model.generate(torch.tensor([ids]), **given)[0, len(ids) :].tolist()

    ways = {
        "float32": ours(whole),
        "int8": ours(lone),
        "int8 ngram": ours(rounded, draft="ngram", num_speculations=4),
        "int8 auto": ours(rounded, draft="auto"),
        "generate": theirs,
    }
    if llama_cpp is not None:
        llama_cpp.load("q8", files / "Q8_0.gguf", 1024)
        asked = {"do": "generate", "name": "q8", "max_new_tokens": tokens}
        ways["llama.cpp Q8_0"] = lambda ids: llama_cpp.ask(ids=ids, **asked)["tokens"]
    plain = TextGenerator(model, weights="plain").memory()
    return ways, {"float32, plain": sum(plain.values()), "int8": sum(lone.memory().values())}


def in_turns(ways: dict[str, Decode], prompts: list[list[int]]) -> dict[str, Any]:
    """Decode every prompt in every way, and return seconds, ratios to "int8", and texts of drafts that differ."""
    names, seconds = list(ways), {name: [] for name in ways}
    mismatches = dict.fromkeys((name for name in ways if name.startswith("int8 ")), 0)
    for name in names:  # what is made on demand
        ways[name](prompts[0])
    for index, prompt in enumerate(prompts):
        shift, texts = index % len(names), {}
        for name in names[shift:] + names[:shift]:
            begin = time.perf_counter()
            texts[name] = ways[name](prompt)
            seconds[name].append(time.perf_counter() - begin)
        for name in mismatches:
            mismatches[name] += texts[name] != texts["int8"]
    tokens = len(prompts) * len(texts["int8"])
    return {
        "tokens_per_second": {name: tokens / sum(taken) for name, taken in seconds.items()},
        "over_int8": {name: speed_ratio(seconds["int8"], taken) for name, taken in seconds.items()},
        "mismatches": mismatches,
        "prompts": len(prompts),
    }


def perplexities(model: PreTrainedModel, tokenizer, files: Path, tokens: int) -> dict[str, float]:
    """Return the perplexity of the model, of the one rounded as int8 decodes it, and of llama.cpp's Q8_0 numbers."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(tokenizer(text)["input_ids"][:tokens])
    found = {"float32": perplexity(model, ids)}
    rounded = copy.deepcopy(model)
    round_to_int8(Decoder(rounded))
    found["int8"] = perplexity(rounded, ids)
    if (files / "Q8_0.gguf").exists():
        found["Q8_0"] = perplexity(load_model(str(files / "Q8_0.gguf"))[0], ids)
    return found


@torch.inference_mode()
def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    losses = [model(part[None], labels=part[None]).loss.item() for part in ids.split(WINDOW) if len(part) == WINDOW]
    return math.exp(sum(losses) / len(losses))


def print_result(result: dict[str, Any], kinds: list[str]) -> None:
    table = Table("prompts", "way", "tokens/s", "over int8 without drafts", "texts that differ")
    for kind in kinds:
        found = result[kind]
        for name, each in found["over_int8"].items():
            speed = f"{found['tokens_per_second'][name]:.1f}"
            table.add_row(kind, name, speed, in_words(each), str(found["mismatches"].get(name, "")))
    console.print(table)
    console.print("perplexity", {name: round(value, 4) for name, value in result["perplexity"].items()})
    console.print("bytes", result["bytes"])


if __name__ == "__main__":
    main(sys.argv[1:])

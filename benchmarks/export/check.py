"""Check of `lskip export`: greedy texts of the exported model in transformers and llama.cpp equal lskip's.

    python -m benchmarks.export.check --model runs/home_assistant --draft 8 --prompts prompts.jsonl --out result

Exports the model, its first blocks as a draft model, and both as GGUF, into --out/exported, and answers every prompt:
the model by lskip, by transformers alone, with the draft as `assistant_model` and with `assistant_early_exit`, and by
llama.cpp (if an interpreter has llama_cpp); the draft by all three alone. Prints how many texts are equal. For each
other text it prints the gap between the two highest logits at the first token that differs: programs sum in different
orders, so that a gap within rounding may fall either way. The exit code is 1 for a wider gap.

Writes into --out: exported/ and export.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.command_line import command_parser
from benchmarks.decoding.llama_cpp_peer import LlamaCppProcess, find_python
from benchmarks.decoding.options import number
from lskip.export.to_hf import DRAFT_FOLDER, GGUF_FILE, export
from lskip.inference import load_generator
from lskip.inference.prompt_file import read_prompts
from lskip.inference.text import encode_prompt
from lskip.models.pretrained import load_tokenizer
from lskip.utils.output_files import write_json

ROUNDING = 1e-3  # of logits in float32, over models of some tens of layers
console = Console(width=120)


class Texts(NamedTuple):
    """What a program says to each prompt, as token ids."""

    program: str
    tokens: list[list[int]]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        result = run(options)
    except (ValueError, OSError, RuntimeError) as error:
        raise SystemExit(f"benchmarks.export.check: {error}") from error
    print_result(result)
    return int(any(row["gap"] > ROUNDING for part in result["parts"].values() for row in part["parted"]))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_parser("benchmarks.export.check", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="a run folder, a checkpoint, a folder, a .gguf file, smollm2; Llama family")
    add("--draft", required=True, type=number, help="blocks of the draft model")
    add("--prompts", required=True, type=Path, help=".txt or .jsonl, as for lskip predict")
    add("--out", required=True, type=Path, help="folder for the export and the result; exported/ must not be there")
    add("--limit_prompts", type=number, default=20)
    add("--max_new_tokens", type=number, default=40)
    add("--chat", action=argparse.BooleanOptionalAction, help="put prompts into the chat template; default: if any")
    add("--llama_cpp_python", help="interpreter that has llama_cpp; default: this one, if it has")
    add("--threads", type=number, default=2)
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict:
    torch.set_num_threads(options.threads)
    contents = [prompt.content for prompt in read_prompts(options.prompts)[: options.limit_prompts]]
    python = find_python(options.llama_cpp_python)
    whole = options.out / "exported"
    export(options.model, str(whole), draft=options.draft, gguf=True)
    tokenizer = load_tokenizer(str(whole))
    model = AutoModelForCausalLM.from_pretrained(whole, trust_remote_code=False).eval()
    draft = AutoModelForCausalLM.from_pretrained(whole / DRAFT_FOLDER, trust_remote_code=False).eval()
    prompts = [encode_prompt(content, tokenizer, options.chat, model.config.vocab_size) for content in contents]
    ways = {"": {}, " with assistant_model": {"assistant_model": draft}}
    ways[" with assistant_early_exit"] = {"assistant_early_exit": options.draft}
    result = {"prompts": len(prompts), "max_new_tokens": options.max_new_tokens, "llama_cpp": None, "parts": {}}
    for name, folder, loaded in (("model", whole, model), ("draft", whole / DRAFT_FOLDER, draft)):
        drafting = ways if name == "model" else {"": {}}
        others = [
            Texts(f"transformers{way}", by_transformers(loaded, prompts, options.max_new_tokens, settings))
            for way, settings in drafting.items()
        ]
        if python is not None:
            version, tokens = by_llama_cpp(python, folder / GGUF_FILE, prompts, options)
            others.append(Texts("llama.cpp", tokens))
            result["llama_cpp"] = version
        own = Texts("lskip", by_lskip(folder, prompts, options.max_new_tokens))
        result["parts"][name] = compared(own, others, loaded, prompts)
        write_json(options.out / "export.json", result)
    return result


def by_lskip(folder: Path, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    generator = load_generator(str(folder))
    return [generator.generate(prompt, max_new_tokens=max_new_tokens).token_ids for prompt in tqdm(prompts, "lskip")]


@torch.inference_mode()
def by_transformers(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int, drafting: dict) -> list:
    texts = []
    for prompt in tqdm(prompts, " ".join(["transformers", *drafting])):
        ids = torch.tensor([prompt])
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 0, **drafting}
        texts.append(model.generate(ids, max_new_tokens=max_new_tokens, **settings)[0, len(prompt) :].tolist())
    return texts


def by_llama_cpp(python: str, file: Path, prompts: list[list[int]], options: argparse.Namespace) -> tuple[str, list]:
    """(its version, its texts)."""
    process = LlamaCppProcess(python, options.out / "llama_cpp.log")
    try:
        process.load("", file, max(map(len, prompts)) + options.max_new_tokens)
        ask = {"do": "generate", "name": "", "max_new_tokens": options.max_new_tokens}
        return process.version, [process.ask(ids=prompt, **ask)["tokens"] for prompt in tqdm(prompts, "llama.cpp")]
    finally:
        process.close()


def compared(own: Texts, others: list[Texts], model: PreTrainedModel, prompts: list[list[int]]) -> dict:
    """How many texts of each program are `own`'s, and those that are not."""
    part = {"tokens": sum(map(len, own.tokens)), "equal": {}, "parted": []}
    for other in others:
        equal = 0
        for index, (ours, theirs) in enumerate(zip(own.tokens, other.tokens, strict=True)):
            # llama.cpp does not stop at the end of a text
            at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            if at is None and len(theirs) >= len(ours):
                equal += 1
                continue
            at = min(len(ours), len(theirs)) if at is None else at
            gap = top_gap(model, prompts[index] + ours[:at])
            part["parted"].append({"program": other.program, "prompt": index, "token": at, "gap": gap})
        part["equal"][other.program] = equal
    return part


@torch.inference_mode()
def top_gap(model: PreTrainedModel, ids: list[int]) -> float:
    """The highest logit of the next token less the second."""
    first, second = model(torch.tensor([ids])).logits[0, -1].topk(2).values.tolist()
    return first - second


def print_result(result: dict) -> None:
    title = f"Texts equal to lskip's, of {result['prompts']} (up to {result['max_new_tokens']} tokens, greedy)"
    table = Table(title=title, title_justify="left")
    for column in ("", "program", "equal"):
        table.add_column(column)
    for name, part in result["parts"].items():
        for program, equal in part["equal"].items():
            table.add_row(name, program, str(equal))
    console.print(table)
    for name, part in result["parts"].items():
        for row in part["parted"]:
            console.print(
                f"{name}, {row['program']}: prompt {row['prompt']} parts at token {row['token']}, where the two"
                f" highest logits are {row['gap']:.2g} apart"
            )


if __name__ == "__main__":
    sys.exit(main())

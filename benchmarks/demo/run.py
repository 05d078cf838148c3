"""`make demo`: LayerSkip from scratch on this machine, and a real model beside transformers' `generate`.

    python -m benchmarks.demo.run [--output DIR]

1. Trains configs/quickstart.yaml on the standard library's source, shows every layer before and after, and
   decodes held-out functions, autoregressive and self-speculative, interleaved.
2. Shows every layer of stock SmolLM2-135M-Instruct on held-out text, and answers ten chat prompts by lskip and by
   transformers' `generate`, interleaved.

Ends with a summary, also in <output>/summary.json.
"""

from __future__ import annotations

import ast
import json
import shutil
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM

from benchmarks.command_line import command_parser
from benchmarks.demo.report import acceptance, console, distinct_3grams, print_summary, show, speedup
from benchmarks.environment import environment
from lskip.cli import main as lskip
from lskip.data import TextData
from lskip.inference import Generation, TextGenerator
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import find_adapter, load_adapter
from lskip.models.pretrained import load_model
from lskip.models.readout import read_exits, report_layers
from lskip.utils.output_files import write_json

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


@dataclass(frozen=True)
class Sizes:
    """How much of everything: the demo's own by default, far less in its test.

    Attributes:
        fit: further arguments for `lskip fit`.
        prompts: how many prompts each model continues.
        new_tokens: tokens a prompt.
        blocks: blocks of held-out text in each layer table.
        exit_layer, num_speculations: how the trained model drafts.
        smollm2_drafts: (what drafts for SmolLM2, which has not learned to exit; how many tokens at a time).
    """

    fit: tuple[str, ...] = ()
    prompts: int = 10
    new_tokens: int = 100
    blocks: int = 16
    exit_layer: int = 2
    num_speculations: int = 2
    smollm2_drafts: tuple[tuple[str, int], ...] = (("int8", 5), ("int4", 16), ("adapter", 2))


def run(output: Path, sizes: Sizes) -> dict:
    """Both parts; writes summary.json and the figures under `output`, and returns the summary."""
    output.mkdir(parents=True, exist_ok=True)
    summary = {
        "environment": environment(torch.device("cpu")),
        "scratch": scratch(output, sizes),
        "smollm2": smollm2(output, sizes),
    }
    write_json(output / "summary.json", summary)
    print_summary(summary, output)
    return summary


# Part 1: from scratch.


def scratch(output: Path, sizes: Sizes) -> dict:
    run_folder = output / "scratch"
    shutil.rmtree(run_folder, ignore_errors=True)
    console.rule("1. LayerSkip from scratch on the standard library's source")
    started = time.perf_counter()
    lskip(["fit", "--config", str(QUICKSTART), "--run_folder", str(run_folder), *sizes.fit])
    fit_seconds = time.perf_counter() - started
    model, tokenizer = load_model(str(run_folder))
    held_out = held_out_data(tokenizer)
    blocks = [batch["input_ids"] for batch, _ in zip(held_out.val_dataloader(), range(sizes.blocks), strict=False)]
    reports = {
        "before training": report_layers(Decoder(AutoModelForCausalLM.from_config(model.config)), blocks),
        "after training": report_layers(Decoder(model), blocks),
    }
    show(reports, output / "scratch_layers.png")
    prompts = held_out_functions(held_out, tokenizer, sizes.prompts)
    return {
        "layers": reports["after training"].layers(),
        "layers_needed": reports["after training"].layers_needed,
        "unigram_perplexity": held_out.unigram_perplexity(),
        "fit_seconds": fit_seconds,
        **speculation(model, tokenizer, prompts, sizes),
    }


def held_out_data(tokenizer) -> TextData:
    data = TextData(tokenizer=tokenizer, block_size=128, batch_size=8)
    data.prepare_data()
    data.setup("validate")
    return data


def held_out_functions(data: TextData, tokenizer, count: int) -> list[list[int]]:
    """The first 32 tokens of functions that training has not seen."""
    prompts = []
    for document in data.documents("val"):
        for node in ast.walk(ast.parse(document["text"])):
            if isinstance(node, ast.FunctionDef) and ast.get_docstring(node):
                ids = tokenizer(ast.get_source_segment(document["text"], node))["input_ids"]
                if len(ids) >= 64:
                    prompts.append(ids[:32])
                    break
        if len(prompts) == count:
            break
    return prompts


def speculation(model, tokenizer, prompts: list[list[int]], sizes: Sizes) -> dict:
    """Autoregressive and self-speculative decoding of the same prompts, turn by turn."""
    generator = TextGenerator(model, tokenizer)
    length = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens}
    speculative = {"exit_layer": sizes.exit_layer, "num_speculations": sizes.num_speculations}
    plain, drafted = [], []
    for prompt in [prompts[0], *prompts]:  # the first is a warm-up
        plain.append(generator.generate(prompt, temperature=0.0, **length))
        drafted.append(generator.generate(prompt, temperature=0.0, **length, **speculative))
    plain, drafted = plain[1:], drafted[1:]
    return {
        **speculative,
        "mismatches": sum(a.token_ids != b.token_ids for a, b in zip(plain, drafted, strict=True)),
        "draft_agreement": draft_agreement(Decoder(model), prompts, plain, sizes.exit_layer),
        **acceptance(drafted),
        "distinct_3grams": distinct_3grams([run.token_ids for run in plain]),
        "speedup": speedup([run.seconds for run in plain], drafted),
    }


@torch.inference_mode()
def draft_agreement(decoder: Decoder, prompts: list[list[int]], runs: list[Generation], exit_layer: int) -> float:
    """How often the exit's most probable token is the model's own next token on its own greedy text."""
    agreed = []
    for prompt, answer in zip(prompts, runs, strict=True):
        ids = torch.tensor([prompt + answer.token_ids])
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        predictions = read_exits(decoder, ids, labels, [exit_layer]).predictions[0]
        agreed.append((predictions == torch.tensor(answer.token_ids)).double().mean().item())
    return statistics.mean(agreed)


# Part 2: a real model.


def smollm2(output: Path, sizes: Sizes) -> dict:
    console.rule("2. SmolLM2-135M-Instruct, as its authors trained it")
    model, tokenizer = load_model("smollm2")
    report = report_layers(Decoder(model), topic_blocks(tokenizer, sizes.blocks // 2))
    show({"SmolLM2-135M-Instruct": report}, output / "smollm2_layers.png")
    return {
        "layers": report.layers(),
        "layers_needed": report.layers_needed,
        **answers(model, tokenizer, sizes),
    }


def answers(model, tokenizer, sizes: Sizes) -> dict:
    """Chat prompts answered by lskip, without and with each draft, and by transformers `generate`, turn by turn."""
    generators = {None: TextGenerator(model, tokenizer)} | drafting(model, tokenizer, dict(sizes.smollm2_drafts))
    length = {"max_new_tokens": sizes.new_tokens, "min_new_tokens": sizes.new_tokens}
    settings = {None: 0} | {draft: count for draft, count in sizes.smollm2_drafts if draft in generators}
    runs, reference, seconds = {draft: [] for draft in settings}, [], []
    prompts = chat_prompts()[: sizes.prompts]
    for prompt in [prompts[0], *prompts]:  # the first is a warm-up
        for draft, number in settings.items():
            generation = generators[draft].generate(prompt, temperature=0.0, num_speculations=number, **length)
            runs[draft].append(generation)
        tokens, taken = generate_with_transformers(model, tokenizer, prompt, length)
        reference.append(tokens)
        seconds.append(taken)
    reference, seconds = reference[1:], seconds[1:]
    runs = {draft: every[1:] for draft, every in runs.items()}
    plain = runs.pop(None)
    return {
        "weights": {draft or "autoregressive": generators[draft].runner.layout for draft in settings},
        "tokens": sum(map(len, reference)),
        "distinct_3grams": distinct_3grams(reference),
        "generate_tokens_per_second": statistics.median(len(a) / s for a, s in zip(reference, seconds, strict=True)),
        "autoregressive_over_generate": speedup(seconds, plain),
        "mismatches": mismatches(reference, plain),
        "drafts": {
            draft: {
                "num_speculations": settings[draft],
                "mismatches": mismatches(reference, drafted),
                **acceptance(drafted),
                "speedup_over_autoregressive": speedup([run.seconds for run in plain], drafted),
                "speedup_over_generate": speedup(seconds, drafted),
            }
            for draft, drafted in runs.items()
        },
    }


def drafting(model, tokenizer, drafts: Iterable[str]) -> dict[str, TextGenerator]:
    """A generator for each of `drafts` whose kernels this machine has."""
    generators = {}
    for draft in drafts:
        adapter = load_adapter(find_adapter("smollm2"), model) if draft == "adapter" else None
        weights = draft if adapter is None else None
        try:
            generators[draft] = TextGenerator(model, tokenizer, draft_weights=weights, exit_adapter=adapter)
        except ValueError as error:
            console.print(f"without {draft}: {error}")
    return generators


def mismatches(reference: list[list[int]], runs: list[Generation]) -> int:
    return sum(tokens != run.token_ids for tokens, run in zip(reference, runs, strict=True))


def topic_blocks(tokenizer, count: int) -> list[torch.Tensor]:
    """Prose that ships with Python and that the model can read: the language topics, `count` blocks of 512 tokens."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * 512]
    return list(torch.tensor(ids).view(-1, 1, 512))


def chat_prompts() -> list[str]:
    lines = files("lskip.prompts").joinpath("chat.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["prompt"] for line in lines]


@torch.inference_mode()
def generate_with_transformers(model, tokenizer, prompt: str, length: dict) -> tuple[list[int], float]:
    chat = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    started = time.perf_counter()
    output = model.generate(**inputs, **length, do_sample=False)
    seconds = time.perf_counter() - started
    return output[0, inputs["input_ids"].shape[1] :].tolist(), seconds


if __name__ == "__main__":
    parser = command_parser("benchmarks.demo.run", __doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for the run and the summary")
    run(parser.parse_args().output, Sizes())

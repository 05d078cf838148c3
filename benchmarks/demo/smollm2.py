"""Part 2 of the demo: a real model, which was never trained to exit."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

import torch

from benchmarks.demo.report import acceptance, console, distinct_3grams, speedup
from benchmarks.demo.sizes import Sizes
from lskip.evaluation.layers.figure import perplexity_figure, print_layers
from lskip.inference import Generation, TextGenerator
from lskip.models.decoder import Decoder
from lskip.models.exit_adapter import find_adapter, load_adapter
from lskip.models.pretrained import load_model
from lskip.models.readout import report_layers


def run_smollm2(output: Path, sizes: Sizes) -> dict:
    console.rule("2. SmolLM2-135M-Instruct, as its authors trained it")
    model, tokenizer = load_model("smollm2")
    report = report_layers(Decoder(model), topic_blocks(tokenizer, sizes.blocks))
    print_layers(report, console, "SmolLM2-135M-Instruct")
    perplexity_figure({"SmolLM2-135M-Instruct": report}).savefig(output / "smollm2_layers.png", dpi=120)
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

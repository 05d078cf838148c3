"""Part 1 of the demo: LayerSkip for a task, from scratch, beside a plain model of a few blocks."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from benchmarks.demo.decoding import compare_decoding
from benchmarks.demo.report import console, print_exits, print_parses, print_rounds
from benchmarks.demo.sizes import Sizes
from benchmarks.retrofit.task_scores import draft_agreement
from lskip.cli import main as lskip
from lskip.evaluation.sweep.tuned import DECODING, read_tuned, tuned_path
from lskip.evaluation.tasks.embedded import HomeAssistant
from lskip.evaluation.tasks.prompts import Prompt, prompts_of, texts_in_order
from lskip.evaluation.tasks.scores import score
from lskip.inference import Generation, TextGenerator
from lskip.inference.text import decode_text
from lskip.models.decoder import Decoder
from lskip.models.pretrained import load_model
from lskip.models.readout import read_exits, settled_depth

KINDS = ("sentences", "templates")  # what of a held-out request training has not seen
BATCH_SIZE = 32  # of answers that are not timed


class Trained(NamedTuple):
    """A model that the demo trained, and how long that took."""

    model: PreTrainedModel
    generator: TextGenerator
    seconds: float

    def summary(self) -> dict[str, Any]:
        """Its size and its training."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"num_layers": self.generator.num_layers, "parameters": parameters, "fit_seconds": self.seconds}


def run_task(output: Path, sizes: Sizes) -> dict:
    """Train both models, read every exit, decode held-out requests in every way; return the summary."""
    console.rule("1. LayerSkip from scratch on a task: what is said to a smart home, its intent and slots")
    ours = train(output / "task", sizes.fit)
    console.rule(f"A plain model of {sizes.small_blocks} blocks")
    plain = (f"--model.num_hidden_layers={sizes.small_blocks}", "--layer_dropout=null", "--early_exit_loss=null")
    small = train(output / "task_small", (*sizes.fit, *plain))
    console.rule("Held-out requests")
    held_out = {kind: prompts_of(HomeAssistant(unseen=kind), ours.generator, sizes.items) for kind in KINDS}
    exits = rate_exits(ours, held_out)
    print_exits(exits)
    draft_weights, settings = find_settings(output / "task", sizes)
    drafting = TextGenerator(ours.model, ours.generator.tokenizer, draft_weights=draft_weights)
    untouched = held_out["sentences"], held_out["templates"][sizes.tune_prompts :]  # the first were tuned on
    requests = [prompt for prompts in untouched for prompt in prompts[: sizes.requests]]
    found = compare_decoding((ours.model, ours.generator), (drafting, settings), small.generator, requests, sizes)
    every = slice(None, None, max(1, len(requests) // sizes.shown))
    print_parses(requests[every], found.drafted[every])
    walk_through(ours, requests, found.drafted)
    return {
        **ours.summary(),
        "exits": exits,
        "exact_match_sentences": exits[-1]["exact_match"],
        "exact_match_templates": exits[-1]["exact_match_templates"],
        "draft_weights": draft_weights,
        **found.summary(),
        "plain_small_model": {
            **small.summary(),
            **{f"exact_match_{kind}": exact_match(small.generator, kind, held_out[kind]) for kind in KINDS},
            "tokens_per_second": found.tokens_per_second("small"),
        },
    }


def train(folder: Path, arguments: tuple[str, ...]) -> Trained:
    shutil.rmtree(folder, ignore_errors=True)
    began = time.perf_counter()
    command("fit", "--config", "quickstart", "--run_folder", str(folder), *arguments)
    seconds = time.perf_counter() - began
    model, tokenizer = load_model(str(folder))
    return Trained(model, TextGenerator(model, tokenizer), seconds)


def command(*arguments: str) -> None:
    """Run a command of lskip; SystemExit if it fails."""
    if lskip(list(arguments)):
        raise SystemExit(f"benchmarks.demo.run: lskip {arguments[0]} failed; it says why above")


def find_settings(folder: Path, sizes: Sizes) -> tuple[str | None, dict[str, Any]]:
    """The rounded weights, draft, exit and length that `lskip tune` finds; no draft where it finds that none pays."""
    task = ("--task", "HomeAssistant")  # held-out templates: an exit that drafts these well drafts sentences well
    effort = ("--num_prompts", str(sizes.tune_prompts), "--decoded_cells", str(sizes.tuned_cells))
    command("tune", "--model", str(folder), *task, *effort)
    found = read_tuned(tuned_path(str(folder)))["HomeAssistant"]
    return found["draft_weights"], {name: found[name] for name in DECODING}


# Exact match and agreement.


def rate_exits(ours: Trained, held_out: dict[str, list[Prompt]]) -> list[dict[str, Any]]:
    """By layer: exact match where texts end there, of both kinds, and agreement along the last layer's texts."""
    prompts, last = held_out["sentences"], ours.generator.num_layers
    answers = texts_in_order(ours.generator, prompts, BATCH_SIZE)
    agreement = draft_agreement(Decoder(ours.model), [prompt.ids for prompt in prompts], answers, BATCH_SIZE)
    return [
        {
            "layer": layer,
            "exact_match": exact_match(ours.generator, "sentences", prompts, exit_layer=layer),
            "exact_match_templates": exact_match(ours.generator, "templates", held_out["templates"], exit_layer=layer),
            "agreement": agreement[layer - 1],
        }
        for layer in range(1, last + 1)
    ]


def exact_match(generator: TextGenerator, kind: str, prompts: list[Prompt], **settings) -> float:
    answers = texts_in_order(generator, prompts, BATCH_SIZE, **settings)
    texts = [decode_text(generator.tokenizer, answer) for answer in answers]
    return score(HomeAssistant(unseen=kind), [prompt.example for prompt in prompts], texts)["exact_match"]


# One request, token by token.


def walk_through(ours: Trained, requests: list[Prompt], drafted: list[Generation]) -> None:
    """Show one request: where a draft was corrected if there is one, else the first."""
    corrected = [number for number, text in enumerate(drafted) if 0 < text.accepted < text.drafted]
    number = corrected[0] if corrected else 0
    settled = settled_layers(Decoder(ours.model), requests[number].ids, drafted[number].token_ids)
    print_rounds(requests[number], drafted[number], settled, ours.generator.tokenizer)


@torch.inference_mode()
def settled_layers(decoder: Decoder, prompt: list[int], answer: list[int]) -> list[int]:
    """For each token of an answer: the first layer from which on every layer's argmax is the last layer's."""
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    predictions = read_exits(decoder, ids, labels, range(1, decoder.num_layers + 1)).predictions
    return settled_depth(predictions == predictions[-1]).tolist()

"""Question g: every exit of one model on a task with few answers and on open generation, over the same items."""

from __future__ import annotations

from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import torch

from benchmarks.claims.arms import Sizes
from benchmarks.claims.training import make_data
from lskip.inference import TextGenerator
from lskip.models.decoder import Decoder
from lskip.models.pretrained import load_model
from lskip.models.readout import read_exits
from lskip.utils.output_files import write_json

CHOICES = 4


def measure_tasks(folder: Path, model_folder: Path, sizes: Sizes, seed: int, cache_dir: str | None) -> None:
    """Write tasks.json, unless it exists.

    multiple_choice: share of items whose own continuation has the highest likelihood among CHOICES held-out ones of
    equal length (chance 1 / CHOICES). open_generation: similarity (difflib's ratio, over tokens) of the exit's greedy
    continuation with the text's own; chance is its similarity with another item's continuation.
    """
    if (folder / "tasks.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    model, _ = load_model(str(model_folder))
    rows = make_data(sizes, 0, cache_dir).blocks("val")[: sizes.items]["input_ids"]
    prompts = torch.from_numpy(rows[:, : sizes.prompt_tokens])
    answers = torch.from_numpy(rows[:, sizes.prompt_tokens : sizes.prompt_tokens + sizes.answer_tokens])
    open_ended = [open_generation(model, prompts, answers, layer) for layer in range(1, sizes.layers + 1)]
    write_json(
        folder / "tasks.json",
        {
            "multiple_choice": multiple_choice(Decoder(model.eval()), prompts, answers, seed),
            "multiple_choice_chance": 1 / CHOICES,
            "open_generation": [own for own, _ in open_ended],
            "open_generation_chance": [other for _, other in open_ended],
        },
    )


@torch.inference_mode()
def multiple_choice(decoder: Decoder, prompts: torch.Tensor, answers: torch.Tensor, seed: int) -> list[float]:
    """Accuracy of every exit, all of them read in one pass. prompts [N, P], answers [N, A] -> [layers]."""
    random, count = np.random.default_rng(seed), len(prompts)
    right = torch.zeros(decoder.num_layers)
    for item in range(count):
        others = random.choice(np.delete(np.arange(count), item), CHOICES - 1, replace=False)
        options = answers[[item, *others.tolist()]]  # the right one first
        ids = torch.cat([prompts[item].expand(CHOICES, -1), options], 1)
        labels = torch.cat([torch.full((CHOICES, prompts.shape[1]), -100), options], 1)
        losses = read_exits(decoder, ids, labels, range(1, decoder.num_layers + 1)).losses
        right += losses.unflatten(1, (CHOICES, -1)).sum(-1).argmin(1) == 0
    return (right / count).tolist()


def open_generation(model, prompts: torch.Tensor, answers: torch.Tensor, exit_layer: int) -> tuple[float, float]:
    """Mean similarity of the exit's greedy texts with (their own, the next item's) continuation."""
    generator, length = TextGenerator(model), answers.shape[1]
    settings = {"temperature": 0.0, "max_new_tokens": length, "min_new_tokens": length}
    if exit_layer < model.config.num_hidden_layers:
        settings["exit_layer"] = exit_layer
    texts = dict(generator.generate_batch(prompts.tolist(), batch_size=16, **settings))
    continuations = answers.tolist()
    own = [similarity(texts[i].token_ids, continuation) for i, continuation in enumerate(continuations)]
    others = [similarity(texts[i].token_ids, continuations[i - 1]) for i in range(len(continuations))]
    return float(np.mean(own)), float(np.mean(others))


def similarity(tokens: list[int], expected: list[int]) -> float:
    return SequenceMatcher(None, tokens, expected, autojunk=False).ratio()

"""Scores of a trained arm: quality at each exit and criterion, and the mean number of layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from benchmarks.predecessors.arms import Arm, Sizes
from lskip.inference import TextGenerator
from lskip.inference.decoding.early_exit import exit_round
from lskip.inference.drafting.round import Slots
from lskip.inference.exit_criteria import ExitCriterion, bound
from lskip.inference.runners.base import ModelRunner
from lskip.models.exit_heads import TrainedExits
from lskip.models.readout import read_exits
from lskip.module import LayerSkipModule
from lskip.task_module import TaskModule

DRAFT_LENGTHS = (2, 4)
PROMPTS = 6  # that drafts are tried on


def point(criterion: str, threshold: float | None, mean_layers: float, **quality: float) -> dict:
    return {"criterion": criterion, "threshold": threshold, "mean_layers": mean_layers, **quality}


class Given:
    """A Chooser that takes the given text's next token, and records the loss and hit of each prediction."""

    logprobs = False

    def __init__(self, texts: Tensor):
        """Take the tokens of `texts` [A, n], which follow the context."""
        self.texts, self.losses, self.hits = texts, [], []

    def verify(self, logits: Tensor, drafted: Tensor) -> tuple[Tensor, Tensor]:
        own = self.texts[:, len(self.losses)]
        self.losses.append(torch.nn.functional.cross_entropy(logits[:, 0].float(), own, reduction="none"))
        self.hits.append(logits[:, 0].argmax(-1) == own)
        return torch.zeros_like(own), own

    def quality(self) -> dict[str, float]:
        losses, hits = torch.stack(self.losses), torch.stack(self.hits)
        return {"perplexity": math.exp(losses.mean()), "accuracy": hits.float().mean().item()}


@torch.inference_mode()
def follow(
    runner: ModelRunner, exits: TrainedExits | None, texts: Tensor, context: int, criterion: ExitCriterion
) -> tuple[dict[str, float], float]:
    """Decode given texts [A, context + n] token by token, each at the exit that the criterion takes.

    As in early exit without verification: the context goes through all blocks, and a token that exits leaves keys and
    values made of its exit state above. Returns the quality of n predictions a text, and the mean layers.
    """
    full, chooser, depths = runner.num_layers, Given(texts[:, context:]), []
    cache, starts = runner.new_cache(len(texts), texts.shape[1]), [0] * len(texts)
    runner.run(runner.embed(texts[:, : context - 1], starts), cache, starts, 0, full)
    cache.lengths[:] = [context - 1] * len(texts)
    slots = Slots(cache, texts[:, context - 1].clone())
    for _ in range(texts.shape[1] - context):
        depths += exit_round(runner, slots, criterion, full, chooser, exits)[1]
    return chooser.quality(), sum(depths) / len(depths)


def score_language(arm: Arm, module: LayerSkipModule, texts: Tensor, sizes: Sizes) -> Iterator[dict]:
    """Perplexity and accuracy on held-out texts by mean layers: fixed exits, criteria, and drafts that are verified."""
    layers = range(1, module.decoder.num_layers + 1)
    labels = texts.clone()
    labels[:, : sizes.context] = -100
    with torch.inference_mode():
        read = read_exits(module.decoder, texts, labels, layers, module.exits)
    own = read.predictions == texts[:, sizes.context :].flatten()
    for layer, losses, hits in zip(layers, read.losses, own, strict=True):
        quality = {"perplexity": math.exp(losses.mean()), "accuracy": hits.float().mean().item()}
        yield point("fixed", layer, layer, **quality)
    last = quality
    generator = TextGenerator(module.model, weights="plain", trained_exits=module.exits)
    for criterion in arm.criteria:
        for threshold in criterion.thresholds:
            asked = bound(criterion.at(threshold, arm.first), generator.trained_exits)
            found, depth = follow(generator.runner, generator.trained_exits, texts, sizes.context, asked)
            yield point(criterion.name, threshold, depth, **found)
    yield from score_drafts(generator, texts, sizes, last)


def score_drafts(generator: TextGenerator, texts: Tensor, sizes: Sizes, quality: dict) -> Iterator[dict]:
    """Self-speculation: the whole model's quality, and the blocks that run one after another for a token of it."""
    prompts = [row[: sizes.context].tolist() for row in texts[:PROMPTS]]
    for exit_layer in range(2, max(3, generator.num_layers // 2 + 1)):
        for count in DRAFT_LENGTHS:
            settings = {"exit_layer": exit_layer, "num_speculations": count, "max_new_tokens": sizes.new_tokens}
            done = [generator.generate(prompt, **settings) for prompt in prompts]
            rounds, drafted = (sum(getattr(each, name) for each in done) for name in ("rounds", "drafted"))
            tokens = sum(len(each.token_ids) for each in done)
            depth = (rounds * generator.num_layers + drafted * exit_layer) / tokens
            yield point(f"self-speculative d={count}", exit_layer, depth, **quality)


def score_sentences(arm: Arm, module: TaskModule, batches: Iterable[dict[str, Tensor]]) -> Iterator[dict]:
    """Accuracy, or mean absolute error, on held-out sentences by mean layers: fixed exits, and criteria."""
    batches = list(batches)
    for layer in range(1, module.decoder.num_layers + 1):
        depth, quality = quality_of(module, batches, {"exit_layer": layer})
        yield point("fixed", layer, depth, **quality)
    for criterion in arm.criteria:
        if criterion.kind.reads_probabilities and not module.task.has_probabilities:
            continue
        for threshold in criterion.thresholds:
            depth, quality = quality_of(module, batches, {"criterion": criterion.at(threshold, arm.first)})
            yield point(criterion.name, threshold, depth, **quality)


def quality_of(module: TaskModule, batches: list[dict[str, Tensor]], settings: dict) -> tuple[float, dict]:
    depths, outputs, targets = [], [], []
    for batch in batches:
        answers = module.answer(batch["input_ids"], batch["lengths"], **settings)
        outputs.append(answers.outputs)
        depths.append(answers.depths)
        targets.append(batch["targets"])
    outputs, targets = torch.cat(outputs), torch.cat(targets)
    depth = torch.cat(depths).float().mean().item()
    if module.task.has_probabilities:
        return depth, {"accuracy": (outputs.argmax(-1) == targets).float().mean().item()}
    return depth, {"error": (outputs.squeeze(-1) - targets).abs().mean().item()}

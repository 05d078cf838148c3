"""Trainings whose outcome must not depend on the number of processes: five steps of eight rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lskip.callbacks import AlternatingExits, EarlyExitLoss, LayerDropout
from lskip.curricula import AllExits, Gradual, LastExit, Rotational
from lskip.low_rank import LowRank
from lskip.schedules import Constant, Schedule
from lskip.targets import LK, SelfDistillation

STEPS, ROWS, LENGTH, VOCABULARY, LAYERS = 5, 8, 13, 199, 4
MOST = 1e-5
# AdamW divides a gradient by its size: an eps under the rounding of sums would make a step of its noise.
ADAMW = partial(torch.optim.AdamW, lr=3e-4, weight_decay=0.1, eps=1e-6)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Batch = dict[str, Tensor]


class ByTurns(Schedule):
    """1 at every second block, for the depth; at every second step, for the time: drop rates of 0 and 1 alone."""

    def __call__(self, index: int, count: int) -> float:
        return float(index % 2)


def text(step: int) -> Batch:
    """Return the rows of a step, all scored."""
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids.clone()}


def pairs(step: int) -> Batch:
    """Return rows of which very unequal numbers of tokens are scored."""
    batch = text(step)
    for row, first in enumerate((0, 12, 5, 11, 9, 12, 1, 10)):
        batch["labels"][row, :first] = -100
    return batch


def documents(step: int) -> Batch:
    """Return rows of two documents each, kept apart, one of them short."""
    batch = text(step)
    firsts = torch.randint(1, LENGTH, (ROWS, 1), generator=torch.Generator().manual_seed(step))
    places = torch.arange(LENGTH).expand(ROWS, LENGTH)
    batch["labels"][places == firsts] = -100
    return {**batch, "position_ids": torch.where(places < firsts, places, places - firsts)}


def half_scored(step: int) -> Batch:
    """Return rows of which the first half scores nothing: with two processes, all of the first one's."""
    batch = text(step)
    batch["labels"][: ROWS // 2] = -100
    return batch


@dataclass(frozen=True)
class Case:
    """A training.

    Attributes:
        settings: of LayerSkipModule.
        model: fields of the model's config that differ.
        callbacks: makes them.
        batch: step -> the rows of all processes.
        accumulate: the most micro-batches of a step, where there are several processes, each of which needs a row; one
            process takes all rows at once.
        optimizer: parameters -> optimizer.
        trainer: settings of the Trainer.
        most: by which a weight may differ, as a share of its tensor's largest.
        same_size: whether DDP by as many processes is the measure, since one process would draw other patterns.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], Sequence[Callback]] = tuple
    batch: Callable[[int], Batch] = text
    accumulate: int = 1
    optimizer: Callable = ADAMW
    trainer: dict[str, Any] = field(default_factory=dict)
    most: float = MOST
    same_size: bool = False

    def new_model(self) -> PreTrainedModel:
        """Return the model before training, the same in every process."""
        torch.manual_seed(0)
        sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, "tie_word_embeddings": True, **self.model}))


def exits(curriculum=AllExits, **settings) -> Callable[[], Sequence[Callback]]:
    return lambda: [EarlyExitLoss(0.5, curriculum(), **settings)]


def dropping() -> Sequence[Callback]:
    return [LayerDropout(1.0, ByTurns(), ByTurns()), EarlyExitLoss(0.5, Rotational(2))]


def half_dropped(masks: str = "shared") -> Callable[[], Sequence[Callback]]:
    return lambda: [LayerDropout(0.5, Constant(), masks=masks), EarlyExitLoss(0.5, AllExits())]


def all_dropped() -> Sequence[Callback]:
    return [LayerDropout(1.0, ByTurns()), EarlyExitLoss(0.5, AllExits())]


CASES = {
    "plain": Case(),
    "untied head": Case(model={"tie_word_embeddings": False}),
    "SGD with momentum": Case(optimizer=SGD, callbacks=exits()),
    "all exits": Case(callbacks=exits()),
    "rotational": Case(callbacks=exits(partial(Rotational, 2))),
    "gradual": Case(callbacks=exits(Gradual)),
    "last exit": Case(callbacks=exits(LastExit)),
    "dropped blocks": Case(callbacks=dropping),
    "dropped blocks, accumulation": Case(callbacks=dropping, accumulate=2),
    "half of the rows dropped, accumulation": Case(callbacks=half_dropped(), accumulate=2, same_size=True),
    "half of the rows dropped, patterns per rank": Case(
        callbacks=half_dropped("per_rank"), accumulate=4, same_size=True
    ),
    "half of the blocks never run": Case(callbacks=all_dropped),
    "accumulation": Case(callbacks=exits(), accumulate=2),
    "unequal pairs": Case(callbacks=exits(), batch=pairs),
    "unequal pairs, accumulation": Case(callbacks=exits(), batch=pairs, accumulate=2),
    "a process with nothing scored": Case(callbacks=exits(), batch=half_scored),
    "documents apart": Case(callbacks=dropping, batch=documents, settings={"anchor_weight": 0.5}),
    "SelfDistillation": Case({"exit_target": SelfDistillation()}, callbacks=exits()),
    "LK": Case({"exit_target": LK()}, callbacks=exits(), batch=pairs),
    "anchor": Case({"anchor_weight": 0.5}, callbacks=exits()),
    "LoRA": Case({"low_rank": LowRank(2, rank=4)}, callbacks=exits(), optimizer=SGD),
    "LoRA, dropped blocks": Case({"low_rank": LowRank(2, rank=4)}, callbacks=dropping, optimizer=SGD),
    "exit heads and classifier, rotational": Case(
        {"exit_heads": True, "learned_exit": True}, callbacks=exits(partial(Rotational, 2)), batch=pairs
    ),
    "exit heads, a process with nothing scored": Case(
        {"exit_heads": True, "learned_exit": True}, callbacks=exits(), batch=half_scored
    ),
    "BERxiT": Case({"learned_exit": True}, callbacks=lambda: [AlternatingExits()]),
    "gradient checkpointing": Case({"gradient_checkpointing": True}, callbacks=dropping),
    "bf16-mixed": Case(callbacks=exits(), optimizer=SGD, trainer={"precision": "bf16-mixed"}, most=3e-3),
    "clipping": Case(callbacks=exits(), trainer={"gradient_clip_val": 0.05}, batch=pairs, accumulate=2),
}

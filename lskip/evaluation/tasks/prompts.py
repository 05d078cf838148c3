"""A task's examples as a model is given them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from lskip.evaluation.tasks.task import Example, Task
from lskip.inference import TextGenerator
from lskip.inference.text import encode_prompt

LOOKED_AT = 40  # examples for each that is asked for, before it is said that none fits


class Prompt(NamedTuple):
    """An example, its prompt as token ids, and how it is answered (GenerationSettings)."""

    example: Example
    ids: list[int]
    settings: dict[str, Any]


def prompts_of(task: Task, generator: TextGenerator, count: int) -> list[Prompt]:
    """The first `count` prompts whose answers have room in the model's context; those of long texts are left out.

    Raises:
        ValueError: none has room, there is none at all, the model cannot take such prompts, or says no numbers.
    """
    settings, found, looked = task.settings(), [], 0
    for example in islice(task.examples(), LOOKED_AT * count):
        looked += 1
        if isinstance(example.prompt, str) and len(example.prompt) > (generator.most_characters or math.inf):
            continue  # to tokenize it would take hundreds of bytes a character
        try:
            ids = encode_prompt(example.prompt, generator.tokenizer, task.chat, generator.vocab_size)
        except ValueError as error:  # a chat template that refuses the messages, or is missing
            raise ValueError(f"task: example {looked} of {task.name}: {error}") from error
        if len(ids) + task.max_new_tokens <= generator.context_length:
            found.append(Prompt(example, ids, settings))
        if len(found) == count:
            break
    if not looked:
        raise ValueError(f"task: {task.name} holds no example")
    if not found:
        raise ValueError(
            f"task: of the first {looked} prompts of {task.name} none leaves {task.max_new_tokens} tokens of the"
            f" model's context of {generator.context_length}; set a smaller max_new_tokens, or take shorter prompts"
        )
    check_numbers(generator, found[0].ids)
    return found


@torch.inference_mode()
def check_numbers(generator: TextGenerator, ids: list[int]) -> None:
    """ValueError where a model's logits are no numbers: its exits then all say the same, and seem to agree."""
    step = generator.runner
    last = torch.tensor([ids[-1:]], device=step.device)
    states = step.run(step.embed(last, [0]), step.new_cache(1, 1), [0], 0, step.num_layers)
    if not step.decode(states).isfinite().all():
        raise ValueError(
            f"model: its logits are no finite numbers; are its weights whole, or too large for {step.dtype}?"
        )


def texts_in_order(generator: TextGenerator, prompts: Sequence[Prompt], batch_size: int, **settings) -> list[list[int]]:
    """The answers to prompts of one task, token ids, several decoded at a time."""
    ids = [prompt.ids for prompt in prompts]
    ended = generator.generate_batch(ids, batch_size, **prompts[0].settings, **settings)
    return [generation.token_ids for _, generation in sorted(ended, key=lambda pair: pair[0])]

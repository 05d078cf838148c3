"""Prompts of a task, encoded for a model."""

import math
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from lskip.evaluation.tasks.task import Example, Task
from lskip.inference import TextGenerator
from lskip.inference.text import encode_prompt

LOOKED_AT = 40  # examples tried for each prompt asked for


class Prompt(NamedTuple):
    """An example, its prompt as token ids, and the GenerationSettings of its answer."""

    example: Example
    ids: list[int]
    settings: dict[str, Any]


def prompts_of(task: Task, generator: TextGenerator, count: int) -> list[Prompt]:
    """Return the first `count` prompts that fit into the model's context together with their answers.

    Raises:
        ValueError: no prompt fits, there is none, the chat template refuses one, or the logits are not finite.
    """
    settings, found, looked = task.settings(), [], 0
    for example in islice(task.examples(), LOOKED_AT * count):
        looked += 1
        if isinstance(example.prompt, str) and len(example.prompt) > (generator.most_characters or math.inf):
            continue  # tokenizing a text takes hundreds of bytes a character
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
    """Raise ValueError if a model's logits are not finite: all its exits would then seem to agree."""
    runner = generator.runner
    last = torch.tensor([ids[-1:]], device=runner.device)
    states = runner.run(runner.embed(last, [0]), runner.new_cache(1, 1), [0], 0, runner.num_layers)
    if not runner.decode(states).isfinite().all():
        raise ValueError(
            f"model: its logits are no finite numbers; are its weights whole, or too large for {runner.dtype}?"
        )


def texts_in_order(generator: TextGenerator, prompts: Sequence[Prompt], batch_size: int, **settings) -> list[list[int]]:
    """Return the answers to prompts of one task as token ids, decoded in batches."""
    ids = [prompt.ids for prompt in prompts]
    ended = generator.generate_batch(ids, batch_size, **prompts[0].settings, **settings)
    return [generation.token_ids for _, generation in sorted(ended, key=lambda pair: pair[0])]

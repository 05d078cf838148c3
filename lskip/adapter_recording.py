"""Answers that a model writes for an exit adapter to be trained on, their states kept on the way."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.adapter_answers import AnswerRow, digest_of, in_order, is_held_out
from lskip.adapter_states import StateCache
from lskip.inference import TextGenerator
from lskip.inference.text import encode_prompt
from lskip.prompt_file import Prompt


def record_answers(
    cache: StateCache,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    block_size: int,
    max_new_tokens: int,
    batch_size: int,
    chat: bool | None = None,
) -> list[AnswerRow]:
    """Greedy answers as `read_answers` gives them, their states in `cache`; what it has is not written again.

    Args:
        cache: entered.
        model: the one that `cache` is of.
        prompts: those that leave no room in block_size are left out.
        max_new_tokens: of an answer, at most.
        batch_size: prompts that are answered together.
        chat: whether texts go through the chat template; None: where the model has one.

    Raises:
        ValueError: no prompt, or none of a side of the split, leaves room for an answer.
    """
    encoded = [encode_prompt(prompt.content, tokenizer, chat, model.config.vocab_size) for prompt in prompts]
    asked = {
        digest_of([max_new_tokens, *ids]): (ids, is_held_out(prompt.content))
        for ids, prompt in zip(encoded, prompts, strict=True)
        if len(ids) < block_size
    }
    missing = [digest for digest in asked if digest not in cache.answers]
    if missing:
        generator = TextGenerator(model, tokenizer, batch_size=batch_size)
        outcomes = generator.generate_batch(
            [asked[digest][0] for digest in missing],
            batch_size,
            states_at=cache.exit_layer,
            max_new_tokens=max_new_tokens,
            temperature=0.0,
        )
        for index, generation in tqdm(outcomes, total=len(asked), initial=len(asked) - len(missing), desc="answers"):
            digest = missing[index]
            row = row_of(*asked[digest], generation.token_ids, block_size)
            cache.add(row, *generation.states[:, : len(row.token_ids)])
            cache.answers.append([digest], [{"token_ids": np.array(generation.token_ids, np.int32)[:, None]}])
    tokens = cache.answers.mapped("token_ids")[:, 0]
    answers = {digest: tokens[cache.answers.place(digest)].tolist() for digest in asked}
    return in_order([row_of(*asked[digest], answer, block_size) for digest, answer in answers.items()], block_size)


def row_of(prompt: list[int], held_out: bool, answer: list[int], block_size: int) -> AnswerRow:
    """A prompt with its answer, cut to block_size tokens."""
    return AnswerRow(tuple([*prompt, *answer][:block_size]), len(prompt), held_out)

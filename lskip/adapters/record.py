"""Greedy answers of a model to prompts, recorded with their states to train an exit adapter on."""

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.adapters.answers import AnswerRow, digest_of, in_order, is_held_out
from lskip.adapters.states import StateCache
from lskip.inference import TextGenerator
from lskip.inference.prompt_file import Prompt
from lskip.inference.text import encode_prompt
from lskip.utils.console import warn

GROUP = 4  # batches between commits to disk: a kill loses at most one group, at whose end some slots are idle


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
    """Return greedy answers as `read_answers` does, their states stored in `cache`; cached answers are reused.

    Args:
        cache: an open cache of `model`.
        model: the frozen model.
        tokenizer: of the model.
        prompts: prompts of block_size tokens or more are left out.
        block_size: tokens of a prompt with its answer; longer ones are cut.
        max_new_tokens: of an answer, at most.
        batch_size: prompts that are answered together.
        chat: whether texts go through the chat template; None: if the model has one.

    Raises:
        ValueError: no prompt of a side of the split leaves room for an answer.
    """
    asked: dict[int, tuple[list[int], bool]] = {}
    for prompt in prompts:
        ids = _encoded(prompt, model, tokenizer, chat)
        if len(ids) < block_size:
            asked[digest_of([max_new_tokens, *ids])] = ids, is_held_out(prompt.content)
    # Its checks need no answers: fail before hours of decoding.
    in_order([row_of(*each, [], block_size) for each in asked.values()], block_size)
    if damaged := cache.answers.forget_damaged(asked):
        warn(f"cache_dir: '{cache.answers.folder}': {damaged} damaged answers are given again")
    missing = [digest for digest in asked if digest not in cache.answers]
    if missing:
        limits = {"max_new_tokens": max_new_tokens, "block_size": block_size, "batch_size": batch_size}
        _answer(cache, model, tokenizer, {digest: asked[digest] for digest in missing}, **limits)
    tokens = cache.answers.mapped("token_ids")[:, 0]
    answers = {digest: tokens[cache.answers.place(digest)].tolist() for digest in asked}
    return in_order([row_of(*asked[digest], answer, block_size) for digest, answer in answers.items()], block_size)


def _encoded(
    prompt: Prompt, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: bool | None
) -> list[int]:
    try:
        return encode_prompt(prompt.content, tokenizer, chat, model.config.vocab_size)
    except ValueError as error:  # a chat template that refuses the messages, or is missing
        raise ValueError(f"prompts: line {prompt.line}: {error}") from error


def _answer(
    cache: StateCache,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: dict[int, tuple[list[int], bool]],
    max_new_tokens: int,
    block_size: int,
    batch_size: int,
) -> None:
    """Answer prompts group by group, and commit the answers of a group together.

    States depend in their last bits on the other texts of the batch. A group cut short by a kill is answered again as a
    whole, so that states are the same whether or not a run was interrupted.
    """
    generator = TextGenerator(model, tokenizer, batch_size=batch_size)
    settings = {"states_at": cache.exit_layer, "max_new_tokens": max_new_tokens, "temperature": 0.0}
    digests = list(asked)
    with tqdm(total=len(digests), desc="answers") as bar:
        for start in range(0, len(digests), GROUP * batch_size):
            group = digests[start : start + GROUP * batch_size]
            answers: dict[int, np.ndarray] = {}
            for index, generation in generator.generate_batch(
                [asked[digest][0] for digest in group], batch_size, **settings
            ):
                row = row_of(*asked[group[index]], generation.token_ids, block_size)
                cache.add(row, *generation.states[:, : len(row.token_ids)])
                answers[group[index]] = np.array(generation.token_ids, np.int32)[:, None]
                bar.update()
            cache.answers.append(list(answers), [{"token_ids": answer} for answer in answers.values()])


def row_of(prompt: list[int], held_out: bool, answer: list[int], block_size: int) -> AnswerRow:
    """Return a prompt with its answer, cut to block_size tokens."""
    return AnswerRow(tuple([*prompt, *answer][:block_size]), len(prompt), held_out)

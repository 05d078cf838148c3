"""Training rows of an exit adapter: prompts with the frozen model's answers, as tokens."""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lskip.data.documents import fraction_of, text_digest
from lskip.inference.stopping import end_tokens
from lskip.inference.text import encode_prompt
from lskip.utils.json_lines import asked_of, read_json_lines, text_of

HELD_OUT = 0.03  # of the prompts


@dataclass(frozen=True)
class AnswerRow:
    """A prompt and its answer, as tokens.

    Attributes:
        token_ids: of the prompt, then of the answer.
        prompt_length: tokens of the prompt. Positions prompt_length - 1 to len(token_ids) - 2 predict the answer.
        held_out: whether it is kept from training.
    """

    token_ids: tuple[int, ...]
    prompt_length: int
    held_out: bool

    @cached_property
    def digest(self) -> int:
        """A hash of the tokens and of prompt_length."""
        return digest_of([self.prompt_length, *self.token_ids])


def digest_of(numbers: Sequence[int]) -> int:
    """Return a 64-bit hash of whole numbers."""
    return int.from_bytes(hashlib.sha256(np.array(numbers, np.int32).tobytes()).digest()[:8], "little")


def read_answers(
    paths: list[Path],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    chat: bool | None = None,
) -> list[AnswerRow]:
    """Return the unique answers in files that `lskip predict` wrote, cut to `block_size` tokens, shortest first.

    The hash of the prompt decides what is held out, so that all answers to a prompt are on the same side.

    Args:
        chat: whether `predict` used the chat template; None: if the model has one.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line is not an answer (with file and number), or a side of the split is empty.
    """
    ends = end_tokens(model, tokenizer)
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else min(ends, default=None)
    rows = {}
    for path in paths:
        for where, fields in read_json_lines(path, "answers"):
            prompt, text = asked_of(fields, where), text_of(fields, "text", where)
            try:
                ids = encode_prompt(prompt, tokenizer, chat, model.config.vocab_size)
            except ValueError as error:  # a chat template that refuses the messages, or is missing
                raise ValueError(f"{where}: {error}") from error
            answer = tokenizer(text, add_special_tokens=False)["input_ids"]
            if fields.get("finish_reason") == "eos" and end is not None:
                answer.append(end)
            if answer and len(ids) < block_size:
                rows[AnswerRow(tuple([*ids, *answer][:block_size]), len(ids), is_held_out(prompt))] = None
    return in_order(rows, block_size)


def in_order(rows: Collection[AnswerRow], block_size: int) -> list[AnswerRow]:
    """Return the rows, shortest first; ValueError if a side of the split is empty."""
    for held_out in (False, True):
        if not any(row.held_out == held_out for row in rows):
            side = "is held out" if held_out else "is left to train on"
            raise ValueError(f"answers: of {len(rows)} answers within {block_size} tokens none {side}; give more")
    return sorted(rows, key=lambda row: len(row.token_ids))


def is_held_out(prompt: str | list[dict]) -> bool:
    """Return whether a prompt, a text or chat messages, is among the 3 % that are held out."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return fraction_of(text_digest(text)) < HELD_OUT


def frequent_words(
    rows: list[AnswerRow], size: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Tensor:
    """Return up to `size` token ids, ascending: end tokens and the most frequent tokens of the training answers."""
    answers = [np.array(row.token_ids[row.prompt_length :]) for row in rows if not row.held_out]
    counts = np.bincount(np.concatenate(answers), minlength=model.config.vocab_size)
    counts[list(end_tokens(model, tokenizer))] = counts.max() + 1
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))
